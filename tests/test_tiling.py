"""Tiles: exact for what sees one pixel, seamless for what sees a neighbourhood, and every pixel covered."""

import pytest
import torch
from torch.nn import functional as F

from biorewards.segmentation.tiling import tiled


@pytest.mark.parametrize("size", [(30, 200), (64, 64), (65, 130), (301, 97)])
def test_pointwise_networks_do_not_notice(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Size] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return torch.stack([x.sum(1), x[:, 0] * 2], 1)

    out = tiled(network, images, 64, 16)
    torch.testing.assert_close(out, network(images), atol=1e-5, rtol=1e-5)
    assert {shape[2:] for shape in seen[:-1]} == {(min(64, size[0]), min(64, size[1]))}
    assert all(shape[0] == 2 for shape in seen)


def test_edges_of_tiles_do_not_show() -> None:
    """A network that sees 9 px round a pixel, with zeros beyond the tile: wrong at a tile's edge, right inside."""
    images = torch.rand(1, 1, 400, 300, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 19, 1, 9)

    whole = network(images)
    alone = torch.cat([network(images[:, :, :200]), network(images[:, :, 200:])], 2)
    stitched = tiled(network, images, 128, 48)
    assert (stitched - whole).abs().max() < 0.15 * (alone - whole).abs().max()
    torch.testing.assert_close(stitched[:, :, :1, :40], whole[:, :, :1, :40])  # the image's own edge is as in one pass


def test_one_tile_is_one_call() -> None:
    images = torch.rand(1, 1, 50, 64)
    assert torch.equal(tiled(lambda x: x * 3, images, 64, 10), images * 3)


@pytest.mark.parametrize("overlap", [-1, 64])
def test_overlap_must_fit(overlap: int) -> None:
    with pytest.raises(ValueError, match="choose 0 <= overlap < tile"):
        tiled(lambda x: x, torch.zeros(1, 1, 100, 100), 64, overlap)
