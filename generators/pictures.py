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
#: Px between images, and the share of pixels that may be brighter than white.
GAP, BRIGHTEST = 2, 0.003

Picture = npt.NDArray[np.uint8]


def coloured(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3, H, W): one channel grey, more by `COLOURS` (from the seventh on: left out)."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    colours = torch.tensor(COLOURS[: images.shape[1]], dtype=images.dtype)
    return torch.einsum("nchw,ck->nkhw", images[:, : len(colours)], colours)


def mosaic(rows: Sequence[Tensor]) -> Picture:
    """Rows of images (N, C, H, W) in [0, 1], all of one size, as one picture (height, width, 3).

    Every channel is stretched so that its brightest 0.3 % over the whole grid are white: microscopy uses the lower end
    of its range. One stretch for all keeps images of a grid comparable.
    """
    every = torch.cat([row.float().cpu() for row in rows])
    limit = torch.quantile(every.transpose(0, 1).flatten(1)[:, :: max(1, every[:, 0].numel() // 1_000_000)],
                           1 - BRIGHTEST, dim=1)  # fmt: skip
    count, side = max(len(row) for row in rows), every.shape[2:]
    height, width = side[0] + GAP, side[1] + GAP
    picture = np.full((len(rows) * height - GAP, count * width - GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        shown = coloured(row.float().cpu() / limit.clamp(min=1e-3)[:, None, None]).clamp(0, 1)
        for j, image in enumerate((shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            picture[i * height : i * height + side[0], j * width : j * width + side[1]] = image
    return picture


def write_picture(path: Path, picture: Picture | Any) -> None:
    """Write a PNG, whole or not at all."""
    with atomic(path) as (temporary,):
        Image.fromarray(picture).save(temporary, format="PNG")
