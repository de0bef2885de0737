"""How much of a spread lies between groups."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def explained(values: Floats, group: npt.NDArray[np.intp]) -> float:
    """Share of the variance of (N, K) values that lies between groups (N,), over all columns together.

    omega squared (Hays 1963), which chance does not raise: about 0 where groups do not matter. NaN with fewer than two
    groups, without a spare image or without variance.
    """
    labels, place, size = np.unique(group, return_inverse=True, return_counts=True)
    if len(labels) < 2 or len(values) <= len(labels):
        return float("nan")
    mean = np.stack([np.bincount(place, column) for column in values.T], 1) / size[:, None]
    total = float(((values - values.mean(0)) ** 2).sum())
    within = float(((values - mean[place]) ** 2).sum())
    if not total > 0:
        return float("nan")
    noise = within / (len(values) - len(labels))
    return float((total - within - (len(labels) - 1) * noise) / (total + noise))


def centred(values: Floats, group: npt.NDArray[np.intp]) -> Floats:
    """(N, K) values less the mean of their group (N,)."""
    _, place, size = np.unique(group, return_inverse=True, return_counts=True)
    mean = np.stack([np.bincount(place, column) for column in values.T], 1) / size[:, None]
    out: Floats = values - mean[place]
    return out
