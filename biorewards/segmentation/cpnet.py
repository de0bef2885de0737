"""Cellpose 1 to 3: any official weight file, and the segmenter that runs it in batches.

The widths of the network (`cpnet_network`) are read from the file. Input is two channels (cytoplasm, nucleus), or
(nucleus, zeros) for a nuclei network; output is 5 x flow (Y, X) and a logit. With Cellpose's own settings the masks
are those of Cellpose 3.1.1.3 on CPU.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.segmentation.cpnet_network import CELL_DIAMETER, NUCLEUS_DIAMETER, CPnet
from biorewards.segmentation.flows import masks_from_flows
from biorewards.segmentation.segmenter import Masks, percentile_range
from biorewards.segmentation.tiling import tiled

#: Cellpose's tiles: side, px, and the overlap that its rule of 1.2 tiles a side gives.
TILE, OVERLAP = 224, 224 - 224 / 1.2
#: Images that networks and flows handle at once on a CPU: walks of 64 crops fall out of the cache and take 1.5 times as
#: long as those of 16. Other devices get the whole batch.
CHUNK = 16

__all__ = ["CELL_DIAMETER", "NUCLEUS_DIAMETER", "CPnet", "CPnetSegmenter", "load_cpnet", "network_output"]

log = logging.getLogger("biorewards")


@cache
def licence_notice() -> None:
    """Say once a process what is known about the licence of official weights."""
    log.warning(
        "Cellpose weights: every official 1-3 network but yeast_BF_cp3, yeast_PhC_cp3 and deepbacs_cp3 was trained "
        "partly on CC-BY-NC images, and its authors leave open what that means for commercial use "
        "(github.com/MouseLand/cellpose issue 192). Weights that you trained on your own images are not affected."
    )


def load_cpnet(path: str | Path) -> CPnet:
    """Read an official Cellpose 1-3 weight file; widths are taken from it. Nothing in the file is executed.

    Files of Cellpose 1 carry no diameters: then, as Cellpose does, 17 px when the file's name contains "nuclei",
    else 30. Raises FileNotFoundError, or ValueError naming the file and what does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a PyTorch weight file: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors; expected a Cellpose 1-3 weight file")
    if "W2" in state:
        raise ValueError(f"{path} is a Cellpose 4 network (it has the key 'W2'); choose --segmenter cpsam_v2 or cpsam")
    net = CPnet(_widths(state, path))
    if "diam_mean" not in state:
        diameter = torch.tensor([NUCLEUS_DIAMETER if "nuclei" in path.name else CELL_DIAMETER])
        state = {**state, "diam_mean": diameter, "diam_labels": state.get("diam_labels", diameter)}
    _check(state, net.state_dict(), path)
    net.load_state_dict(state)
    licence_notice()
    return net.eval().requires_grad_(False)


def _widths(state: dict[str, Tensor], path: Path) -> tuple[int, ...]:
    widths: list[int] = []
    while (weight := state.get(f"downsample.down.res_down_{max(len(widths) - 1, 0)}.conv.conv_0.2.weight")) is not None:
        widths += [int(size) for size in (weight.shape[:1] if widths else (weight.shape[1], weight.shape[0]))]
    if not widths:
        first = "downsample.down.res_down_0.conv.conv_0.2.weight"
        raise ValueError(f"{path} is no Cellpose 1-3 network: {_missing([first])}; it has {_some(sorted(state))}")
    return tuple(widths)


def _check(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    wrong = []
    if missing := [key for key in expected if key not in state]:
        wrong.append(_missing(missing))
    if extra := [key for key in state if key not in expected]:
        wrong.append(f"unexpected {_some(extra)}")
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{path} is no Cellpose 1-3 network: {'; '.join(wrong[:5])}")


def _missing(keys: list[str]) -> str:
    return f"missing {_some(keys)}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more keys" if len(keys) > 3 else "")


def cellpose_normalise(images: Tensor) -> Tensor:
    """Cellpose 3's scaling: each channel's 1st percentile to 0 and 99th to 1, not clipped.

    images: (B, C, H, W) float, any unit. A channel whose percentiles lie within 1e-3 becomes 0; a constant
    channel stays as it is.
    """
    images = images.float()
    low, high = (q[:, :, None, None] for q in percentile_range(images, 1, 99))
    low_end, high_end = images.aminmax(dim=3, keepdim=True)
    constant = low_end.amin(2, True) == high_end.amax(2, True)
    span = high - low
    scaled = torch.where(span > 1e-3, (images - low) / span.clamp(min=1e-3), 0)
    return torch.where(constant, images, scaled)


