"""What a crop looks like in plain numbers, without any network or mask: levels, spectrum, rings, texture.

Second judges and sentinels stand on these, so that they share nothing with the verifiers that they watch.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rings of the power spectrum, from coarse to fine.
BANDS = 5
QUANTILES = (0.1, 0.5, 0.9, 0.99)
#: Edges of rings round the middle of a crop, in half sides; crops are often centred on a cell.
RINGS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
#: Widths, px, of the means between which details of one size lie.
WIDTHS = (1, 3, 7, 15)


def pixel_features(images: Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1] to (B, D): of each channel mean, spread, four quantiles and the log power of five rings of
    its spectrum; correlations between channels. D = 11 C + C (C - 1) / 2."""
    x = images.float()
    flat = x.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    spread = centred.square().mean(2).sqrt()
    quantiles = torch.quantile(flat, torch.tensor(QUANTILES, device=x.device), 2).permute(1, 2, 0)
    height, width = x.shape[2:]
    power = torch.fft.rfft2(centred.view_as(x), norm="ortho").abs().square()
    ring = torch.sqrt(torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).to(x.device)
    edges = torch.logspace(math.log10(1 / min(height, width)), math.log10(0.5), BANDS + 1, device=x.device)
    edges[-1] = 1.0
    rings = [power[..., (ring >= a) & (ring < b)].mean(-1) for a, b in pairwise(edges)]
    levels = [torch.log(band + 1e-6) for band in rings]
    unit = centred / (spread[..., None] + 1e-4)
    joint = torch.einsum("bcp,bdp->bcd", unit, unit) / flat.shape[2]
    upper = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    parts = [
        flat.mean(2),
        spread,
        quantiles.flatten(1),
        torch.stack(levels, 2).flatten(1),
        joint[:, upper[0], upper[1]],
    ]
    return torch.cat(parts, 1).nan_to_num(0.0)


def ring_features(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 12 C): mean and spread of each channel in six rings round the middle of the crop."""
    x = images.float()
    height, width = x.shape[2:]
    y = (torch.arange(height, device=x.device) - (height - 1) / 2) / (height / 2)
    across = (torch.arange(width, device=x.device) - (width - 1) / 2) / (width / 2)
    radius = torch.sqrt(y[:, None] ** 2 + across[None] ** 2)
    rings = torch.stack([((radius >= a) & (radius < b)).float() for a, b in pairwise(RINGS)])
    rings = (rings / rings.sum((1, 2), keepdim=True).clamp(min=1)).flatten(1)
    flat = x.flatten(2)
    mean = flat @ rings.T
    spread = (flat.square() @ rings.T - mean.square()).clamp(min=1e-8).sqrt()
    return torch.cat([mean.flatten(1), spread.flatten(1)], 1)


def texture_features(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, D): of details of three sizes the log spread, skewness and log kurtosis of each channel and
    the correlations between channels. D = 9 C + 3 C (C - 1) / 2."""
    x = images.float()
    levels = [F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in WIDTHS]
    upper = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    parts = []
    for fine, coarse in pairwise(levels):
        detail = (fine - coarse).flatten(2)
        detail = detail - detail.mean(2, keepdim=True)
        spread = detail.square().mean(2).sqrt()
        unit = detail / (spread[..., None] + 1e-4)
        joint = torch.einsum("bcp,bdp->bcd", unit, unit) / detail.shape[2]
        cube = unit.square() * unit
        parts += [torch.log(spread + 1e-4), cube.mean(2), torch.log1p((cube * unit).mean(2))]
        parts.append(joint[:, upper[0], upper[1]])
    return torch.cat(parts, 1)
