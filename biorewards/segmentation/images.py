"""Segment one image of any size and kind: per-image normalisation, automatic diameter, overlay."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from skimage.segmentation import find_boundaries
from torch import Tensor

from biorewards.segmentation.diameter import estimate_diameter
from biorewards.segmentation.segmenter import Masks, Segmenter, normalise, percentile_range

#: Percentiles of an image that become 0 and 1: the ones the compact networks were trained with.
PERCENTILES = (1.0, 99.8)
NUCLEUS_COLOUR, CELL_COLOUR = (255, 150, 0), (255, 255, 255)


class Segmented(NamedTuple):
    """nuclei and cells (H, W) int32; the diameter that was used, px (NaN when nothing was found at any scale)."""

    nuclei: npt.NDArray[np.int32]
    cells: npt.NDArray[np.int32]
    diameter: float


def stretched(image: npt.NDArray[np.float32]) -> Tensor:
    """(C, H, W) -> (1, C, H, W), percentiles 1 and 99.8 of each channel at 0 and 1."""
    planes = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
    low, high = percentile_range(planes, *PERCENTILES)
    return normalise(planes, low, high)


def segment_image(
    image: npt.NDArray[np.float32],
    segmenter: Segmenter,
    *,
    nucleus: int | None,
    cytoplasm: list[int],
    diameter: float | None = None,
    device: torch.device | str = "cpu",
) -> Segmented:
    """Masks of one image.

    image: (C, H, W) float32. nucleus: index of the DNA channel or None. cytoplasm: none, one or two indices.
    diameter: px across a nucleus (a cell without DNA channel); None finds it (`estimate_diameter`).
    Raises ValueError when neither channel is given or an index is outside the image.
    """
    if nucleus is None and not cytoplasm:
        raise ValueError("give a nucleus channel, one or two cytoplasm channels, or both")
    if outside := [k for k in [*cytoplasm, *([] if nucleus is None else [nucleus])] if not 0 <= k < len(image)]:
        raise ValueError(f"channel {outside[0]} is not in the image: it has {len(image)}, numbered from 0")
    planes = stretched(image).to(device)
    dna = None if nucleus is None else planes[:, nucleus]
    bodies = planes[:, cytoplasm] if cytoplasm else None
    if diameter is None:
        try:
            diameter = estimate_diameter(segmenter, dna, bodies)
        except ValueError:
            nothing = np.zeros(image.shape[-2:], np.int32)
            return Segmented(nothing, nothing.copy(), float("nan"))
    masks: Masks = segmenter(dna, bodies, diameter)
    return Segmented(masks.nuclei[0].cpu().numpy(), masks.cells[0].cpu().numpy(), diameter)


def overlay(
    image: npt.NDArray[np.float32],
    nuclei: npt.NDArray[np.int32],
    cells: npt.NDArray[np.int32],
    nucleus: int | None,
    cytoplasm: list[int],
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8: cytoplasm red and green, DNA blue (one channel: grey), nuclei orange, cells white."""
    planes = stretched(image)[0].clamp(0, 1).numpy()
    shown = [planes[k] for k in cytoplasm] + ([] if nucleus is None else [planes[nucleus]])
    if len(shown) == 1:
        rgb = np.repeat(shown[0][..., None], 3, 2)
    else:
        dark = np.zeros(planes.shape[1:], np.float32)
        red = planes[cytoplasm[0]] if cytoplasm else dark
        green = planes[cytoplasm[1]] if len(cytoplasm) > 1 else dark
        rgb = np.stack([red, green, dark if nucleus is None else planes[nucleus]], -1)
    picture = (rgb * 255).round().astype(np.uint8)
    picture[find_boundaries(cells, mode="inner")] = CELL_COLOUR
    picture[find_boundaries(nuclei, mode="inner")] = NUCLEUS_COLOUR
    return picture
