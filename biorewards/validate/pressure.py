"""Check 10: selection pressure. The best of N by the rewards on trial, judged by others; where more stops helping.

Gao, Schulman and Hilton (2023), "Scaling laws for reward model overoptimization": the judge that selects always rises
with N; what counts is where another judge of the same question turns round.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from biorewards.audit.bootstrap import interval
from biorewards.audit.selection import selection_weights
from biorewards.validate.bench import Bench
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats
from biorewards.validate.pools import candidates
from biorewards.validate.second import second_judge

NAME = "pressure"
SIZES = (1, 2, 4, 8, 16, 32, 64)
RESAMPLES = 200
#: Real standard deviations that the second judge may lose from its best N to the largest: what the invariance of one
#: image allows is more; a fall beyond it that chance does not explain is hacking.
MOST_FALL = 0.1
#: The second judges must see a gain at all; where they see less than this share of what the first one claims, and the
#: interval leaves no doubt, selection by it serves itself.
LEAST_SEEN, LEAST_SHARE = 0.0, 0.25

Curve = npt.NDArray[np.float64]


def pressure(bench: Bench) -> list[Finding]:
    """Best-of-N by each reward alone and by their weighted sum, judged by the second judges."""
    what = (
        "What selection by it gains before the second judges (other segmenter and classifier), in real sd, at N = {}."
    )
    pool = candidates(bench)
    goals = np.unique(pool.goal)
    second = second_judge(bench)
    ours, theirs = bench.score(pool.images, pool.goal).value, second.score(pool.images, pool.goal).value
    real = {True: bench.real().value, False: second.real().value}
    names = [name for name in bench.suite.rewards if name in second.suite.rewards]
    findings = []
    weights = bench.suite.weights
    columns = {name: (ours[name].to_numpy(), theirs[name].to_numpy()) for name in names}
    spread = {name: (_sd(real[True][name]), _sd(real[False][name])) for name in names}
    there = [n for n in names if all(np.isfinite(one).any() for one in columns[n])]
    if len(there) > 1:
        columns["total"] = _total(columns, there, weights, 0), _total(columns, there, weights, 1)
        whole = {name: (real[True][name].to_numpy(), real[False][name].to_numpy()) for name in there}
        spread["total"] = _sd(_total(whole, there, weights, 0)), _sd(_total(whole, there, weights, 1))
    for name, (first, other) in columns.items():
        reward = None if name == "total" else name
        said = what.format(SIZES[-1])
        if not (np.isfinite(first).any() and np.isfinite(other).any() and all(spread[name])):
            findings.append(not_judged(NAME, reward, said, f"> {LEAST_SEEN:g}", "it has no value for these images"))
            continue
        draws = curves(first / spread[name][0], other / spread[name][1], pool.goal, list(SIZES), bench.seed)
        findings += _judge(name, reward, said, draws, list(SIZES), len(first), len(goals), there)
    return findings


def curves(
    first: Floats, other: Floats, goal: npt.NDArray[np.int64], sizes: list[int], seed: int, resamples: int = RESAMPLES
) -> Curve:
    """(resamples + 1, S, 2): mean of the kept image by the judge that selects and by the other, for each N; row 0 the
    pool itself, then pools resampled within goals. Values without a number are never kept."""
    groups = [np.flatnonzero(goal == g) for g in np.unique(goal)]
    rng = np.random.default_rng(seed)
    out = np.full((resamples + 1, len(sizes), 2), np.nan)
    for draw in range(resamples + 1):
        rows = [g if draw == 0 else rng.choice(g, len(g)) for g in groups]
        own, judged = (np.stack([v[r] for r in rows]) for v in (first, other))
        own = np.where(np.isfinite(judged), own, np.nan)
        # Ranks are the same for every N: sort once.
        for s, n in enumerate(sizes):
            weight = selection_weights(own, n)
            for side, values in enumerate((own, judged)):
                kept = (weight * np.nan_to_num(values)).sum(1)
                out[draw, s, side] = float(np.nanmean(kept))
    return out


def _judge(
    name: str, reward: str | None, what: str, draws: Curve, sizes: list[int], n: int, goals: int, parts: list[str]
) -> list[Finding]:
    ours, theirs = draws[0, :, 0], draws[0, :, 1]
    gain = draws[:, -1, 1] - draws[:, 0, 1]
    claimed = float(ours[-1] - ours[0])
    peak = int(theirs.argmax())
    falls = [draws[:, peak, 1] - draws[:, s, 1] for s in range(len(sizes))]
    lost = [s for s in range(peak + 1, len(sizes)) if falls[s][0] > MOST_FALL and interval(falls[s])[0] > 0]
    hacked = lost[0] if lost else None
    bands = [[interval(draws[:, s, side]) for s in range(len(sizes))] for side in (0, 1)]
    details = {
        "n": sizes, "selecting": ours.tolist(), "second": theirs.tolist(),
        "selecting_interval": [list(b) for b in bands[0]], "second_interval": [list(b) for b in bands[1]],
        "best_n": sizes[peak], "hacking_starts_at": None if hacked is None else sizes[hacked],
        "claimed_gain": claimed, "goals": goals, "parts": parts if reward is None else [name],
    }  # fmt: skip
    value, (low, high) = float(gain[0]), interval(gain)
    passed: bool | None = True
    reason = ""
    if low <= LEAST_SEEN:
        failed = high <= max(LEAST_SEEN, LEAST_SHARE * claimed)
        passed = False if failed else None
        reason = "what it selects is no better to the second judges" if failed else "these pools do not settle it"
    first = Finding(NAME, reward, what, value, (low, high), f"> {LEAST_SEEN:g}, beyond the interval", passed, n,
                    reason, details)  # fmt: skip
    fall, ends = float(falls[-1][0]), interval(falls[-1])
    start = f"from N = {sizes[hacked]} on it selects what deceives it" if hacked is not None else ""
    sentence = f"What the second judges lose from their best N to N = {sizes[-1]}, in real sd."
    return [first, Finding(NAME, reward, sentence, fall, ends, f"<= {MOST_FALL}, or within the interval",
                           hacked is None, n, start, {"best_n": sizes[peak]})]  # fmt: skip


def _total(columns: dict[str, tuple[Floats, Floats]], names: list[str], weights: dict[str, float], side: int) -> Floats:
    return np.asarray(sum(weights[name] * columns[name][side] for name in names))


def _sd(values: npt.ArrayLike) -> float:
    column = np.asarray(values, np.float64)
    return float(np.nanstd(column)) if np.isfinite(column).any() else 0.0
