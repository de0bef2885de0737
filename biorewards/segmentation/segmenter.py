"""What a segmenter is: normalised channels in, instance labels of nuclei and cells out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Instance labels, (B, H, W) int32 each: 0 is background, objects of one crop are numbered from 1."""

    nuclei: Tensor
    cells: Tensor


class Segmenter(Protocol):
    """Finds nuclei and cells in a batch of equally sized images.

    nucleus: (B, H, W) float32, the DNA channel, or None; then `nuclei` is all zero.
    cytoplasm: (B, K, H, W) float32, K = 1 or 2 (actin, tubulin), or None; then `cells` is all zero.
        Both are normalised so that 0 is background and 1 is bright (`normalise`), not clipped.
    diameter: expected diameter of a nucleus, px (of a cell body when there is no nucleus channel).

    The answer for one image never depends on the other images of the batch. `fingerprint` names weights and
    settings: two segmenters with one fingerprint give the same masks.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def to(self, device: torch.device | str) -> Segmenter:
        """Move the networks, in place, and return the segmenter."""
        ...

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks: ...


def normalise(images: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Scale channels so that `low` becomes 0 and `high` becomes 1; nothing is clipped.

    images: (B, C, H, W) float. low, high: numbers, or tensors that broadcast to (B, C). A channel whose range
    is not positive becomes 0. Returns (B, C, H, W) float32.
    """
    low = torch.as_tensor(low, dtype=torch.float32, device=images.device)[..., None, None]
    high = torch.as_tensor(high, dtype=torch.float32, device=images.device)[..., None, None]
    span = high - low
    return torch.where(span > 0, (images.float() - low) / torch.where(span > 0, span, 1), 0)


def percentile_range(images: Tensor, low: float = 1, high: float = 99.8) -> tuple[Tensor, Tensor]:
    """Two percentiles of every image and channel, over all its pixels: (B, C) float32 each.

    images: (B, C, H, W) float. low, high: percent, 0 to 100. Interpolated linearly between order statistics;
    equals `numpy.percentile` on float32 arrays, which works out the place between them in float32, too.
    """
    flat = images.float().flatten(2)

    def percentile(q: float) -> Tensor:
        at = float(torch.tensor(q, dtype=torch.float32) / 100 * (flat.shape[2] - 1))
        below = flat.kthvalue(int(at) + 1, 2).values
        above = flat.kthvalue(min(int(at) + 2, flat.shape[2]), 2).values
        return torch.lerp(below, above, at - int(at))

    return percentile(low), percentile(high)
