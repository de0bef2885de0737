"""What fills a cell: noise textures, filaments, dots."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from biorewards.phantom.cells import Float, Int, Real

#: Width in px of the noise textures and side of the periodic tile that they are cut from.
GRAINS = {"white": 0.0, "fine": 1.1, "mid": 3.0, "coarse": 14.0}
TILE = 640


@lru_cache(maxsize=8)
def tile(grain: str) -> Float:
    """Periodic Gaussian noise of one grain, (TILE, TILE), mean 0, sd 1; the same in every run.

    Windows of a stored tile stand in for fresh noise: drawing and filtering it anew would cost more than all cells.
    """
    rng = np.random.default_rng([20211, list(GRAINS).index(grain)])
    sigma = GRAINS[grain]
    frequency = np.hypot(fft.fftfreq(TILE)[:, None], fft.rfftfreq(TILE)[None])
    noise: Real = rng.standard_normal((TILE, TILE))
    if sigma:
        band = np.exp(-2 * (np.pi * sigma * frequency) ** 2) - np.exp(-2 * (np.pi * 3 * sigma * frequency) ** 2)
        noise = fft.irfft2(fft.rfft2(noise) * band, s=(TILE, TILE))
    scaled: Float = ((noise - noise.mean()) / noise.std()).astype(np.float32)
    return scaled


@lru_cache(maxsize=8)
def doubled(grain: str) -> Float:
    """The tile of one grain, two by two, so that every window of up to TILE px is a plain slice."""
    both = np.tile(tile(grain), (2, 2))
    both.flags.writeable = False
    return both


def noise(rng: np.random.Generator, grain: str, shape: tuple[int, ...]) -> Float:
    """A random window of the tile of one grain, (H, W), read-only; the tile repeats every TILE px."""
    y, x = rng.integers(TILE, size=2)
    if max(shape) > TILE:
        rows, columns = (y + np.arange(shape[0])) % TILE, (x + np.arange(shape[1])) % TILE
        window: Float = tile(grain)[rows][:, columns]
        return window
    return doubled(grain)[y : y + shape[0], x : x + shape[1]]


class Grain(NamedTuple):
    """Noise of three widths over a canvas, each (H, W)."""

    fine: Float
    mid: Float
    coarse: Float


class Points(NamedTuple):
    """Points of light: y, x (px) and weight, each (n,) float32."""

    y: Float
    x: Float
    weight: Float


def splat(points: list[Points], shape: tuple[int, ...]) -> Float:
    """Points drawn as light on a canvas (H, W), each shared between the four pixels round it."""
    y, x, weight = (np.concatenate(part) for part in zip(*points, strict=True))
    height, width = shape
    keep = (y >= 0) & (x >= 0) & (y < height - 1) & (x < width - 1)
    y, x, weight = y[keep], x[keep], weight[keep]
    row, column = y.astype(np.intp), x.astype(np.intp)
    down, right = y - row.astype(np.float32), x - column.astype(np.float32)
    at = row * width + column
    low, high = (1 - down) * weight, down * weight
    corner = np.concatenate([at, at + 1, at + width, at + width + 1])
    share = np.concatenate([low * (1 - right), low * right, high * (1 - right), high * right])
    canvas: Float = np.bincount(corner, share, height * width).reshape(shape).astype(np.float32)
    return canvas


def threads(
    rng: np.random.Generator,
    start: Float,
    heading: Real,
    who: NDArray[np.intp],
    weight: Real,
    wobble: float,
    labels: Int,
    *,
    steps: int,
    step: float = 1.8,
) -> Points:
    """Filaments as random walks with persistent direction, seen only inside their own cell (label `who` + 1).

    start (f, 2) px, heading (f,) radians, who (f,) row of the cell, weight (f,), wobble: sd of a turn, radians.
    """
    turns = rng.standard_normal((len(start), steps), np.float32)
    np.cumsum(turns, axis=1, out=turns)
    turns *= np.float32(wobble)
    turns += heading.astype(np.float32)[:, None]
    y = np.cumsum(np.sin(turns), axis=1) * np.float32(step) + start[:, :1].astype(np.float32)
    x = np.cumsum(np.cos(turns), axis=1) * np.float32(step) + start[:, 1:].astype(np.float32)
    height, width = labels.shape
    row = np.clip(y, 0, height - 1).astype(np.intp)
    column = np.clip(x, 0, width - 1).astype(np.intp)
    own = labels.ravel()[row * width + column] == (who + 1)[:, None]
    return Points(y[own], x[own], np.broadcast_to(weight.astype(np.float32)[:, None], own.shape)[own])


def disc_points(rng: np.random.Generator, radius: Real) -> Float:
    """One random point (n, 2) in each disc of radius (n,), from its centre."""
    away = np.sqrt(rng.random(len(radius))) * radius
    turn = rng.random(len(radius)) * 2 * np.pi
    points: Float = np.stack([away * np.sin(turn), away * np.cos(turn)], 1).astype(np.float32)
    return points
