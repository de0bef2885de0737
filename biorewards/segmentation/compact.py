"""The bundled segmenter: the compact networks behind the `Segmenter` protocol."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from biorewards.segmentation.flows import masks_from_flows
from biorewards.segmentation.network import CompactNet, fold_batch_norm
from biorewards.segmentation.segmenter import Masks
from biorewards.segmentation.tiling import tiled

#: Diameter of a nucleus at the scale the networks work at, px.
WORKING_DIAMETER = 18.0
#: Sides are padded to a multiple of this: three poolings.
STRIDE = 8
#: Larger working images are cut into tiles of this side with this overlap, px.
TILE, OVERLAP = 512, 64
#: Unit steps a pixel may walk at the working scale: the largest cells are about 120 px across there.
STEPS = 256
#: Walks that must end in a bin for a seed, and to belong to a seed's surroundings (Cellpose's).
SEED_PIXELS, BIN_PIXELS = 10, 2
#: Smallest objects kept, as shares of the area of a nucleus of the expected diameter. Smaller ones are micronuclei
#: and debris, or scraps of cytoplasm; at the image's border they are what is left of a larger object.
MIN_NUCLEUS, MIN_CELL = 0.14, 0.6
MIN_NUCLEUS_AT_BORDER, MIN_CELL_AT_BORDER = 0.03, 0.1
BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "compact.safetensors"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, antialiased when shrinking; (B, C, H, W)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


class CompactSegmenter:
    """The bundled networks behind the `Segmenter` protocol.

    Works at a nucleus diameter of 18 px: the image is resized, and flows are followed there. Outlines of nuclei come
    from a logit at twice that scale, those of cells from the logit enlarged to the image's own resolution. Euler
    steps and minimum sizes are settings of the weights, not options. `fingerprint` is the hash of the weight file.
    """

    name = "compact"

    def __init__(self, net: CompactNet, fingerprint: str) -> None:
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_fingerprint = fingerprint
        #: Working pixels to a side of a pixel of the cell flows.
        self.grain = 2 if net.cell_widths else 1
        #: Off: predicted flows are short where the networks are unsure, and the check at 0.4 costs good masks.
        self.flow_threshold = 0.0

    @property
    def fingerprint(self) -> str:
        """Hash of the weight file, and the flow threshold where one is set."""
        return self.weights_fingerprint + (f"-ft{self.flow_threshold:g}" if self.flow_threshold else "")

    @classmethod
    def bundled(cls) -> CompactSegmenter:
        """The weights that ship with the package."""
        return cls.load(BUNDLED)

    @classmethod
    def load(cls, path: Path) -> CompactSegmenter:
        """Read a safetensors file written by `save`. Raises ValueError when names or shapes do not fit."""
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if "widths" not in notes:
                raise ValueError(f"{path} holds no compact network; `scripts/segmenter/train.py` writes one")
            widths, evidence, cells = (_numbers(notes.get(f"{key}widths", "")) for key in ("", "evidence_", "cell_"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
        net = CompactNet(widths, evidence, cells)
        net.load_state_dict(state, strict=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        return cls(fold_batch_norm(net.eval()), f"compact-{digest}")  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> CompactSegmenter:
        """Move the networks; images must be on the same device."""
        self.net.to(device)
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        """Masks at the images' own resolution; see `Segmenter`. Raises ValueError when both channels are None."""
        given = nucleus if nucleus is not None else cytoplasm
        if given is None:
            raise ValueError("give a nucleus channel, a cytoplasm channel or both")
        size = (given.shape[-2], given.shape[-1])
        nothing = torch.zeros((len(given), *size), dtype=torch.int32, device=given.device)
        scale = WORKING_DIAMETER / diameter
        # Even where cell flows come at half the scale, so that their grid covers the same area.
        unit = self.grain
        small = (max(STRIDE, unit * round(size[0] * scale / unit)), max(STRIDE, unit * round(size[1] * scale / unit)))
        disc = math.pi / 4 * diameter**2
        pairs = ((MIN_NUCLEUS, MIN_NUCLEUS_AT_BORDER), (MIN_CELL, MIN_CELL_AT_BORDER))
        least = [(round(inside * disc), round(border * disc)) for inside, border in pairs]
        if cytoplasm is None:
            flow, logit, fine = self._run(small, nucleus[:, None], None)  # type: ignore[index]
            return Masks(self._label(flow, logit, fine, size, *least[0]), nothing)
        if cytoplasm.shape[1] == 1:  # trained with a lone cytoplasm channel in the first place, zero in the second
            cytoplasm = torch.cat([cytoplasm, torch.zeros_like(cytoplasm)], 1)
        dna = torch.zeros_like(cytoplasm[:, :1]) if nucleus is None else nucleus[:, None]
        n_flow, n_logit, fine, c_flow, c_logit = self._run(small, dna, cytoplasm)
        nuclei = nothing if nucleus is None else self._label(n_flow, n_logit, fine, size, *least[0])
        return Masks(nuclei, self._cells(c_flow, c_logit, size, *least[1]))

    def _run(self, small: tuple[int, int], dna: Tensor, cytoplasm: Tensor | None) -> list[Tensor]:
        """Resize, pad to the stride with the edge's own values, run, crop: flow, logit and outline (B, c, h, w)."""
        with torch.inference_mode():
            x = F.pixel_unshuffle(resize(dna, (2 * small[0], 2 * small[1])), 2)
            if cytoplasm is not None:
                x = torch.cat([x, resize(cytoplasm, small)], 1)
            pad_y, pad_x = -small[0] % STRIDE, -small[1] % STRIDE
            top, left = (pad // (2 * self.grain) * self.grain for pad in (pad_y, pad_x))
            x = F.pad(x, (left, pad_x - left, top, pad_y - top), mode="replicate").contiguous(
                memory_format=torch.channels_last
            )
            raw = self._network(x)[..., top : top + small[0], left : left + small[1]]
            flow, logit, outline, *cells = torch.split(raw, [2, 1, 4] if cytoplasm is None else [2, 1, 4, 2, 1], 1)
            return [flow, logit, F.pixel_shuffle(outline, 2), *cells]

    def _network(self, x: Tensor) -> Tensor:
        """(B, 4 or 6, H, W) DNA quarters [, actin, tubulin] -> (B, 7 or 10, H, W); tiled when large."""
        if max(x.shape[-2:]) > TILE:
            return tiled(self._forward, x, TILE, OVERLAP)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            flow, logit, outline = self.net.nuclei(x)
            return torch.cat([flow, logit[:, None], outline], 1)
        out = self.net(x[:, :4], x[:, 4:])
        planes = (out.nucleus_flow, out.nucleus_logit[:, None], out.nucleus_outline)
        cell_flow = out.cell_flow
        if self.grain > 1:
            cell_flow = F.interpolate(cell_flow, scale_factor=float(self.grain), mode="nearest")
        return torch.cat([*planes, cell_flow, out.cell_logit[:, None]], 1)

    def _cells(self, flow: Tensor, logit: Tensor, size: tuple[int, int], least: int, least_at_border: int) -> Tensor:
        if self.grain == 1:
            return self._label(flow, logit, logit, size, least, least_at_border)
        flow, coarse = (F.avg_pool2d(x, self.grain) for x in (flow, logit))
        return self._label(flow, coarse, logit, size, least, least_at_border, self.grain)

    def _label(
        self,
        flow: Tensor,
        logit: Tensor,
        outline: Tensor,
        size: tuple[int, int],
        least: int,
        least_at_border: int,
        grain: int = 1,
    ) -> Tensor:
        """Labels (B, H, W) from flow (B, 2, h, w), logit (B, 1, h, w) and a logit for the outlines (B, 1, any, any).

        grain: working pixels to a side of a pixel of the flow grid; fewer walks then make a seed.
        """
        outline = F.interpolate(outline, size, mode="bilinear", align_corners=False)[:, 0]
        return masks_from_flows(
            flow,
            logit[:, 0],
            steps=STEPS // grain,
            method="doubling",
            seed_pixels=SEED_PIXELS // grain**2,
            bin_pixels=BIN_PIXELS // grain**2,
            outline_logit=outline,
            min_size=least_at_border,
            min_size_inside=least,
            flow_threshold=self.flow_threshold,
        )
