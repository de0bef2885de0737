"""Batches of images at another pixel size, on any device: what `biorewards.io.images.resize` does to files."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resample(images: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) float in [0, 1] by `scale` (new size / old size): a triangle filter, widened when shrinking.

    Equal to `io.images.resize` of each image up to rounding (1e-6). scale 1 returns the images as they are. Details
    finer than the coarser pixel are not brought back: statistics of a reference are measured on images of both alike.
    """
    if scale == 1:
        return images
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    small = F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False, antialias=True)
    return small.clamp(0, 1)
