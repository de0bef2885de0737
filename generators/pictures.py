"""Grids of images to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from biorewards.io.tables import atomic

#: Colour of each channel up to three, then of further ones: red, green, blue, and their mixtures (CellFlux on rxrx1).
COLOURS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
#: Px between images, the share of pixels that may be brighter than white, and the least side of an image, about.
GAP, BRIGHTEST, SHOWN_SIDE = 2, 0.003, 96

Picture = npt.NDArray[np.uint8]


def coloured(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3, H, W): one channel grey, more by `COLOURS` (from the seventh on: left out)."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    colours = torch.tensor(COLOURS[: images.shape[1]], dtype=images.dtype)
    return torch.einsum("nchw,ck->nkhw", images[:, : len(colours)], colours)


def mosaic(rows: Sequence[Tensor], gap_after: int = 1) -> Picture:
    """Rows of images (N, C, H, W) in [0, 1], all of one size, as one picture (height, width, 3).

    gap_after: images of each row before a wider gap. Images below 96 px are shown larger by a whole factor. Every
    channel is stretched so that its brightest 0.3 % over the whole grid are white: microscopy uses the lower end of its
    range. One stretch for all keeps the images of a grid comparable.
    """
    every = torch.cat([row.float().cpu() for row in rows])
    limit = torch.quantile(every.transpose(0, 1).flatten(1)[:, :: max(1, every[:, 0].numel() // 1_000_000)],
                           1 - BRIGHTEST, dim=1)  # fmt: skip
    factor = max(1, SHOWN_SIDE // max(every.shape[2:]))
    count, side = max(len(row) for row in rows), (factor * every.shape[2], factor * every.shape[3])
    height, width = side[0] + GAP, side[1] + GAP
    picture = np.full((len(rows) * height - GAP, count * width + 2 * GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        shown = coloured(row.float().cpu() / limit.clamp(min=1e-3)[:, None, None]).clamp(0, 1)
        shown = shown.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        for j, image in enumerate((shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            top, left = i * height, j * width + 3 * GAP * (j >= gap_after)
            picture[top : top + side[0], left : left + side[1]] = image
    return picture


def write_picture(path: Path, picture: Picture | Any) -> None:
    """Write a PNG, whole or not at all."""
    with atomic(path) as (temporary,):
        Image.fromarray(picture).save(temporary, format="PNG")
