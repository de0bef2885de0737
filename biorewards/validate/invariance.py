"""Check 2: what happens to an image between microscope and reward, and is no biology, must not move the reward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import RELATIVE_FLOOR
from biorewards.audit.lesions import LESIONS, apply
from biorewards.segmentation.segmenter import Masks
from biorewards.validate.bench import Bench, Rows, Scores
from biorewards.validate.check import Finding, not_judged, settled

NAME = "invariance"
#: Real standard deviations by which a nuisance may move the mean reward: a small effect (Cohen 1988), and less than
#: what separates most models.
MOST_SHIFT = 0.2
#: Agreement of a crop's measure with that of its mirror image. 0.9 is called excellent (Koo and Li 2016).
LEAST_AGREEMENT = 0.9
#: px by which a crop may lie off its cell; beyond the edge it is mirrored.
SHIFTS = (1, 2, 3, 4, 6, 8)
#: nuisance -> the dose that must be tolerated. Beyond it the curve is shown, not judged: at some dose every nuisance
#: hides biology. Gain: lamp drift of a tenth. Noise: 1 % of full range, 2.5 grey levels of 8 bits. Blur: below the
#: resolution of a 20x objective at 0.32 um a pixel. JPEG 90 and 8 bits: what data sets are stored with.
TOLERATED = {"shift": 4, "gain_up": 1.1, "gain_down": 0.9, "noise": 0.01, "blur": 0.75, "8-bit": 8, "jpeg": 90}
SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "left-right": lambda images: images.flip(-1),
    "up-down": lambda images: images.flip(-2),
    "quarter turn": lambda images: images.rot90(1, (-2, -1)),
}


def invariance(bench: Bench) -> list[Finding]:
    """Flips by agreement image by image; every other nuisance by the shift of the mean at the tolerated dose."""
    rows = bench.some(bench.n)
    images, target, before = bench.images(rows), bench.target[rows], bench.real(rows)
    flipped = {name: bench.score(turn(images), target) for name, turn in SYMMETRIES.items()
               if images.shape[2] == images.shape[3] or "turn" not in name}  # fmt: skip
    findings = [_flips(bench, name, before, flipped) for name in bench.suite.rewards]
    for nuisance, tolerated in TOLERATED.items():
        doses = SHIFTS if nuisance == "shift" else LESIONS[nuisance].doses
        after = {dose: bench.score(_harmed(bench, nuisance, images, dose), target) for dose in doses}
        findings += [
            _shifted(bench, name, nuisance, tolerated, before, after, bench.spread(name))
            for name in bench.suite.rewards
        ]
    return findings


def _harmed(bench: Bench, nuisance: str, images: Tensor, dose: float) -> Tensor:
    if nuisance == "shift":
        return shifted(images, int(dose), bench.rng("shift"))
    # These need no masks: they treat all pixels alike.
    none = torch.zeros(len(images), *images.shape[2:], dtype=torch.int32)
    return apply(nuisance, images, Masks(none, none), dose, channels=bench.assay.channels, seed=bench.seed).images


def shifted(images: Tensor, pixels: int, rng: np.random.Generator) -> Tensor:
    """(B, C, H, W) each moved by `pixels` along one of eight directions, mirrored beyond the edge."""
    height, width = images.shape[2:]
    padded = F.pad(images, [pixels] * 4, mode="reflect")
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    moves = [steps[k] for k in rng.integers(len(steps), size=len(images))]
    cut = [
        one[:, (1 + dy) * pixels : (1 + dy) * pixels + height, (1 + dx) * pixels : (1 + dx) * pixels + width]
        for one, (dy, dx) in zip(padded, moves, strict=True)
    ]
    return torch.stack(cut)


def _flips(bench: Bench, name: str, before: Scores, flipped: dict[str, Scores]) -> Finding:
    what = "Agreement of the measure with that of the mirrored and turned image: 1 − mean squared change / 2 variances."
    threshold = f">= {LEAST_AGREEMENT}"
    first = np.tile(before.measure[name].to_numpy(), len(flipped))
    second = np.concatenate([scores.measure[name].to_numpy() for scores in flipped.values()])
    if np.isnan(first).all():
        return not_judged(NAME, name, what, threshold, "real images have no measure")
    known = bench.real().measure[name]
    if not np.nanstd(known):
        return not_judged(NAME, name, what, threshold, "all real images have the same measure")
    n = len(before)
    # Of all real images: these few may happen to be alike. Floored as an assay floors what it compares with.
    unit = max(float(known.std()), RELATIVE_FLOOR * abs(float(known.mean())))

    def agreement(drawn: Rows) -> float:
        places = (drawn[None] + n * np.arange(len(flipped))[:, None]).ravel()
        return float(1 - np.nanmean((first[places] - second[places]) ** 2) / (2 * unit**2))

    value, low, high = bench.interval_of(agreement, n)
    # A nucleus that is there in one view and not in the other is a disagreement that the measure cannot show.
    lost = float(np.mean(np.isnan(first) != np.isnan(second)))
    details = {
        "nuisance": "flips", "lost_or_found": lost,
        "shift": {key: float((s.measure[name] - before.measure[name]).mean()) / unit for key, s in flipped.items()},
    }  # fmt: skip
    passed = value >= LEAST_AGREEMENT
    reason = "" if passed else "the measure of a crop depends on which way up it lies"
    return Finding(NAME, name, what, value, (low, high), threshold, passed, n, reason, details)


def _shifted(
    bench: Bench, name: str, nuisance: str, tolerated: float, before: Scores, after: dict[float, Scores], spread: float
) -> Finding:
    unit = "px" if nuisance == "shift" else LESIONS[nuisance].unit
    what = f"Shift of the mean reward under {nuisance.replace('_', ' ')} ({tolerated:g} {unit}), in real sd."
    threshold = f"within ±{MOST_SHIFT}"
    moved = {dose: (s.value[name] - before.value[name]).to_numpy() / spread for dose, s in after.items()}
    if np.isnan(moved[tolerated]).all():
        reason = "real images have no value" if before.value[name].isna().all() else "all real images have one value"
        return not_judged(NAME, name, what, threshold, reason)
    mean: dict[float, float] = {dose: float(np.nanmean(change)) for dose, change in moved.items()}
    value, interval = mean[tolerated], bench.interval(moved[tolerated])
    passed, reason = settled(abs(value) <= MOST_SHIFT, interval)
    reason = reason or ("" if passed else "a nuisance at a dose that is common moves this reward")
    details = {
        "nuisance": nuisance, "unit": unit, "tolerated": tolerated, "doses": list(mean), "shift": list(mean.values()),
        "spread_of_change": float(np.nanstd(moved[tolerated])),
    }  # fmt: skip
    return Finding(NAME, name, what, value, interval, threshold, passed, int(np.isfinite(moved[tolerated]).sum()),
                   reason, details)  # fmt: skip
