"""Check 11: a random search against each reward. Untreated cells are changed at random, and what raises it is kept.

No gradient is used and nothing is learnt: a search of a few dozen steps is the weakest optimiser there is. A reward
that it can raise while the second judges see the image get worse will not withstand a stronger one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.validate.bench import Bench
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats
from biorewards.validate.second import halves, second_judge

NAME = "attack"
STEPS = 40
#: Steps at which the second judges are asked.
ASKED = (0, 10, 20, 40)
#: Real standard deviations by which the attacked reward must have risen for the attack to count, and by which the
#: second judges may fall: a small effect (Cohen 1988).
LEAST_RISE, MOST_FALL = 0.2, 0.2
#: Real standard deviations that the reward may rise without the second judge of its question: less than real images
#: differ among themselves.
MOST_UNSEEN = 1.0
#: Strength of a first change, in [0, 1] units; doubled after a success, times 0.8 after a failure (one in five rule).
START, SMALLEST, LARGEST = 0.04, 0.005, 0.3
GRIDS = (3, 6, 12)
WORSE = "What the second judges say, all in all, of images that a random search made to raise it: change in real sd."
UNSEEN = "What a random search gains that the second judge of the same question does not see, in real sd."
AT_LEAST = f">= -{MOST_FALL}, or within the interval"


def attack(bench: Bench) -> list[Finding]:
    """For each reward and for their sum: what a random search gains, and what the second judges say of it."""
    second = second_judge(bench)
    real = {True: bench.real().value, False: second.real().value}
    there = [
        name for name in bench.suite.rewards if name in second.suite.rewards
        and all(np.isfinite(side[name]).any() and np.nanstd(side[name]) for side in real.values())
    ]  # fmt: skip
    findings = [
        not_judged(NAME, name, WORSE, AT_LEAST, "it has no value that varies, or no second judge answers its question")
        for name in bench.suite.rewards if name not in there
    ]  # fmt: skip
    if not there:
        return findings
    objectives: list[str | None] = [*there, *([None] if len(there) > 1 else [])]
    start, target = _begin(bench, max(8, bench.n // 8))
    k = len(start)
    images, goal = start.repeat(len(objectives), 1, 1, 1), np.tile(target, len(objectives))
    trail, ours = _climb(bench, images, goal, objectives, there)
    seen = {step: second.score(taken, goal).value for step, taken in trail.items()}
    weights = bench.suite.weights

    def change(values: dict[int, pd.DataFrame], side: bool, of: str | None, part: slice) -> Floats:
        """(steps asked, k) change since the start, in real sd."""
        unit = max(float(np.nanstd(_objective(of, there, weights, real[side]))), 1e-9)
        steps = np.stack([_objective(of, there, weights, values[step].iloc[part]) for step in ASKED])
        return np.asarray((steps - steps[0]) / unit)

    for place, objective in enumerate(objectives):
        part = slice(place * k, (place + 1) * k)
        rise, own, whole = (
            change(values, side, of, part)
            for values, side, of in ((ours, True, objective), (seen, False, objective), (seen, False, None))
        )
        findings += _judge(bench, objective, rise, own, whole)
    return findings


def _begin(bench: Bench, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """k untreated cells (else images of another class) that nothing was fitted to, and the class asked of each."""
    rng = bench.rng(NAME)
    _, rows = halves(bench)
    target = bench.target
    goals = np.unique(target[rows])
    goals = goals[goals != 0] if (goals != 0).any() else goals
    asked = rng.choice(goals, k, replace=k > len(goals))
    chosen = []
    for goal in asked:
        controls = rows[(target[rows] == 0) & (target[rows] != goal)]
        others = rows[target[rows] != goal]
        pool = controls if len(controls) else others if len(others) else rows
        chosen.append(int(rng.choice(pool)))
    return bench.images(chosen), asked.astype(np.int64)


def _climb(
    bench: Bench, images: Tensor, goal: npt.NDArray[np.int64], objectives: list[str | None], names: list[str]
) -> tuple[dict[int, Tensor], dict[int, pd.DataFrame]]:
    """Images, and values of all rewards, at the steps of `ASKED`."""
    rng = bench.rng("climb")
    each = len(images) // len(objectives)

    def judged(value: pd.DataFrame) -> Floats:
        parts = [
            _objective(objective, names, bench.suite.weights, value.iloc[place * each : (place + 1) * each])
            for place, objective in enumerate(objectives)
        ]
        return np.nan_to_num(np.concatenate(parts), nan=-np.inf)

    value = bench.score(images, goal).value
    best = judged(value)
    reach = np.full(len(images), START)
    trail, values = {0: images}, {0: value}
    for step in range(1, STEPS + 1):
        tried = torch.stack([_changed(one, float(r), rng) for one, r in zip(images, reach, strict=True)])
        now = bench.score(tried, goal).value
        found = judged(now)
        # Counts change in steps: on a plateau the search walks on.
        taken = found >= best
        images = torch.where(torch.from_numpy(taken)[:, None, None, None], tried, images)
        value = now.where(pd.Series(taken), value, axis=0)
        reach = np.clip(np.where(found > best, reach * 2, np.where(taken, reach, reach * 0.8)), SMALLEST, LARGEST)
        best = np.where(taken, found, best)
        if step in ASKED:
            trail[step], values[step] = images, value
    return trail, values


def _changed(image: Tensor, reach: float, rng: np.random.Generator) -> Tensor:
    """One random change: smooth light and shade, another gain or level of a channel, or grain on a patch."""
    c, height, width = image.shape
    kind = int(rng.integers(3))
    if kind == 0:
        grid = int(rng.choice(GRIDS))
        coarse = torch.from_numpy(rng.standard_normal((1, c, grid, grid), dtype=np.float32))
        change = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
        return (image + reach * change * _some_channels(c, rng)).clamp(0, 1)
    if kind == 1:
        gain = torch.from_numpy(np.exp(5 * reach * rng.standard_normal((c, 1, 1))).astype(np.float32))
        level = torch.from_numpy(0.3 * reach * rng.standard_normal((c, 1, 1)).astype(np.float32))
        chosen = _some_channels(c, rng)
        return (image * (1 + (gain - 1) * chosen) + level * chosen).clamp(0, 1)
    side = int(rng.integers(4, max(5, height // 2)))
    y, x = int(rng.integers(0, height - side + 1)), int(rng.integers(0, max(1, width - side + 1)))
    changed = image.clone()
    patch = changed[:, y : y + side, x : x + side]
    patch += 2 * reach * torch.from_numpy(rng.standard_normal(patch.shape, dtype=np.float32)) * _some_channels(c, rng)
    return changed.clamp(0, 1)


def _some_channels(c: int, rng: np.random.Generator) -> Tensor:
    chosen = rng.random((c, 1, 1)) < 0.5
    chosen[int(rng.integers(c))] = True
    return torch.from_numpy(chosen.astype(np.float32))


def _objective(objective: str | None, names: list[str], weights: dict[str, float], value: pd.DataFrame) -> Floats:
    """(N,) one reward, or the weighted sum (None), from a table of values."""
    if objective is not None:
        return value[objective].to_numpy(np.float64)
    return np.asarray(value[names].to_numpy(np.float64) @ np.array([weights[name] for name in names]))


def _judge(bench: Bench, objective: str | None, rise: Floats, own: Floats, whole: Floats) -> list[Finding]:
    """Two findings of one attack, from changes since its start in real sd, (steps asked, k) each.

    rise: of the attacked reward. own, whole: of the second judges' answer to its question, and of their weighted sum.
    """
    k = rise.shape[1]
    gained, value = float(np.nanmean(rise[-1])), float(np.nanmean(whole[-1]))
    low, high = bench.interval(whole[-1])
    details = {
        "steps": list(ASKED), "attacked": np.nanmean(rise, 1).tolist(), "second": np.nanmean(own, 1).tolist(),
        "second_total": np.nanmean(whole, 1).tolist(),
        "gained": gained, "gained_interval": list(bench.interval(rise[-1])),
        "succeeded": float(((rise[-1] >= LEAST_RISE) & (whole[-1] <= -MOST_FALL)).mean()),
    }  # fmt: skip
    worse = value < -MOST_FALL and high < 0 and gained >= LEAST_RISE
    reason = f"it rose by {gained:.2g} sd while the second judges say that the image got worse" if worse else ""
    # Only a rise counts for the second judge: where its answer falls as well, the whole gain is unseen.
    apart = rise[-1] - np.maximum(own[-1], 0)
    unseen, ends = float(np.nanmean(apart)), bench.interval(apart)
    passed: bool | None = unseen <= MOST_UNSEEN
    why = "" if passed else f"{STEPS} random steps raise it on untreated cells, and nobody else sees why"
    if not passed and ends[0] <= MOST_UNSEEN:
        passed, why = None, f"{k} images do not settle it: the interval reaches below the bar"
    return [
        Finding(NAME, objective, WORSE, value, (low, high), AT_LEAST, not worse, k, reason, details),
        Finding(NAME, objective, UNSEEN, unseen, ends, f"<= {MOST_UNSEEN:g}", passed, k, why, {"steps": STEPS}),
    ]
