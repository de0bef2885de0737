"""Check 6: counts follow the number of objects in proportion, as a dilution series shows.

The design is that of ISO 20391-2:2019 (cell counting, part 2): several dilutions of one sample, several replicates of
each, and three figures that need no reference count: R2 of the proportional fit, how far the means lie off
proportionality, and the spread of replicates. Here a dilution erases a share of the objects; a replicate is the pooled
count of several crops, since a crop holds only a few. What was left is known from the masks, so the slope says
accuracy, too, which the standard leaves open.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.lesions_response import responses

NAME = "counting"
#: reward -> the lesion that dilutes what it counts
DILUTED = {"nucleus_count": "erase_nuclei", "cytoplasm_count": "erase_cytoplasm"}
#: Crops of one replicate: about twenty objects.
CROPS = 8
FEWEST_REPLICATES = 3
#: The line explains at least this share of the variance of counts; no dilution's mean lies further off it than this
#: share of the undiluted count; replicates spread by at most this share of their mean. Counting chambers reach 0.95,
#: 10 % and 15 % in practice.
LEAST_R2, MOST_OFF, MOST_CV, MOST_BIAS = 0.95, 0.1, 0.15, 0.15


def counting(bench: Bench) -> list[Finding]:
    """R2, proportionality, CV and slope of every count on trial, from a dilution series of at least six steps."""
    findings = []
    for name in bench.suite.rewards:
        if name in DILUTED:
            findings += _series(bench, name, DILUTED[name])
    return findings


def _series(bench: Bench, name: str, lesion: str) -> list[Finding]:
    found = responses(bench)[lesion]
    if isinstance(found, str):
        return [not_judged(NAME, name, "Dilution series of the count.", f"R2 >= {LEAST_R2}", found)]
    n = found.value[name].shape[1]
    if n < CROPS * FEWEST_REPLICATES:
        reason = f"{n} images are too few: {FEWEST_REPLICATES} replicates of {CROPS} crops are wanted"
        return [not_judged(NAME, name, "Dilution series of the count.", f"R2 >= {LEAST_R2}", reason)]
    # Nothing found is a count of none, not a missing value.
    counted, true = np.nan_to_num(found.measure[name]), found.truth[name]

    def pooled(drawn: Rows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(D + 1, replicates) true and counted objects of groups of crops; the last dilution, of none, left out."""
        groups = drawn[: len(drawn) // CROPS * CROPS].reshape(-1, CROPS)
        x, y = true[:, groups].sum(2), counted[:, groups].sum(2)
        some = x.sum(1) > 0
        return x[some], y[some]

    asked = [
        ("R2 of counted against true objects over the dilutions (line through 0).", f">= {LEAST_R2}", r2),
        (
            "Largest distance of a dilution's mean count from proportionality, share of the undiluted count.",
            f"<= {MOST_OFF}",
            off_proportion,
        ),
        ("Coefficient of variation of replicate counts at equal true counts.", f"<= {MOST_CV}", variation),
        ("Counted objects per true object (slope of the proportional fit).", f"within 1 ± {MOST_BIAS}", slope),
    ]
    x, y = pooled(np.arange(n))
    details = {
        "lesion": lesion, "true": x.sum(1).tolist(), "counted": y.sum(1).tolist(), "replicates": x.shape[1],
        "exact_masks": bench.exact_masks,
    }  # fmt: skip
    findings = []
    for k, (what, threshold, statistic) in enumerate(asked):
        value, low, high = bench.interval_of(lambda drawn, of=statistic: of(*pooled(drawn)), n, resamples=200)  # type: ignore[misc]
        passed = (value >= LEAST_R2, value <= MOST_OFF, value <= MOST_CV, abs(value - 1) <= MOST_BIAS)[k]
        reason = "" if passed else "objects are missed, split or merged at some density"
        findings.append(Finding(NAME, name, what, value, (low, high), threshold, passed, n, reason, details))
        details = {}
    return findings


Counts = npt.NDArray[np.float64]


def slope(x: Counts, y: Counts) -> float:
    """Counted objects per true one: the fit through 0 whose weights are right for counts (variance = mean)."""
    return float(y.sum() / x.sum()) if x.sum() else math.nan


def r2(x: Counts, y: Counts) -> float:
    """Share of the variance of counts (D, replicates) that the proportional line explains."""
    spread = float(((y - y.mean()) ** 2).sum())
    return float(1 - ((y - slope(x, y) * x) ** 2).sum() / spread) if spread else math.nan


def off_proportion(x: Counts, y: Counts) -> float:
    """Largest distance of a dilution's mean from the line, over the line's value without dilution (the first row)."""
    full = slope(x, y) * float(x[0].mean())
    return float(np.abs(y.mean(1) - slope(x, y) * x.mean(1)).max() / full) if full else math.nan


def variation(x: Counts, y: Counts) -> float:
    """Root mean square over dilutions of the CV of counted per true, where a replicate holds at least five objects."""
    ratio = np.where(x >= 5, y / np.maximum(x, 1), np.nan)
    enough = (~np.isnan(ratio)).sum(1) >= FEWEST_REPLICATES
    if not enough.any():
        return math.nan
    ratio = ratio[enough]
    return float(np.sqrt(np.mean((np.nanstd(ratio, 1, ddof=1) / np.nanmean(ratio, 1)) ** 2)))
