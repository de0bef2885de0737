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
from torch.nn import functional as F


class Outputs(NamedTuple):
    """Network outputs, float32: flows (B, 2, H, W) = 5 x unit flow (Y, X); logits (B, H, W).

    nucleus_outline: (B, 4, H, W), the nucleus logit of each quarter of a pixel (`F.pixel_shuffle` puts them in place).
    """

    nucleus_flow: Tensor
    nucleus_logit: Tensor
    nucleus_outline: Tensor
    cell_flow: Tensor
    cell_logit: Tensor


def conv_unit(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the BatchNorm folds into the convolution at inference."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
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
        out: Tensor = self.skip(x) + self.units(x)
        return out


class Trunk(nn.Module):
    """A U-Net: widths per level, additive skips, nearest-neighbour enlargement. (B, C, H, W) -> (B, w0, H, W)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((inputs, *widths[:-1]), widths, strict=True))
        self.reduce = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Block(a, a) for a in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            levels.append(x)
        for i in range(len(self.up) - 1, -1, -1):
            # The 1x1 convolution before the enlargement instead of after it: the same result at a quarter of the cost.
            x = self.up[i](F.interpolate(self.reduce[i](x), scale_factor=2.0, mode="nearest") + levels[i])
        return x


class CompactNet(nn.Module):
    """The trunks and their heads.

    nucleus: (B, 4, H, W), the four quarters of each pixel as `F.pixel_unshuffle` gives them: the trunks see their mean,
        the outline head sees them all. A trunk at twice the scale would cost four times as much, and splits nuclei.
    cytoplasm: (B, 2, H, W). Both normalised (0 background, 1 bright), sides multiples of 8.
    """

    def __init__(
        self, widths: tuple[int, ...] = (16, 40, 80, 128), evidence_widths: tuple[int, ...] = (8, 20, 40, 64)
    ) -> None:
        super().__init__()
        self.widths, self.evidence_widths = widths, evidence_widths
        w, e = widths[0], evidence_widths[0]
        self.nucleus_trunk = Trunk(2, widths)
        self.nucleus_head = nn.Sequential(conv_unit(w, w), nn.Conv2d(w, 3, 1))
        self.outline_head = nn.Sequential(conv_unit(w + 8, 24), nn.Conv2d(24, 4, 3, padding=1))
        self.evidence_trunk = Trunk(4, evidence_widths)
        self.evidence_head = nn.Sequential(conv_unit(e, e), nn.Conv2d(e, 1, 1))
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
        nuclear = self.nucleus_trunk(dna)
        evidence = self.evidence_head(self.evidence_trunk(bodies)).float()
        # The nucleus trunk's features beside its own: what tells two nuclei apart tells their cells apart.
        flow = self.cell_head(torch.cat([self.cell_trunk(torch.cat([bodies, dna], 1)), nuclear], 1)).float()
        return Outputs(*self._nuclei(nucleus, nuclear), flow, evidence[:, 0])


def compress(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2C, H, W): the image, limited to [-0.5, 3], and its logarithm.

    One bright mitotic or dead nucleus can be ten times its neighbours; the logarithm keeps the dim ones visible.
    """
    x = x.clamp(-0.5, 3.0)
    return torch.cat([x, torch.log1p(20 * x.clamp_min(0)) / math.log(21)], 1)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold every Conv-BatchNorm pair of an evaluation-mode network into the convolution, in place."""
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) > 1 and isinstance(child[1], nn.BatchNorm2d):
            child[0] = torch.nn.utils.fuse_conv_bn_eval(child[0], child[1])  # type: ignore[type-var]
            child[1] = nn.Identity()
    return module
