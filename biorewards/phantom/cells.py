"""Where cells lie and what shape they have: positions, outlines, territories, nuclei. Pixels are the 96 px crop's.

Outlines are radii over `N_ANGLES` directions; a pixel's score in a cell is its distance from the cell's centre
divided by the outline's radius in that direction, so that a score below 1 lies inside.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as connected

Float = NDArray[np.float32]
Real = NDArray[np.floating[Any]]
Int = NDArray[np.int32]
Window = tuple[slice, slice]

N_ANGLES = 512
REACH = 150  # px: largest radius that an outline may have
ANGLES = np.arange(N_ANGLES, dtype=np.float32) * np.float32(2 * np.pi / N_ANGLES)
HARMONICS = np.arange(2, 8)
_WAVES = np.concatenate([np.cos(np.outer(HARMONICS, ANGLES)), np.sin(np.outer(HARMONICS, ANGLES))]).astype(np.float32)


@lru_cache(maxsize=1)
def polar() -> tuple[Float, NDArray[np.intp]]:
    """Distance from the middle pixel and index of direction, both (2 REACH + 1, 2 REACH + 1)."""
    y, x = np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1].astype(np.float32)
    turn = np.arctan2(y, x) / np.float32(2 * np.pi)
    return np.hypot(y, x), np.rint(turn * N_ANGLES).astype(np.intp) % N_ANGLES


def window(y: int, x: int, half: int, shape: tuple[int, ...]) -> tuple[Window, Window] | None:
    """The square of side 2 half + 1 round (y, x), cut to `shape`: (place in the canvas, place in a polar grid)."""
    half = min(half, REACH)
    y0, y1, x0, x1 = max(y - half, 0), min(y + half + 1, shape[0]), max(x - half, 0), min(x + half + 1, shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    dy, dx = REACH - y, REACH - x
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 + dy, y1 + dy), slice(x0 + dx, x1 + dx))


def scatter(
    rng: np.random.Generator, low: float, high: NDArray[np.float64], n: int, spacing: float, touching: float
) -> Float:
    """At most n positions (n, 2) in [low, high), in loose clusters, seldom nearer than `spacing` px.

    A share `touching` may come within about half the spacing: their nuclei touch or overlap.
    """
    n_try = 6 * n + 10
    points = (low + (high - low) * rng.random((n_try, 2))).astype(np.float32)
    # Clusters: candidates near a few attractors are tried first.
    hubs = low + (high - low) * rng.random((max(1, n // 7), 2))
    gap = np.sqrt(((points[:, None] - hubs[None]) ** 2).sum(2).min(1))
    order = np.argsort(gap / (2.2 * spacing) + 1.6 * rng.random(n_try))
    points = points[order]
    limit = spacing * rng.uniform(0.8, 1.2, n_try)
    limit[rng.random(n_try) < touching] *= 0.55
    y, x = points.T
    distance = np.hypot(y[:, None] - y[None], x[:, None] - x[None])
    free = np.ones(n_try, bool)
    chosen = []
    for i in range(n_try):
        if free[i]:
            chosen.append(i)
            if len(chosen) == n:
                break
            free &= distance[i] > limit
    return points[chosen]


def outlines(
    rng: np.random.Generator,
    elongation: Real,
    irregular: Real,
    concave: Float | None = None,
    long_axis: Real | None = None,
) -> Float:
    """Radii (n, N_ANGLES) of n closed outlines of area pi (multiply by the wanted radius).

    elongation, irregular (n,): log amplitudes of the second and of the higher harmonics. concave (n,): depth of
    the arcs between three to six arms. long_axis (n,): direction of the long axis, drawn when None.
    """
    n = len(elongation)
    axis = rng.random(n) * np.pi if long_axis is None else long_axis
    size = np.abs(rng.normal(0, 1, (n, len(HARMONICS)))) * irregular[:, None] * (3.0 / HARMONICS)
    size[:, 0] = elongation * rng.uniform(0.2, 1.6, n)
    phase = rng.random((n, len(HARMONICS))) * 2 * np.pi
    phase[:, 0] = -2 * axis
    log_r = np.concatenate([size * np.cos(phase), -size * np.sin(phase)], 1).astype(np.float32) @ _WAVES
    radii = np.exp(log_r)
    if concave is not None:
        arms = [_arms(rng, float(depth)) for depth in concave * rng.uniform(0.5, 1.4, n)]
        radii = radii * np.array(arms, np.float32).reshape(n, N_ANGLES)
    unit: Float = (radii / np.sqrt((radii**2).mean(1, keepdims=True))).astype(np.float32)
    return unit


def _arms(rng: np.random.Generator, depth: float) -> Float:
    """Factor (N_ANGLES,) on a radius: two to six arms of unequal length, shallow arcs of unequal width between."""
    n = int(rng.integers(2, 7))
    gaps = rng.uniform(0.4, 1.6, n)
    tips = np.concatenate([[0], np.cumsum(gaps)]) * (N_ANGLES / gaps.sum())
    reach = 1 + depth * rng.uniform(-0.5, 0.5, n)
    position = np.arange(N_ANGLES)
    arm = np.searchsorted(tips, position, side="right") - 1
    share = (position - tips[arm]) / (tips[arm + 1] - tips[arm])
    sag = np.sqrt(np.sin(np.pi * share) ** 2 + 0.02) * np.minimum(1, (tips[arm + 1] - tips[arm]) * n / N_ANGLES)
    length = reach[arm] * (1 - share) + reach[(arm + 1) % n] * share
    radii: Float = np.roll(length * (1 - min(depth, 0.85) * sag), rng.integers(N_ANGLES)).astype(np.float32)
    return radii


def territories(centres: Int, radii: Float, shape: tuple[int, int], ragged: Float) -> tuple[Int, Float]:
    """Who owns each pixel: labels (H, W) int32 (row of `centres` + 1, 0 = nobody) and score (H, W), below 1 inside.

    Each pixel goes to the cell with the lowest score, so borders between neighbours follow both outlines.
    `ragged` (H, W) is added to the scores: it frays the free edges and leaves borders where they are.
    """
    distance, direction = polar()
    score = np.full(shape, 9.0, np.float32)
    labels = np.zeros(shape, np.int32)
    reach = np.ceil(radii.max(1) * 1.12).astype(int)
    for i, (y, x) in enumerate(centres):
        places = window(y, x, int(reach[i]), shape)
        if places is None:
            continue
        here, grid = places
        own = distance[grid] * (1 / radii[i])[direction[grid]]
        best = score[here]
        nearer = own < best
        np.minimum(best, own, out=best)
        np.copyto(labels[here], i + 1, where=nearer)
    score += ragged
    labels[score >= 1] = 0
    _drop_fragments(labels)
    return labels, score


def _drop_fragments(labels: Int) -> None:
    """Keep the largest connected part of each label, in place: a cell is one piece."""
    parts = connected(labels, background=0, connectivity=1)
    size = np.bincount(parts.ravel())
    first = _any_pixel(parts, len(size))
    owner = labels.ravel()[first]
    largest = np.zeros(labels.max() + 1, np.int64)
    np.maximum.at(largest, owner[1:], size[1:])
    small = size < largest[owner]
    small[0] = False
    if small.any():
        labels[small[parts]] = 0


def _any_pixel(parts: Int, n: int) -> NDArray[np.intp]:
    """Flat index of one pixel of each part, (n,)."""
    first = np.zeros(n, np.intp)
    first[parts.ravel()] = np.arange(parts.size)
    return first
