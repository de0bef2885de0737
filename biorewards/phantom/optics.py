"""From light to grey levels: plate, point spread, haze, pixel size, camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from biorewards.phantom.cells import Float
from biorewards.phantom.textures import noise


@dataclass(frozen=True)
class Plate:
    """What a plate does to all its images (staining, seeding, lamp, focus, camera). Defaults: a typical plate."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # stain times lamp: actin, tubulin, DAPI
    offset: tuple[float, float, float] = (5.0, 5.0, 4.0)  # grey levels of camera offset and medium
    shading: tuple[float, float] = (0.0, 0.0)  # lamp off centre: relative slope in y and x over a field
    sigma: float = 0.9  # px, in focus
    haze: float = 0.12  # share of light spread far
    shot: float = 0.20  # sd of shot noise at grey level 1
    read: float = 0.7  # sd of read noise, grey levels
    cell_area: float = 1.0
    density: float = 1.0
    ratio: float = 1.0  # contrast of filaments against soluble stain


def draw_plate(rng: np.random.Generator) -> Plate:
    """A plate as they vary from day to day."""
    return Plate(
        gain=tuple(np.exp(rng.normal(0, 0.13, 3)).tolist()),
        offset=tuple(rng.uniform(2.5, 8, 3).tolist()),
        shading=tuple(rng.normal(0, 0.05, 2).tolist()),
        sigma=float(rng.uniform(0.72, 1.08)),
        haze=float(rng.uniform(0.06, 0.18)),
        shot=float(rng.uniform(0.14, 0.28)),
        read=float(rng.uniform(0.4, 1.1)),
        cell_area=float(np.exp(rng.normal(0, 0.05))),
        density=float(np.exp(rng.normal(0, 0.1))),
        ratio=float(np.exp(rng.normal(0, 0.12))),
    )


def spread(layers: Float, sigmas: list[float], haze: float, reach: float = 11.0) -> Float:
    """Sum of layers (L, C, H, W), each blurred by its sigma (px) and hazed over `reach` px: (C, H, W)."""
    height, width = layers.shape[-2:]
    square_y = 2 * (np.pi * fft.fftfreq(height)) ** 2
    square_x = 2 * (np.pi * fft.rfftfreq(width)) ** 2

    def gaussian(sigma: float) -> Float:
        transfer: Float = np.outer(np.exp(-(sigma**2) * square_y), np.exp(-(sigma**2) * square_x)).astype(np.float32)
        return transfer

    halo = haze * gaussian(reach)
    total = None
    for layer, sigma in zip(layers, sigmas, strict=True):
        transfer = (1 - haze) * gaussian(sigma) + halo
        part = fft.rfft2(layer, axes=(-2, -1)) * transfer
        total = part if total is None else total + part
    image: Float = fft.irfft2(total, s=(height, width), axes=(-2, -1))
    return np.maximum(image, 0)


def coarser(images: Float, factor: float) -> Float:
    """Area means of images (C, H, W) on pixels `factor` (>= 1) times larger: (C, H / factor, W / factor)."""
    if factor == 1:
        return images
    rows, columns = (_area_matrix(n, factor) for n in images.shape[-2:])
    means: Float = (rows @ images @ columns.T).astype(np.float32, copy=False)
    return means


def _area_matrix(n: int, factor: float) -> Float:
    m = round(n / factor)
    edge = np.arange(m + 1) * factor
    pixel = np.arange(n)
    share = np.minimum(edge[1:, None], pixel + 1) - np.maximum(edge[:-1, None], pixel)
    matrix: Float = (np.clip(share, 0, None) / factor).astype(np.float32)
    return matrix


def camera(rng: np.random.Generator, light: Float, plate: Plate) -> NDArray[np.uint8]:
    """Grey levels (H, W, C) uint8 of expected light (C, H, W) in grey levels above the offset."""
    light += np.asarray(plate.offset, np.float32)[:, None, None]
    spread = np.sqrt(plate.shot**2 * light + plate.read**2)
    for channel in range(len(light)):
        spread[channel] *= noise(rng, "white", light.shape[1:])
    light += spread
    return np.clip(np.rint(light), 0, 255).astype(np.uint8).transpose(1, 2, 0)
