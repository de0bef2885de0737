"""The bundled segmenter: the compact networks behind the `Segmenter` protocol."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from biorewards.segmentation.flow_targets import unique_ids
from biorewards.segmentation.flows import masks_from_flows, renumber
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
#: Smallest objects kept, as shares of the area of a nucleus of the expected diameter. Smaller ones are micronuclei
#: and debris, or scraps of cytoplasm; at the image's border they are what is left of a larger object.
MIN_NUCLEUS, MIN_CELL = 0.14, 0.4
MIN_NUCLEUS_AT_BORDER, MIN_CELL_AT_BORDER = 0.03, 0.1
BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "compact.safetensors"


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, antialiased when shrinking; (B, C, H, W)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def drop_small(labels: Tensor, least: int) -> Tensor:
    """Remove objects under `least` px that do not touch the image's border; (B, H, W) int32, numbered anew."""
    ids = unique_ids(labels)
    many = int(ids.max()) + 1
    keep = torch.bincount(ids.reshape(-1), minlength=many) >= least
    for edge in (ids[:, 0], ids[:, -1], ids[:, :, 0], ids[:, :, -1]):
        keep[edge.reshape(-1)] = True
    return renumber(ids * keep[ids])


class CompactSegmenter:
    """The bundled networks behind the `Segmenter` protocol.

    Works at a nucleus diameter of 20 px: the image is resized, flows are followed there, and outlines are taken
    from the logit at the image's own resolution. Euler steps and minimum sizes are settings of the weights, not
    options. `fingerprint` is the hash of the weight file.
    """

    name = "compact"

    def __init__(self, net: CompactNet, fingerprint: str) -> None:
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.weights_fingerprint = fingerprint
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
            widths, evidence = (tuple(int(w) for w in notes[key].split(",")) for key in ("widths", "evidence_widths"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
        net = CompactNet(widths, evidence)
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
        small = (max(STRIDE, round(size[0] * scale)), max(STRIDE, round(size[1] * scale)))
        disc = math.pi / 4 * diameter**2
        pairs = ((MIN_NUCLEUS, MIN_NUCLEUS_AT_BORDER), (MIN_CELL, MIN_CELL_AT_BORDER))
        least = [(round(inside * disc), round(border * disc)) for inside, border in pairs]
        if cytoplasm is None:
            flow, logit = self._run(small, nucleus[:, None])  # type: ignore[index]
            return Masks(self._label(flow, logit[:, 0], size, *least[0]), nothing)
        if cytoplasm.shape[1] == 1:  # trained with a lone cytoplasm channel in the first place, zero in the second
            cytoplasm = torch.cat([cytoplasm, torch.zeros_like(cytoplasm)], 1)
        dna = torch.zeros_like(cytoplasm[:, :1]) if nucleus is None else nucleus[:, None]
        n_flow, n_logit, c_flow, c_logit = self._run(small, dna, cytoplasm)
        nuclei = nothing if nucleus is None else self._label(n_flow, n_logit[:, 0], size, *least[0])
        return Masks(nuclei, self._label(c_flow, c_logit[:, 0], size, *least[1]))

    def _run(self, small: tuple[int, int], *channels: Tensor) -> list[Tensor]:
        """Resize, pad to the stride with the edge's own values, run, crop."""
        with torch.inference_mode():
            x = resize(torch.cat(channels, 1), small)
            pad_y, pad_x = -small[0] % STRIDE, -small[1] % STRIDE
            top, left = pad_y // 2, pad_x // 2
            x = F.pad(x, (left, pad_x - left, top, pad_y - top), mode="replicate").contiguous(
                memory_format=torch.channels_last
            )
            raw = self._network(x)
            window = raw[..., top : top + small[0], left : left + small[1]]
            return list(torch.split(window, [2, 1] if window.shape[1] == 3 else [2, 1, 2, 1], 1))

    def _network(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) DNA [, actin, tubulin] -> (B, 3 or 6, H, W) flows and logits; tiled when large."""
        if max(x.shape[-2:]) > TILE:
            return tiled(self._forward, x, TILE, OVERLAP)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            flow, logit = self.net.nuclei(x)
            return torch.cat([flow, logit[:, None]], 1)
        out = self.net(x[:, :1], x[:, 1:])
        return torch.cat([out.nucleus_flow, out.nucleus_logit[:, None], out.cell_flow, out.cell_logit[:, None]], 1)

    def _label(self, flow: Tensor, logit: Tensor, size: tuple[int, int], least: int, least_at_border: int) -> Tensor:
        outline = F.interpolate(logit[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        labels = masks_from_flows(
            flow,
            logit,
            steps=STEPS,
            method="doubling",
            outline_logit=outline,
            min_size=least_at_border,
            flow_threshold=self.flow_threshold,
        )
        return drop_small(labels, least)
