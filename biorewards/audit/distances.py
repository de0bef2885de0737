"""Distances between sets of images in a feature space, each with the influence of every image on it.

The reference set is a fixed yardstick, the same for every row of a table, so intervals are about the other set. To
first order a distance is a mean over images: value + influence of each, and what is a mean can be bootstrapped
together with everything else (`biorewards.audit.bootstrap`). Where both sets come from one distribution the
intervals come out too wide rather than too narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
#: Neighbours that make a ball round an image (Naeem et al. 2020 take 5).
NEIGHBOURS = 5
#: Rows of a matrix of pairs computed at once.
_ROWS = 1024


class Distance(NamedTuple):
    """value, and influence (N,): how each image moves it, mean 0 over the (weighted) images."""

    value: float
    influence: Floats


class Moments(NamedTuple):
    """mean (D,) and covariance (D, D) of weighted images, and the root of the covariance."""

    mean: Floats
    covariance: Floats
    root: Floats


def moments(x: npt.ArrayLike, weight: Floats | None = None) -> Moments:
    """Mean and unbiased covariance of (N, D). weight: (N,), sums to 1; default: equal."""
    mean, scaled = _centred(x, weight)
    covariance = scaled.T @ scaled
    values, vectors = _eigen(covariance)
    return Moments(mean, covariance, (vectors * np.sqrt(values)) @ vectors.T)


def _centred(x: npt.ArrayLike, weight: Floats | None) -> tuple[Floats, Floats]:
    """Mean (D,), and centred rows scaled so that their product with themselves is the covariance."""
    data = np.asarray(x, np.float64)
    w = np.full(len(data), 1 / len(data)) if weight is None else weight
    mean = w @ data
    return mean, (data - mean) * np.sqrt(w / (1 - float(w @ w)))[:, None]


def _eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues, none below zero, and vectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.clamp(min=0).numpy(), vectors.numpy()


def frechet(x: npt.ArrayLike, reference: Moments, weight: Floats | None = None) -> Distance:
    """Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of (N, D) images to a reference's Gaussian.

    Biased upwards by about 1 / N: compare at equal N only. The influence is the first-order one, the derivative of
    the distance of Gaussians (Bures-Wasserstein): 2 (m1 - m2) for the mean, 1 - T for the covariance, T the optimal
    transport map from S1 to S2.
    """
    data = np.asarray(x, np.float64)
    mean, scaled = _centred(data, weight)
    gap = mean - reference.mean
    # The roots of the eigenvalues of S2^(1/2) S1 S2^(1/2) are the singular values of these rows.
    rows = scaled @ reference.root
    if len(rows) < rows.shape[1]:
        values, left = _eigen(rows @ rows.T)
        kept = values > values.max(initial=0) * 1e-12
        vectors = rows.T @ left[:, kept] / np.sqrt(values[kept])
    else:
        values, vectors = _eigen(rows.T @ rows)
        kept = values > values.max(initial=0) * 1e-12
        vectors = vectors[:, kept]
    value = gap @ gap + (scaled**2).sum() + np.trace(reference.covariance) - 2 * np.sqrt(values).sum()
    # x' T x for every image x. A direction in which the images do not extend has no part in it.
    centred = data - mean
    carried = centred @ (reference.root @ vectors) / values[kept] ** 0.25
    influence = 2 * centred @ gap + (centred**2).sum(1) - (carried**2).sum(1)
    w = np.full(len(data), 1 / len(data)) if weight is None else weight
    return Distance(float(max(value, 0.0)), influence - w @ influence)


class Strata(NamedTuple):
    """number (N,): stratum of each row; share (S,): weight of each stratum, sums to 1. Strata need two rows each."""

    number: Indices
    share: Floats

    @property
    def weight(self) -> Floats:
        """(N,) weight of each row, sums to 1."""
        return self.share[self.number] / np.bincount(self.number, minlength=len(self.share))[self.number]


def self_similarity(x: Tensor, strata: Strata) -> Floats:
    """(N,) mean kernel of each image with the others of its set, never with itself (the unbiased estimate)."""
    weight = torch.from_numpy(strata.weight).float()
    size = np.bincount(strata.number, minlength=len(strata.share))
    own = np.zeros(len(x))
    for s in np.unique(strata.number):
        rows = np.flatnonzero(strata.number == s)
        own[rows] = _kernel_mean(x[rows], x[rows], torch.ones(len(rows)))
    alone = _cubed((x * x).sum(1), x.shape[1]).double().numpy()
    here, share = size[strata.number], strata.share[strata.number]
    whole = _kernel_mean(x, x, weight) - share / here * own + share * (own - alone) / np.maximum(here - 1, 1)
    return np.asarray(whole, np.float64)


def kernel(x: Tensor, strata: Strata, y: Tensor, y_weight: Floats, y_self: float) -> Distance:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased (KID's; Binkowski et al. 2018).

    x: (N, D) float32, y: (M, D) the reference, y_weight (M,) its weights, y_self its mean `self_similarity`. Unbiased:
    sets of different sizes are comparable, and values below zero occur where the sets do not differ.
    """
    within = self_similarity(x, strata)
    across = _kernel_mean(x, y, torch.from_numpy(y_weight).float())
    weight = strata.weight
    value = weight @ within + y_self - 2 * weight @ across
    influence = 2 * (within - across)
    return Distance(float(value), influence - weight @ influence)


