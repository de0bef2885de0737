"""Cellpose 4 networks through the `cellpose` package, with weights that the user has.

The package runs the network; masks are made here, for the whole batch (`masks_from_flows`). Cellpose 4 follows flows
with half-pixel sampling, we with pixel-centred sampling as Cellpose 3 does on CPU: on 24 reference crops counts are
equal and outlines agree with a mean IoU of 0.997.

Nothing is downloaded and no other network ever stands in: the package itself would do both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pickle
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biorewards.segmentation.cpnet import CELL_DIAMETER, NUCLEUS_DIAMETER, cellpose_normalise
from biorewards.segmentation.flows import masks_from_flows
from biorewards.segmentation.segmenter import Masks

#: Official networks, by the name that their weight files have.
NAMES = ("cpsam_v2", "cpsam", "cpdino", "cpdino-vitb")
#: Object size that the package resizes to, px.
WORKING_DIAMETER = 30.0
INSTALL = 'pip install "biorewards[cellpose4]"'


def holds_cellpose4(path: str | Path) -> bool:
    """Whether a file is a Cellpose 4 weight file (it has the key `W2`). False for anything that cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        return False
    return isinstance(state, dict) and "W2" in state


def _models() -> Any:
    """The package's `models` module. Raises ImportError when it is absent or older than 4."""
    if importlib.util.find_spec("cellpose") is None:
        raise ImportError(f"Cellpose 4 networks need the cellpose package: {INSTALL}")
    version = metadata.version("cellpose")
    if int(version.split(".")[0]) < 4:
        raise ImportError(f"cellpose {version} is installed and has no Cellpose 4 networks: {INSTALL}")
    from cellpose import models

    return models


class Cellpose4Segmenter:
    """A Cellpose 4 network behind the `Segmenter` protocol.

    model: a `cellpose.models.CellposeModel` of version 4. digest: what names its weights in the fingerprint.
    Nuclei are found in the nucleus channel alone, cells in (mean of the cytoplasm channels, nucleus); each channel is
    scaled per image to its 1st and 99th percentiles, and a constant channel is zero.
    flow_threshold, max_size_fraction: as in `masks_from_flows`; Cellpose has 0.4 for both, the second is off here as it
    deletes real cells in crops. Cells get 30/17 of the nuclei's diameter; without a nucleus channel the diameter is
    that of the cells.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        digest: str,
        *,
        flow_threshold: float = 0.4,
        max_size_fraction: float | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.digest = digest
        self.flow_threshold = flow_threshold
        self.max_size_fraction = max_size_fraction

    @classmethod
    def load(cls, name_or_path: str | Path, device: torch.device | str = "cpu") -> Cellpose4Segmenter:
        """An official network by name, from Cellpose's model folder, or a weight file.

        Raises ImportError when the cellpose package (or, for cpdino, dinov3) is missing or too old, FileNotFoundError
        naming the file looked for, ValueError when the file's entries are not those of the network.
        """
        models = _models()
        path = models.MODEL_DIR / str(name_or_path) if str(name_or_path) in NAMES else Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights for {name_or_path}: {path} does not exist; put the file there (Cellpose downloads it when "
                f"you run it once yourself) or give a weight file's path"
            )
        if not holds_cellpose4(path):
            raise ValueError(f"{path} is not a Cellpose 4 weight file: it has no entry 'W2'")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if "encoder.cls_token" in state and importlib.util.find_spec("dinov3") is None:
            raise ImportError(f"{path} is a DINOv3 network; install Meta's dinov3 package, which has its own licence")
        model = models.CellposeModel(pretrained_model=str(path), device=torch.device(device))
        _check(state, model.net, path)
        return cls(model, path.name, _digest(path))

    @property
    def fingerprint(self) -> str:
        """Name, hash of the weight file, precision and both settings."""
        settings = f"{self.digest} {self.model.net.dtype} {self.flow_threshold} {self.max_size_fraction}"
        return f"{self.name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def to(self, device: torch.device | str) -> Cellpose4Segmenter:
        """Run the network on this device; images may be on any."""
        self.model.device = torch.device(device)
        self.model.net.to(self.model.device)
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        """See `Segmenter`. Raises ValueError when both channels are None."""
        given = nucleus if nucleus is not None else cytoplasm
        if given is None:
            raise ValueError("give a nucleus channel, a cytoplasm channel or both")
        zero = given.new_zeros(len(given), *given.shape[-2:])
        nuclei = cells = zero.int()
        if nucleus is not None and len(given):
            nuclei = self._masks(torch.stack([nucleus, zero, zero], 1), diameter)
        if cytoplasm is not None and len(given):
            channels = torch.stack([cytoplasm.mean(1), zero if nucleus is None else nucleus, zero], 1)
            cells = self._masks(channels, diameter * (1 if nucleus is None else CELL_DIAMETER / NUCLEUS_DIAMETER))
        return Masks(nuclei, cells)

    def _masks(self, channels: Tensor, diameter: float) -> Tensor:
        flat = channels.flatten(2)
        constant = flat.amax(2) == flat.amin(2)
        # Scaled here: for stacks the package zeroes a constant channel only when it is constant in every image.
        scaled = torch.where(constant[:, :, None, None], 0, cellpose_normalise(channels))
        stack = np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())
        _, (_, flows, logit), _ = self.model.eval(
            stack, channel_axis=-1, normalize=False, diameter=diameter, compute_masks=False
        )
        n, _, height, width = channels.shape
        flows = torch.from_numpy(np.ascontiguousarray(flows, np.float32)).reshape(2, n, height, width).movedim(0, 1)
        logit = torch.from_numpy(np.ascontiguousarray(logit, np.float32)).reshape(n, height, width)
        return masks_from_flows(
            flows.to(channels.device),
            logit.to(channels.device),
            steps=int(200 / (WORKING_DIAMETER / diameter)),
            flow_threshold=self.flow_threshold,
            max_size_fraction=self.max_size_fraction,
        )


def _check(state: dict[str, Tensor], net: torch.nn.Module, path: Path) -> None:
    """The package loads what fits and leaves the rest at random values; refuse that."""
    expected = net.state_dict()
    # Files of other versions lack the two diameters or have them; they take no part in the network's output.
    unused = {"diam_mean", "diam_labels"}
    differing = sorted((expected.keys() ^ state.keys()) - unused)
    differing += [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if differing:
        shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise ValueError(f"{path} does not fit the network: missing, extra or misshapen {shown}")


@functools.cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
