"""The bundled networks: small U-Nets for nuclei and cells, the cell mask from cytoplasm evidence alone.

Three trunks. One sees DNA and finds nuclei. One sees actin and tubulin, never DNA, and says which pixels are cell: so
a nucleus without a cell round it stays without one (`nucleus_in_cytoplasm` would be 1.0 by construction otherwise).
One sees all three and says to which cell a pixel belongs: nuclei tell neighbours apart where the cytoplasm shows no
border.

Outputs follow Cellpose (Stringer et al. 2021, Nat. Methods): 5 x the unit flow (Y, X) and a logit, so that
one mask recovery serves every network.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """Network outputs, float32: flows (B, 2, H, W) = 5 x unit flow (Y, X); logits (B, H, W).

    nucleus_outline: (B, 4, H, W), the nucleus logit of each quarter of a pixel (`F.pixel_shuffle` puts them in place).
    cell_flow: (B, 2, H / 2, W / 2) of a network whose cells share the other trunks' features.
    """

    nucleus_flow: Tensor
    nucleus_logit: Tensor
    nucleus_outline: Tensor
    cell_flow: Tensor
    cell_logit: Tensor


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y; at inference in x's own memory, which no one else may hold: sums at the fine scale are bound by memory."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def plus_enlarged(x: Tensor, coarse: Tensor) -> Tensor:
    """x (B, C, 2h, 2w) + coarse (B, C, h, w) enlarged to the nearest neighbour; memory as in `_plus`."""
    b, c, h, w = coarse.shape
    rows = coarse.permute(0, 2, 3, 1)
    # Channels last, a row is one run of w * C values: doubled as such it is added in half the time of interpolate.
    twice = torch.cat([rows, rows], 3).reshape(b, h, 1, 2 * w * c)
    return _plus(x.permute(0, 2, 3, 1).reshape(b, h, 2, 2 * w * c), twice).view(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def pooled(x: Tensor) -> Tensor:
    """The maximum of 2x2 pixels: a quarter of the time of `max_pool2d`, which works out where it lies, too."""
    rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def conv_unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the BatchNorm folds into the convolution at inference."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Block(nn.Module):
    """Two units with a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.units = nn.Sequential(conv_unit(inputs, outputs), conv_unit(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return _plus(self.units(x), self.skip(x))


class Trunk(nn.Module):
    """A U-Net: widths per level, additive skips, nearest-neighbour enlargement. (B, C, H, W) -> (B, w0, H, W)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((inputs, *widths[:-1]), widths, strict=True))
        self.reduce = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Block(a, a) for a in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.pyramid(x)[0]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """What the way up gives at every level, finest first: (B, w_i, H / 2^i, W / 2^i)."""
        levels: list[Tensor] = []
        for i, block in enumerate(self.down):
            levels.append(block(pooled(levels[-1]) if i else x))
        for i in range(len(self.up) - 1, -1, -1):
            # The 1x1 convolution before the enlargement instead of after it: the same result at a quarter of the cost.
            levels[i] = self.up[i](plus_enlarged(levels[i], self.reduce[i](levels[i + 1])))
        return levels


class SharedCells(nn.Module):
    """Cell flows at half the scale, from what the other two trunks have found: a third of a cell trunk's cost.

    Per level, coarsest first: the nucleus trunk's and the evidence trunk's features and those of three strided
    convolutions of its own on all channels, added up, and two units. widths: channels at 1/2, 1/4, 1/8 of the scale.
    """

    def __init__(
        self, inputs: int, nucleus: tuple[int, ...], evidence: tuple[int, ...], widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.stem = nn.ModuleList(conv_unit(a, b, 3, 2) for a, b in pairwise((inputs, *widths)))
        self.nucleus = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(nucleus[1:], widths, strict=True))
        self.evidence = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(evidence[1:], widths, strict=True))
        self.blocks = nn.ModuleList(Block(a, a) for a in widths)
        self.reduce = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.head = nn.Sequential(conv_unit(widths[0], widths[0]), nn.Conv2d(widths[0], 2, 1))

    def forward(self, x: Tensor, nucleus: list[Tensor], evidence: list[Tensor]) -> Tensor:
        """x: (B, inputs, H, W); the trunks' pyramids. Returns 5 x unit flow (B, 2, H / 2, W / 2)."""
        own: list[Tensor] = []
        for unit in self.stem:
            own.append(unit(own[-1] if own else x))
        found: Tensor | None = None
        for i in range(len(own) - 1, -1, -1):
            level = _plus(_plus(own[i], self.nucleus[i](nucleus[i + 1])), self.evidence[i](evidence[i + 1]))
            if found is not None:
                level = plus_enlarged(level, self.reduce[i](found))
            found = self.blocks[i](level)
        out: Tensor = self.head(found)
        return out


class CompactNet(nn.Module):
    """The trunks and their heads.

    nucleus: (B, 4, H, W), the four quarters of each pixel as `F.pixel_unshuffle` gives them: the trunks see their mean,
        the outline head sees them all. A trunk at twice the scale would cost four times as much, and splits nuclei.
    cytoplasm: (B, 2, H, W). Both normalised (0 background, 1 bright), sides multiples of 8.
    cell_widths: none, and cells have a trunk of their own; three, and they share the other trunks' features
        (`SharedCells`). Which pixels are cell is the evidence trunk's alone in both.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 40, 80, 128),
        evidence_widths: tuple[int, ...] = (8, 20, 40, 64),
        cell_widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.widths, self.evidence_widths, self.cell_widths = widths, evidence_widths, cell_widths
        w, e = widths[0], evidence_widths[0]
        self.nucleus_trunk = Trunk(2, widths)
        self.nucleus_head = nn.Sequential(conv_unit(w, w), nn.Conv2d(w, 3, 1))
        self.outline_head = nn.Sequential(conv_unit(w + 8, 24), nn.Conv2d(24, 4, 3, padding=1))
        self.evidence_trunk = Trunk(4, evidence_widths)
        self.evidence_head = nn.Sequential(conv_unit(e, e), nn.Conv2d(e, 1, 1))
        if cell_widths:
            self.shared_cells = SharedCells(6, widths, evidence_widths, cell_widths)
        else:
            self.cell_trunk = Trunk(6, widths)
            self.cell_head = nn.Sequential(conv_unit(2 * w, w), nn.Conv2d(w, 2, 1))

    def nuclei(self, nucleus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flow (B, 2, H, W), logit (B, H, W) and outline (B, 4, H, W) of the nuclei, for images without cytoplasm."""
        return self._nuclei(nucleus, self.nucleus_trunk(compress(nucleus.mean(1, keepdim=True))))

    def _nuclei(self, nucleus: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.nucleus_head(features).float()
        fine = self.outline_head(torch.cat([features, compress(nucleus)], 1)).float()
        return out[:, :2], out[:, 2], out[:, 2:] + fine

    def forward(self, nucleus: Tensor, cytoplasm: Tensor) -> Outputs:
        dna, bodies = compress(nucleus.mean(1, keepdim=True)), compress(cytoplasm)
        nuclear, body = self.nucleus_trunk.pyramid(dna), self.evidence_trunk.pyramid(bodies)
        evidence = self.evidence_head(body[0]).float()
        everything = torch.cat([bodies, dna], 1)
        if self.cell_widths:
            flow = self.shared_cells(everything, nuclear, body).float()
        else:
            # The nucleus trunk's features beside its own: what tells two nuclei apart tells their cells apart.
            flow = self.cell_head(torch.cat([self.cell_trunk(everything), nuclear[0]], 1)).float()
        return Outputs(*self._nuclei(nucleus, nuclear[0]), flow, evidence[:, 0])


def compress(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2C, H, W): the image, limited to [-0.5, 3], and its logarithm.

    One bright mitotic or dead nucleus can be ten times its neighbours; the logarithm keeps the dim ones visible.
    """
    x = x.clamp(-0.5, 3.0)
    # Not log1p: it takes seven times as long, and to 1e-7 of 1 there is no difference.
    return torch.cat([x, torch.log(20 * x.clamp_min(0) + 1) / math.log(21)], 1)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold every Conv-BatchNorm pair of an evaluation-mode network into the convolution, in place."""
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) > 1 and isinstance(child[1], nn.BatchNorm2d):
            child[0] = torch.nn.utils.fuse_conv_bn_eval(child[0], child[1])  # type: ignore[type-var]
            child[1] = nn.Identity()
    return module
