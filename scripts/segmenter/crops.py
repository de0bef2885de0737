"""Training crops: windows of the stored samples, turned, scaled and disturbed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import sources
import torch
from torch import Tensor
from torch.nn import functional as F

#: Side of a training crop at the working scale, px: small, so that objects cut by the border are as common as in use.
CROP = 64
#: Median nucleus of a training crop before scale augmentation, px: the scale `CompactSegmenter` works at.
WORKING_DIAMETER = 18.0
#: Share of the phantom crops that are windows of the stored sample, only flipped and turned by quarters: the scale and
#: sharpness in which phantoms are scored, and outlines that no resampling has smoothed.
EXACT = 0.4


class Packed(NamedTuple):
    """A stored sample: image (3, H, W) float16; labels (2, H, W) int16 of nuclei and cells; weight (2, H, W) uint8,
    in halves; diameter of a nucleus, px."""

    image: Tensor
    labels: Tensor
    weight: Tensor
    diameter: float


class Crops(NamedTuple):
    """A batch at twice the working scale, S = 2 x CROP: image (B, 3, S, S), labels and weight (B, 2, S, S), float32;
    moved (B,) bool, whose DNA belongs to other cells, so that the flow of the cells is unknown."""

    image: Tensor
    labels: Tensor
    weight: Tensor
    moved: Tensor


def pack(sample: sources.Sample) -> Packed:
    return Packed(
        torch.from_numpy(sample.image).half(),
        torch.from_numpy(np.stack([sample.nuclei, sample.cells]).astype(np.int16)),
        torch.from_numpy(np.stack([sample.nucleus_weight, sample.cell_weight]) * 2).to(torch.uint8),
        sample.diameter,
    )


def draw_crop(sample: Packed, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random window, turned, flipped and scaled: image, labels, weight as in `Crops`, weight 0 outside the sample."""
    height, width = sample.image.shape[-2:]
    side = 2 * CROP
    scale = float(np.clip(rng.lognormal(0, 0.3), 0.5, 2.0)) * 2 * WORKING_DIAMETER / sample.diameter
    angle, flip = rng.uniform(0, 2 * math.pi), 1.0 if rng.random() < 0.5 else -1.0
    if sample.diameter > sources.DIAMETER and rng.random() < 0.5:
        angle = rng.integers(4) * math.pi / 2  # turned by other angles, exact outlines are resampled ones
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    # Source pixel = centre + M (output pixel - middle); columns of M are x then y.
    m = np.array([[c * flip, -s], [s * flip, c]])
    reach = side / 2 / scale
    cx = rng.uniform(min(reach, width / 2), max(width - reach, width / 2))
    cy = rng.uniform(min(reach, height / 2), max(height - reach, height / 2))
    # Only the window that the turned crop can touch is converted: half its diagonal, and 2 px for interpolation.
    half = math.ceil(reach * math.sqrt(2)) + 2
    y0, y1 = max(0, math.floor(cy) - half), min(height, math.ceil(cy) + half)
    x0, x1 = max(0, math.floor(cx) - half), min(width, math.ceil(cx) + half)
    wide, high = x1 - x0, y1 - y0
    theta = np.array(
        [
            [m[0, 0] * side / wide, m[0, 1] * side / wide, 2 * (cx - x0) / wide - 1],
            [m[1, 0] * side / high, m[1, 1] * side / high, 2 * (cy - y0) / high - 1],
        ]
    )
    grid = F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, side, side], align_corners=False)
    window = (slice(None), slice(y0, y1), slice(x0, x1))
    exact = torch.cat([sample.labels[window].float(), sample.weight[window].float() / 2])[None]
    image = F.grid_sample(
        sample.image[window].float()[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    exact = F.grid_sample(exact, grid, mode="nearest", padding_mode="zeros", align_corners=False)[0]
    return image[0], exact[:2], exact[2:]


def window(sample: Packed, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A window of the sample as it is, flipped and turned: image, labels, weight as `draw_crop` gives them."""
    side = 2 * CROP
    y, x = (int(rng.integers(n - side + 1)) for n in sample.image.shape[-2:])
    planes = [sample.image.float(), sample.labels.float(), sample.weight.float() / 2]
    turn, flip = int(rng.integers(4)), rng.random() < 0.5
    cut = [torch.rot90(p[:, y : y + side, x : x + side], turn, (1, 2)) for p in planes]
    image, labels, weight = (p.flip(2) if flip else p for p in cut)
    return image, labels.clone(), weight.clone()


def draw(kind: str, samples: list[Packed], rng: np.random.Generator, exact: float) -> tuple[Tensor, Tensor, Tensor]:
    """A crop of a sample of this kind; `exact` is the share of phantoms that come as they are."""
    sample = samples[int(rng.integers(len(samples)))]
    return window(sample, rng) if kind == "phantom" and rng.random() < exact else draw_crop(sample, rng)


def disturb(crops: Crops, rng: np.random.Generator, joint: bool, blurred: float = 0.3) -> Crops:
    """Photometric changes and lost channels; `blurred` is the share of crops that lose sharpness."""
    image, labels, weight, moved = crops
    b, side = len(image), image.shape[-1]
    random = torch.Generator().manual_seed(int(rng.integers(2**31)))
    pick = lambda p: torch.from_numpy(rng.random(b) < p)  # noqa: E731
    gain = torch.from_numpy(rng.lognormal(0, 0.3, (b, 3, 1, 1))).float()
    gamma = torch.from_numpy(rng.lognormal(0, 0.2, (b, 3, 1, 1))).float()
    offset = torch.from_numpy(rng.normal(0, 0.04, (b, 3, 1, 1))).float()
    image = torch.where(image > 0, image.clamp_min(1e-6) ** gamma, image) * gain + offset
    ramp = torch.linspace(-1, 1, side)
    tilt = torch.from_numpy(rng.normal(0, 0.08, (b, 3, 2))).float()
    image = image * (1 + tilt[..., :1, None] * ramp[:, None] + tilt[..., 1:, None] * ramp)
    if (soft_ones := pick(blurred)).any():
        sigma = rng.uniform(0.6, 2.4)
        taps = torch.exp(-(torch.arange(-7, 8).float() ** 2) / (2 * sigma**2))
        taps = taps / taps.sum()
        soft = F.conv2d(image[soft_ones].flatten(0, 1)[:, None], taps.view(1, 1, 15, 1), padding=(7, 0))
        soft = F.conv2d(soft, taps.view(1, 1, 1, 15), padding=(0, 7))
        image[soft_ones] = soft.view(-1, 3, side, side)
    level = torch.from_numpy(np.where(rng.random((b, 3)) < 0.6, rng.exponential(0.05, (b, 3)), 0)).float()
    image = image + level[..., None, None] * torch.randn(image.shape, generator=random)
    if joint:
        swap = pick(0.3)
        image[swap] = image[swap][:, [1, 0, 2]]
        lone = pick(0.12)  # one cytoplasm channel only, in the first place
        image[lone, 1] = 0
        none = pick(0.06)  # a nucleus without cytoplasm evidence is no cell
        image[none, :2] = 0.03 * torch.randn(image[none, :2].shape, generator=random)
        labels[none, 1] = 0
        lost = pick(0.12) & ~none  # no DNA: cells must be told apart by the cytoplasm
        image[lost, 2] = 0.0
        labels[lost, 0] = 0
        moved = pick(0.05) & ~none & ~lost  # DNA that belongs to other cells: the cell foreground stays what it is
        shift = (side // 2, side // 3)
        image[moved, 2] = torch.roll(image[moved, 2], shift, (1, 2))
        for plane in (labels, weight):
            plane[moved, 0] = torch.roll(plane[moved, 0], shift, (1, 2))
    return Crops(image, labels, weight, moved)
