"""Check 5: the noise floor. How far apart real images come out by chance, beside what must be told apart."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from biorewards.audit.lesions import LESIONS, apply
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats, real_under_every_label
from biorewards.validate.variance import centred

NAME = "noise_floor"
#: Standard deviation of what chance makes, over what must be told apart. A third is the usual limit of detection: a
#: signal of three standard deviations (IUPAC 1997).
MOST_NOISE = 1 / 3
#: Images a row of a table, for which the floor is given. Other numbers follow by the square root.
GROUP = 100
#: Random halves that replicates are dealt to; fresh exposures of one image.
SPLITS, SHOTS = 200, 4
#: Replicates of a class, from coarse to fine: the first that two of each class exist of is used.
UNITS = ("plate", "well", "site")
#: A spread below this is none: values that do not vary at all.
TINY = 1e-9
#: Numbers of images that the curve of floors is drawn for.
SIZES = (10, 20, 50, 100, 200, 500, 1000)


def noise_floor(bench: Bench) -> list[Finding]:
    """Each reward's spread among replicates, and among fresh exposures, over its gap between right and wrong."""
    rows = bench.some(4 * bench.n)
    values = real_under_every_label(bench, rows)
    target = bench.target[rows]
    unit, halves = _deal(bench, rows)
    shots, images = _exposures(bench), bench.some(bench.n // 2)
    findings = []
    for name in bench.suite.rewards:
        own = values[name][np.arange(len(rows)), target]
        gap = _gap(bench, name, values[name], target)
        findings += [
            _replicates(bench, name, own, gap, target, unit, halves),
            _seeds(bench, name, shots[name], gap, bench.real(images).value[name].to_numpy()),
        ]
    return findings


def _gap(bench: Bench, name: str, values: Floats, target: Rows) -> Floats | str:
    """(N,) what an image of the right kind earns above one of the wrong kind, or why that cannot be had."""
    if not np.isfinite(values).any():
        return "real images have no value"
    if getattr(bench.suite.rewards[name], "label_free", False):
        # No wrong label: the third of six doses of the damage that it owns.
        falls = [_fall(bench, name, lesion) for lesion, one in LESIONS.items() if one.owner == name]
        why = "it asks for no label and owns no lesion: nothing says what is wrong"
        return np.mean(falls, axis=0) if falls else why
    wrong = np.zeros(len(bench.assay.classes), bool)
    wrong[np.unique(target)] = True
    if wrong.sum() < 2:
        return "the real images show one class only: there is no wrong label"
    others = np.broadcast_to(wrong, values.shape).copy()
    others[np.arange(len(values)), target] = False
    return np.asarray(values[np.arange(len(values)), target] - np.nanmean(np.where(others, values, np.nan), 1))


def _fall(bench: Bench, name: str, lesion: str) -> Floats:
    """(n,) what the third dose of a lesion takes from the reward."""
    rows = bench.some(bench.n)
    images, dose = bench.images(rows), LESIONS[lesion].doses[2]
    harmed = apply(lesion, images, bench.masks(rows), dose, channels=bench.assay.channels, seed=bench.seed).images
    lost = bench.real(rows).value[name] - bench.score(harmed, bench.target[rows]).value[name]
    return np.asarray(lost.to_numpy(), np.float64)


def _deal(bench: Bench, rows: Rows) -> tuple[str, npt.NDArray[np.bool_]]:
    """The unit of replication, and (SPLITS, N) sides: the units of each class dealt to two halves at random."""
    table, target = bench.rows.iloc[rows], bench.target[rows]
    rng = bench.rng(NAME)
    chosen, names = "image", np.arange(len(rows)).astype(str)
    known = np.full(len(rows), "", dtype=object)
    for unit in UNITS:
        known = known + "\0" + table[unit].to_numpy()
        if table[unit].ne("").all() and all(len(set(known[target == k])) > 1 for k in np.unique(target)):
            chosen, names = unit, known.astype(str)
            break
    sides = np.zeros((SPLITS, len(rows)), bool)
    for k in np.unique(target):
        here = np.flatnonzero(target == k)
        _, place = np.unique(names[here], return_inverse=True)
        for split in range(SPLITS):
            order = rng.permutation(place.max() + 1)
            sides[split, here] = (order % 2 == rng.integers(2))[place]
    return chosen, sides


def _replicates(
    bench: Bench, name: str, own: Floats, gap: Floats | str, target: Rows, unit: str, sides: npt.NDArray[np.bool_]
) -> Finding:
    what = (
        f"Standard deviation of the difference of two sets of {GROUP} real images from other {unit}s, over what right "
        "and wrong are apart."
    )
    threshold = f"<= {MOST_NOISE:.2f}"
    if isinstance(gap, str):
        return not_judged(NAME, name, what, threshold, gap)
    there = np.isfinite(own)
    rest, side = centred(own[there, None], target[there])[:, 0], sides[:, there]
    spread = float(rest.std())
    n = side.sum(1), (~side).sum(1)
    good = (n[0] > 0) & (n[1] > 0)
    if not good.any():
        return not_judged(NAME, name, what, threshold, "there are no two replicates of a class")
    difference = (side[good] @ rest) / n[0][good] - (~side[good] @ rest) / n[1][good]
    by_chance = spread**2 * (1 / n[0][good] + 1 / n[1][good])
    # What replicates add to the variance that independent images would have: 1 where they are alike.
    design = max(1.0, float(np.mean(difference**2) / np.mean(by_chance))) if spread else 1.0

    def floor(n: int, spread: float = spread) -> float:
        return spread * math.sqrt(2 * design / n)

    def signal(drawn: Rows) -> float:
        noise = floor(GROUP, float(rest[drawn % len(rest)].std()))
        return float(np.nanmean(gap[drawn % len(gap)])) / max(noise, TINY)

    value, low, high = _turned(*bench.interval_of(signal, max(len(rest), len(gap)), resamples=200))
    height = float(np.nanmean(gap))
    details = {
        "unit": unit, "gap": height, "sd_within_class": spread, "design_effect": design, "n": list(SIZES),
        # Half the width of the 95 % interval of a difference of two sets of n images.
        "floor": [1.96 * floor(k) for k in SIZES],
        "images_to_see_a_tenth_of_the_gap": math.ceil(2 * design * (1.96 * spread / (0.1 * height)) ** 2)
        if height > 0 else None,
    }  # fmt: skip
    passed = value <= MOST_NOISE
    noise = f"differences below {1.96 * floor(GROUP):.2g} between two rows of {GROUP} images are noise"
    reason = "" if passed else noise if height > 0 else "right labels earn no more than wrong ones"
    return Finding(NAME, name, what, _finite(value), (low, high), threshold, passed, len(rest), reason, details)


def grain(images: Tensor) -> float:
    """Standard deviation of the camera's noise, median over images and channels of (B, C, H, W), in [0, 1] units.

    From second differences along rows, by the median of absolute values, which edges do not enter; at least what
    rounding to 8 bits makes.
    """
    second = images[..., 2:] - 2 * images[..., 1:-1] + images[..., :-2]
    found = float(second.abs().flatten(2).median(2).values.median()) / 0.6745 / math.sqrt(6)
    return max(found, 1 / 255 / math.sqrt(12))


def _exposures(bench: Bench) -> dict[str, Floats]:
    """reward -> (SHOTS, n) values of the same images with fresh camera noise, of the strength that they have."""
    rows = bench.some(bench.n // 2)
    images, masks = bench.images(rows), bench.masks(rows)
    dose = grain(images)
    shots = []
    for seed in range(SHOTS):
        taken = apply("noise", images, masks, dose, channels=bench.assay.channels, seed=1000 * (seed + 1) + bench.seed)
        shots.append(bench.score(taken.images, bench.target[rows]).value)
    return {name: np.stack([shot[name].to_numpy() for shot in shots]) for name in bench.suite.rewards}


def _seeds(bench: Bench, name: str, shots: Floats, gap: Floats | str, before: Floats) -> Finding:
    what = "Standard deviation of one image's value with fresh camera noise, over what right and wrong are apart."
    threshold = f"<= {MOST_NOISE:.2f}"
    if isinstance(gap, str):
        return not_judged(NAME, name, what, threshold, gap)
    variance = shots.var(0, ddof=1)
    if not np.isfinite(variance).any():
        return not_judged(NAME, name, what, threshold, "real images have no value")
    height = float(np.nanmean(gap))

    def signal(drawn: Rows) -> float:
        return height / max(math.sqrt(float(np.nanmean(variance[drawn]))), TINY)

    value, low, high = _turned(*bench.interval_of(signal, len(variance), resamples=200))
    spread = math.sqrt(float(np.nanmean(variance)))
    details = {
        "gap": height, "sd_of_exposures": spread, "exposures": SHOTS, "shift": float(np.nanmean(shots - before)),
        "sd_of_images": float(np.nanstd(before)),
    }  # fmt: skip
    passed = value <= MOST_NOISE
    noise = "one image's value is noise of that size: compare means of many images only"
    reason = "" if passed else noise if height > 0 else "right labels earn no more than wrong ones"
    return Finding(NAME, name, what, _finite(value), (low, high), threshold, passed,
                   len(variance), reason, details)  # fmt: skip


def _turned(value: float, low: float, high: float) -> tuple[float, float, float]:
    """Noise over signal from signal over noise, whose interval behaves: a signal of nothing is noise without limit."""
    value, low, high = (1 / one if one > 0 else math.inf for one in (value, high, low))
    return value, low, high


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
