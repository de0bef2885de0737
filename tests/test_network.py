"""The compact networks: inference in place gives what training computes; cells that share other trunks' features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import bundled
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from biorewards.classifier import folded
from biorewards.phantom import render_dataset
from biorewards.segmentation.compact import CompactSegmenter
from biorewards.segmentation.cpnet_network import CPnet
from biorewards.segmentation.network import CompactNet, fold_batch_norm, plus_enlarged, pooled

NARROW = ((8, 16, 16, 24), (8, 8, 16, 16), (16, 16, 24))


def unsettled(net: nn.Module) -> nn.Module:
    """BatchNorms with statistics that folding cannot ignore."""
    torch.manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("cells", [(), NARROW[2]])
def test_inference_equals_the_plain_way(cells: tuple[int, ...]) -> None:
    net = unsettled(CompactNet(NARROW[0], NARROW[1], cells))
    x = torch.rand(2, 6, 24, 40, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    before = x.clone()
    plain = net(x[:, :4], x[:, 4:])  # gradients on: nothing in place
    with torch.inference_mode():
        fast = fold_batch_norm(net)(x[:, :4], x[:, 4:])
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, before)
    assert fast.cell_flow.shape == ((2, 2, 12, 20) if cells else (2, 2, 24, 40))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pooling_and_enlarging_are_torchs(layout: torch.memory_format) -> None:
    random = torch.Generator().manual_seed(1)
    fine = torch.rand(2, 3, 8, 12, generator=random).contiguous(memory_format=layout)
    coarse = torch.rand(2, 3, 4, 6, generator=random).contiguous(memory_format=layout)
    assert torch.equal(pooled(fine), F.max_pool2d(fine, 2))
    assert torch.equal(plus_enlarged(fine, coarse), fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))


def segmenter_of(net: CompactNet, file: Path) -> CompactSegmenter:
    widths = {"widths": net.widths, "evidence_widths": net.evidence_widths, "cell_widths": net.cell_widths}
    state = {k: v.contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, str(file), metadata={key: ",".join(map(str, value)) for key, value in widths.items()})
    return CompactSegmenter.load(file)


class Drawn(nn.Module):
    """Stands for a network with shared cells: draws what it is shown, flows to the middle of its bright square."""

    cell_widths = (1, 1, 1)

    def forward(self, nucleus, cytoplasm):  # type: ignore[no-untyped-def]
        from biorewards.segmentation.flow_targets import flows_from_masks
        from biorewards.segmentation.network import Outputs

        body = cytoplasm[:, 0] > 0.5
        half = F.max_pool2d(body[:, None].float(), 2)[:, 0].int()
        flat = torch.full(body.shape, -5.0)
        return Outputs(
            torch.zeros(len(body), 2, *body.shape[1:]), flat, torch.full((len(body), 4, *body.shape[1:]), -5.0),
            5 * flows_from_masks(half), 10 * (cytoplasm[:, 0] - 0.5),
        )  # fmt: skip


@pytest.mark.parametrize("size", [(96, 96), (75, 99), (700, 130)])
def test_cells_of_a_coarser_grid_lie_where_they_are(size: tuple[int, int]) -> None:
    """Flows at half the scale: no shift by padding to the stride, rounding to even sides or tiles."""
    segmenter = CompactSegmenter(Drawn(), "drawn")  # type: ignore[arg-type]
    cytoplasm = torch.zeros(1, 2, *size)
    top, left = size[0] - 60, size[1] - 64
    cytoplasm[:, :, top : top + 40, left : left + 40] = 1
    cells = segmenter(None, cytoplasm, 18.0).cells[0]
    y, x = (v.float().mean() for v in (cells > 0).nonzero().unbind(1))
    assert cells.amax() == 1
    assert abs(float(y) - top - 19.5) < 0.6 and abs(float(x) - left - 19.5) < 0.6
    assert abs(int((cells > 0).sum()) / 1600 - 1) < 0.08


def test_a_network_with_shared_cells_is_saved_and_loaded(tmp_path: Path) -> None:
    net = unsettled(CompactNet(*NARROW))
    segmenter = segmenter_of(net, tmp_path / "fast.safetensors")  # type: ignore[arg-type]
    assert segmenter.grain == 2 and segmenter.net.cell_widths == NARROW[2]
    images = torch.from_numpy(np.moveaxis(render_dataset(3, 96, 5).images, -1, 1).copy()).float() / 255
    masks = segmenter(images[:, 2], images[:, :2], 35.0)
    assert masks.cells.shape == (3, 96, 96)
    for one in range(3):
        alone = segmenter(images[one : one + 1, 2], images[one : one + 1, :2], 35.0)
        assert torch.equal(alone.cells[0], masks.cells[one])


def test_cpnet_in_short_equals_cpnet() -> None:
    net = unsettled(CPnet((2, 8, 16, 16)))
    x = torch.rand(2, 2, 32, 48, generator=torch.Generator().manual_seed(1))
    plain = net(x)
    with torch.inference_mode():
        for one, other in zip(plain, net(x), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        changed = {k: v * 1.1 if k.endswith("2.weight") else v for k, v in net.state_dict().items()}
        net.load_state_dict(changed)
        assert not torch.allclose(net(x)[0], plain[0]), "weights folded before are used after loading others"


def test_a_folded_classifier_gives_the_same_and_keeps_its_own_weights() -> None:
    classifier = bundled("phantom").classifier
    assert classifier is not None
    keys = set(classifier.net.state_dict())
    short = folded(classifier.net, 3)
    assert short is not classifier.net and not any(isinstance(m, nn.BatchNorm2d) for m in short.modules())
    x = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(short(x), classifier.net(x), atol=1e-4, rtol=1e-4)
    assert set(classifier.net.state_dict()) == keys


def test_a_network_that_folding_would_change_is_left_alone() -> None:
    class Twisted(nn.Module):
        """Its BatchNorm is registered after a convolution that it does not follow."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x).relu())  # type: ignore[no-any-return]

    net = unsettled(Twisted())
    assert folded(net, 3) is net
