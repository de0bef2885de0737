"""Networks on images that are too large for one pass: overlapping tiles, averaged.

Outputs are stitched, not labels: flows and logits of the tiles are averaged with a taper, and masks are then
made from the whole field. So no object is cut or counted twice at a tile's edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: A tile's weight falls from 1 to 0 round this distance from its edge, over about this width, px (Cellpose 3).
TAPER_AT, TAPER_WIDTH = 19.5, 7.5


def tiled(network: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: float) -> Tensor:
    """Run a network on overlapping tiles and average what it gives.

    network: (B, C, h, w) -> (B, K, h, w), any h, w up to `tile`. images: (B, C, H, W). tile: side, px; sides up to it
    take one tile. overlap: least overlap of neighbouring tiles, px, 0 <= overlap < tile. Returns (B, K, H, W).
    Raises ValueError when overlap does not fit.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} px does not fit tiles of {tile} px; choose 0 <= overlap < tile")
    height, width = images.shape[-2:]
    tile_height, tile_width = min(tile, height), min(tile, width)
    if (tile_height, tile_width) == (height, width):
        return network(images)
    weight = _taper(tile_height, images)[:, None] * _taper(tile_width, images)
    total = out = None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            window = (..., slice(top, top + tile_height), slice(left, left + tile_width))
            result = network(images[window])
            if out is None or total is None:
                out = result.new_zeros(*result.shape[:2], height, width)
                total = result.new_zeros(height, width)
            out[window] += result * weight
            total[window] += weight
    assert out is not None and total is not None  # every side has at least one start
    return out / total


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """First pixels of evenly spread tiles that cover a side."""
    n = 1 if side <= tile else math.ceil(side / (tile - overlap))
    return [int(i * (side - min(tile, side)) / max(n - 1, 1)) for i in range(n)]


def _taper(side: int, like: Tensor) -> Tensor:
    at = torch.arange(side, device=like.device, dtype=torch.float32)
    return torch.sigmoid((torch.minimum(at, side - 1 - at) - TAPER_AT) / TAPER_WIDTH)
