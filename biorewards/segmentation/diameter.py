"""The diameter of the objects in an image, when nobody gave it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biorewards.segmentation.segmenter import Segmenter

#: First guesses, px, tried in this order until objects are found.
GUESSES = (24.0, 60.0, 10.0, 140.0)
#: The pass is repeated until the found diameter stays within 8 %, at most this often.
PASSES = 4


def median_diameter(labels: Tensor) -> float:
    """Diameter of the disc with the median object area, px; NaN when there is none. labels (B, H, W) int."""
    flat = labels.flatten(1).long()
    stride = int(flat.max()) + 1
    areas = torch.bincount((flat + torch.arange(len(flat), device=flat.device)[:, None] * stride).flatten())
    areas = areas.view(-1)[torch.arange(len(areas), device=areas.device) % stride != 0]
    areas = areas[areas > 0].float()
    return float(2 * (areas.median() / math.pi).sqrt()) if len(areas) else math.nan


def estimate_diameter(segmenter: Segmenter, nucleus: Tensor | None, cytoplasm: Tensor | None) -> float:
    """Fixed-point iteration: segment at a guessed scale, take the median diameter found, segment at that.

    Arguments as for `Segmenter`, one image or several of one kind. Returns px (of nuclei, or of cells when
    `nucleus` is None).
    Raises ValueError when nothing is found at any first guess.
    """
    for guess in GUESSES:
        diameter = guess
        for _ in range(PASSES):
            masks = segmenter(nucleus, cytoplasm, diameter)
            found = median_diameter(masks.cells if nucleus is None else masks.nuclei)
            if math.isnan(found):
                break
            # Beyond a factor of 3 the first pass was at a scale the networks never saw: go there in steps.
            step = min(max(found / diameter, 1 / 3), 3.0)
            diameter *= step
            if abs(step - 1) < 0.08:
                break
        if not math.isnan(found):
            return diameter
    raise ValueError("no object found at any scale; give the diameter (--diameter PX) or check the channel")
