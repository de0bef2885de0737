"""Statistics that several checks share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, rankdata

Floats = npt.NDArray[np.float64]


def auroc(good: Floats, bad: Floats) -> float:
    """Probability that one of `good` lies above one of `bad`, ties counting half; NaN where either is empty."""
    good, bad = good[~np.isnan(good)], bad[~np.isnan(bad)]
    if not len(good) or not len(bad):
        return float("nan")
    ranks = rankdata(np.concatenate([good, bad]))[: len(good)]
    return float((ranks.sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def rank_correlations(values: Floats) -> Floats:
    """(K, K) Spearman correlations of the columns of (N, K); 0 between columns of which one does not vary."""
    ranks = rankdata(values, axis=0)
    ranks = ranks - ranks.mean(0)
    norm = np.sqrt((ranks**2).sum(0))
    unit = ranks / np.where(norm > 0, norm, 1)
    found: Floats = unit.T @ unit
    np.fill_diagonal(found, 1.0)
    return found


def share_interval(hits: npt.ArrayLike) -> tuple[float, float]:
    """95 % interval of a share of (N,) yes or no (Wilson 1927): none of N still leaves room, which resampling hides."""
    found = np.asarray(hits, bool)
    if not len(found):
        return float("nan"), float("nan")
    ends = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)