def network_output(net: CPnet, images: Tensor, diameter: float) -> tuple[Tensor, Tensor]:
    """Flows and logits at the images' own size.

    images: (B, 2, H, W) float, normalised, in the network's channel order. diameter: of the objects, px; the
    images are resized by `diam_mean / diameter`, and the outputs back. Returns (B, 2, H, W) and (B, H, W).
    """
    height, width = images.shape[-2:]
    rescale = float(net.diam_mean) / diameter
    size = (int(height * rescale), int(width * rescale)) if rescale != 1 else (height, width)
    if min(size) < 1:
        raise ValueError(f"diameter {diameter} px shrinks images of {height} x {width} px to nothing; give less")
    output = _resize(_padded_pass(net, _resize(images, size)), (height, width))
    return output[:, :2], output[:, 2]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with half-pixel centres, no antialiasing, as OpenCV's INTER_LINEAR.

    Places between pixels are worked out in float64: `torch.nn.functional.interpolate` has them in float32, which
    moves logits by 2e-4.
    """
    for dim, side in zip((-2, -1), size, strict=True):
        was = images.shape[dim]
        if was == side:
            continue
        at = torch.arange(side, dtype=torch.float64, device=images.device)
        at = ((at + 0.5) * (was / side) - 0.5).clamp(0, was - 1)
        low = at.long()
        share = (at - low).float()
        share = share[:, None] if dim == -2 else share
        high = (low + 1).clamp(max=was - 1)
        images = images.index_select(dim, low) * (1 - share) + images.index_select(dim, high) * share
    return images


@torch.inference_mode()
def _padded_pass(net: CPnet, images: Tensor) -> Tensor:
    """Zeros round the image to a multiple of 16, at least 8 px a side, as the networks were used in training."""
    height, width = images.shape[-2:]
    more = [-side % 16 for side in (width, width, height, height)]
    pads = [8 + (p - p // 2 if i % 2 else p // 2) for i, p in enumerate(more)]
    padded = F.pad(images, pads).contiguous(memory_format=torch.channels_last)
    output = tiled(lambda x: net(x)[0], padded, TILE, OVERLAP)
    return output[..., pads[2] : pads[2] + height, pads[0] : pads[0] + width].contiguous()


class CPnetSegmenter:
    """Cellpose 1-3 networks behind the `Segmenter` protocol, with Cellpose's own pre- and post-processing.

    nuclei, cells: a network each; a mask without its network is all zero. Channels are scaled per image to their
    1st and 99th percentiles, as the networks were trained. The cells network sees the mean of the cytoplasm
    channels, and the nucleus channel as its second.
    flow_threshold: Cellpose's 0.4; 0 = no flow check. max_size_fraction: Cellpose drops objects larger than 0.4
    of the image; that deletes real cells in crops, so it is off unless asked for.

    Cells get the diameter 30/17 of the nuclei's (the sizes the official networks work at, so both see the image at
    one scale); without a nucleus channel the diameter is that of the cells.
    """

    name = "cellpose"

    def __init__(
        self,
        nuclei: CPnet | None = None,
        cells: CPnet | None = None,
        *,
        flow_threshold: float = 0.4,
        max_size_fraction: float | None = None,
    ) -> None:
        if nuclei is None and cells is None:
            raise ValueError("give a nuclei network, a cells network or both")
        self.nuclei = nuclei
        self.cells = cells
        self.flow_threshold = flow_threshold
        self.max_size_fraction = max_size_fraction

    @classmethod
    def load(cls, *files: str | Path) -> CPnetSegmenter:
        """From two files, nuclei and cells, or one, whose `diam_mean` tells what it finds (below 23.5 px nuclei)."""
        nets = [load_cpnet(file) for file in files]
        if len(nets) == 1:
            is_nuclei = float(nets[0].diam_mean) < (NUCLEUS_DIAMETER + CELL_DIAMETER) / 2
            return cls(nuclei=nets[0]) if is_nuclei else cls(cells=nets[0])
        if len(nets) != 2:
            raise ValueError(f"got {len(nets)} weight files; give one, or two as NUCLEI,CELLS")
        return cls(*nets)

    @property
    def fingerprint(self) -> str:
        """Hash over all weights and both settings."""
        digest = hashlib.sha256(f"{self.flow_threshold} {self.max_size_fraction}".encode())
        for net in (self.nuclei, self.cells):
            digest.update(b"network")
            for key, value in net.state_dict().items() if net is not None else ():
                digest.update(key.encode() + value.cpu().numpy().tobytes())
        return f"{self.name}-{digest.hexdigest()[:12]}"

    def to(self, device: torch.device | str) -> CPnetSegmenter:
        """Move the networks; images must be on the same device."""
        for net in (self.nuclei, self.cells):
            if net is not None:
                net.to(device)
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        """See `Segmenter`. Raises ValueError when both channels are None."""
        given = nucleus if nucleus is not None else cytoplasm
        if given is None:
            raise ValueError("give a nucleus channel, a cytoplasm channel or both")
        height, width = given.shape[-2:]
        nuclei = cells = torch.zeros(len(given), height, width, dtype=torch.int32, device=given.device)
        if self.nuclei is not None and nucleus is not None:
            channels = torch.stack([nucleus, torch.zeros_like(nucleus)], 1)
            nuclei = self.masks(self.nuclei, channels, diameter)
        if self.cells is not None and cytoplasm is not None:
            body = cytoplasm.mean(1)
            channels = torch.stack([body, torch.zeros_like(body) if nucleus is None else nucleus], 1)
            ratio = 1 if nucleus is None else CELL_DIAMETER / NUCLEUS_DIAMETER
            cells = self.masks(self.cells, channels, diameter * ratio)
        return Masks(nuclei, cells)

    def masks(self, net: CPnet, channels: Tensor, diameter: float) -> Tensor:
        """What Cellpose's `eval` gives: (B, H, W) int32, for channels (B, 2, H, W) in any unit and a diameter in px."""
        if not (math.isfinite(diameter) and diameter > 0):
            raise ValueError(f"diameter is {diameter}; expected a positive number of pixels")
        steps = int(200 / (float(net.diam_mean) / diameter))
        found = []
        for part in torch.split(channels, CHUNK if channels.device.type == "cpu" else max(1, len(channels))):
            flows, logit = network_output(net, cellpose_normalise(part), diameter)
            found.append(
                masks_from_flows(
                    flows,
                    logit,
                    steps=steps,
                    flow_threshold=self.flow_threshold,
                    max_size_fraction=self.max_size_fraction,
                )
            )
        return torch.cat(found)