def _cubed(product: Tensor, depth: int) -> Tensor:
    return (product / depth + 1) ** 3


def _kernel_mean(x: Tensor, y: Tensor, weight: Tensor) -> Floats:
    parts = [_cubed(part @ y.T, x.shape[1]).double() @ weight.double() for part in torch.split(x, _ROWS)]
    mean: Floats = torch.cat(parts).numpy()
    return mean


class Neighbourhood(NamedTuple):
    """How two sets lie in one another, for N images x and M reference images y.

    precision: (N,) 1 where an image lies in the ball of any reference image (Kynkaanniemi et al. 2019).
    density: (N,) number of balls that it lies in, over k (Naeem et al. 2020). nearest: (N,) distance to the nearest.
    coverage: share of reference images whose ball holds an image; recall: share that lie in the ball of an image.
    """

    precision: Floats
    density: Floats
    nearest: Floats
    coverage: Distance
    recall: Distance


def neighbourhood(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> Neighbourhood:
    """Precision, density, coverage and recall of (N, D) images against (M, D) real ones, at k neighbours.

    The four depend on N and M: compare at equal sizes only. The influence of an image on coverage (recall) is what is
    lost without it: the balls (reference images) that no other image covers; that its absence widens the balls of its
    neighbours is left out.
    """
    n, m = len(x), len(y)
    x_ball, y_ball = radii(x, k), radii(y, k)
    inside = torch.zeros(n)
    nearest = torch.empty(n)
    covered, recalled = torch.zeros(m), torch.zeros(m)
    only_covered, only_recalled = torch.zeros(m), torch.zeros(m)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        d = torch.cdist(x[rows], y)
        nearest[rows] = d.amin(1)
        in_y = (d <= y_ball[None]).float()
        in_x = (d <= x_ball[rows, None]).float()
        inside[rows] = in_y.sum(1)
        covered, recalled = covered + in_y.sum(0), recalled + in_x.sum(0)
        number = torch.arange(rows.start, rows.stop, dtype=torch.float32) + 1
        only_covered, only_recalled = only_covered + number @ in_y, only_recalled + number @ in_x
    return Neighbourhood(
        (inside > 0).double().numpy(),
        (inside / k).double().numpy(),
        nearest.double().numpy(),
        _share(covered, only_covered, n),
        _share(recalled, only_recalled, n),
    )


def _share(times: Tensor, sole: Tensor, n: int) -> Distance:
    """Share of rows hit at least once, and what each of n images adds alone; `sole` holds its number + 1."""
    critical = sole[times == 1].long() - 1
    alone = torch.bincount(critical, minlength=n).double().numpy() / len(times)
    influence = n * alone
    return Distance(float((times > 0).float().mean()), influence - influence.mean())


def radii(x: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """(N,) distance of each image to its k-th nearest other image of the set."""
    k = min(k, len(x) - 1)
    parts = []
    for start in range(0, len(x), _ROWS):
        d = torch.cdist(x[start : start + _ROWS], x)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf
        parts.append(d.kthvalue(k, 1).values)
    return torch.cat(parts)


def likeness(x: Tensor, y: Tensor, same: Indices | None = None) -> tuple[Floats, Indices]:
    """Largest correlation of each thumbnail with any of a pool, in any of eight orientations, and which it is.

    x: (N, C, S, S), y: (M, C, S, S), as `encoder.thumbnails` makes them. same: (N,) row of y that is the image itself
    and is left out. Returns (N,) in [-1, 1] and (N,) rows of y; -1 and 0 for an empty pool.
    """
    best = torch.full((len(x),), -1.0)
    which = torch.zeros(len(x), dtype=torch.int64)
    if not len(y):
        return best.double().numpy(), which.numpy()
    pool = y.flatten(1).T.contiguous()
    turned = [torch.rot90(view, turns, (2, 3)).flatten(1) for view in (x, x.flip(3)) for turns in range(4)]
    for view in turned:
        for start in range(0, len(x), _ROWS):
            rows = slice(start, min(start + _ROWS, len(x)))
            found = view[rows] @ pool
            if same is not None:
                found[torch.arange(len(found)), torch.from_numpy(same[rows])] = -1.0
            value, place = found.max(1)
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            which[rows] = torch.where(better, place, which[rows])
    return best.double().numpy(), which.numpy()
