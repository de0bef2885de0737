"""Best-of-N without drawing N: how likely each image of a pool is to be the one that is kept."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def selection_weights(total: Floats, n: int) -> Floats:
    """Chance of each of M samples (P, M) of being the best of n drawn without replacement; rows sum to 1.

    The j-th best is the best of the draw with chance C(M - j, n - 1) / C(M, n): what is averaged with these weights is
    the unbiased estimate over all subsets of n. Equal totals share their chances. Samples without a total (NaN) come
    last and are never chosen; a row without any total is NaN. Raises ValueError unless 1 <= n <= M.
    """
    p, m = total.shape
    if not 1 <= n <= m:
        raise ValueError(f"n={n}: from 1 to the {m} samples of the pool")
    j = np.arange(1, m + 1)
    chance = np.array([math.comb(int(m - k), n - 1) / math.comb(m, n) for k in j])
    out = np.zeros((p, m))
    for row, values in enumerate(total):
        there = np.isfinite(values)
        order = np.argsort(-np.where(there, values, -np.inf), kind="stable")
        ranked = values[order]
        weight = np.where(there[order], chance, 0.0)
        _, tie = np.unique(np.where(there[order], ranked, np.nan), return_inverse=True)
        weight = (np.bincount(tie, weight) / np.bincount(tie))[tie]
        out[row, order] = weight / weight.sum() if weight.sum() > 0 else np.nan
    return out
