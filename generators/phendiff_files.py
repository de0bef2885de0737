"""PhenDiff's folder: `unet/` and `scheduler/` in diffusers' layout, read without diffusers' own loader.

`model_index.json` names classes of PhenDiff's code, which a generic pipeline loader cannot import; the two folders are
all that is needed. The network is the stock UNet2DModel.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generators.adaptive import INSTALL
from generators.checkpoints import CheckpointError, fill, locate, read_own, read_pickle, read_safetensors, shapes_of
from generators.names import stored_names, stored_settings

UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin")
#: Settings of sampling that our own files keep -> what they may be, None aside.
KEPT = {
    "start": str, "control_class": str, "guidance": int | float, "guidance_form": str, "steps": int,
    "skip": int | float,
}  # fmt: skip
#: The longest schedule that is believed; published ones have 1000 or 3000 steps.
MOST_TIMES = 100_000
#: What diffusers raises for configurations that make no sense.
_REFUSED = (
    ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ArithmeticError, RuntimeError,
)  # fmt: skip


def diffusers() -> Any:
    """The package. Raises ImportError naming the extra where it is missing."""
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError(f"PhenDiff needs the diffusers package: {INSTALL}")
    return importlib.import_module("diffusers")


class PhenDiffNet(nn.Module):
    """diffusers' UNet2DModel with its class table beside it, so that a zero vector can mean "no class".

    config: arguments of UNet2DModel.
    """

    def __init__(self, unet: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        table = unet.class_embedding
        assert isinstance(table, nn.Embedding)
        unet.class_embedding = nn.Identity()
        self.unet = unet
        self.class_embedding = table
        self.config = config

    def forward(self, x: Tensor, t: int, classes: Tensor) -> Tensor:
        """x (B, C, H, W), training time t, class vectors (B, D) -> prediction (B, C, H, W)."""
        out: Tensor = self.unet(x, t, class_labels=classes, return_dict=False)[0]
        return out

    def official(self) -> dict[str, Tensor]:
        """The state dict under UNet2DModel's own names."""
        return {**self.unet.state_dict(), "class_embedding.weight": self.class_embedding.weight}


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds. paths: of weights, network and scheduler configuration, for messages."""

    state: dict[str, Any]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    paths: tuple[Path, Path, Path]
    compounds: list[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def find(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder, or our .safetensors file. Raises FileNotFoundError, CheckpointError, OSError."""
    text = os.fspath(checkpoint)
    name = Path(text.partition("@")[0] if text.startswith("hf:") else text).name
    if name.endswith(".safetensors"):
        return locate(checkpoint)
    return locate(checkpoint, files=[UNET, SCHEDULER], optional=WEIGHTS)


def read(path: Path) -> Parts:
    """Weights and configurations. Raises CheckpointError, FileNotFoundError."""
    if path.suffix == ".safetensors":
        state, config = read_own(path, "phendiff")
        try:
            unet, schedule, names = dict(config["unet"]), dict(config["scheduler"]), config["compounds"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its JSON is not whole ({error})") from None
        sampling = stored_settings(config.get("sampling"), KEPT, path)
        return Parts(dict(state), unet, schedule, (path, path, path), stored_names(names, path), sampling)
    if not (held := [path / name for name in WEIGHTS if (path / name).exists()]):
        raise FileNotFoundError(f"{path / WEIGHTS[0]}: no such file (nor {Path(WEIGHTS[1]).name})")
    weights = held[0]
    read_weights = read_safetensors if weights.suffix == ".safetensors" else read_pickle
    return Parts(
        dict(read_weights(weights)), _json(path / UNET), _json(path / SCHEDULER),
        (weights, path / UNET, path / SCHEDULER),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, wanted an object")
    return content


def _arguments(config: dict[str, Any], kind: Any, path: Path) -> dict[str, Any]:
    """The configuration as arguments of a diffusers class. Raises CheckpointError for one that it does not have."""
    known = set(inspect.signature(kind.__init__).parameters)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(set(kept) - known):
        version = diffusers().__version__
        raise CheckpointError(f"{path}: {unknown[0]} is no option of {kind.__name__} in diffusers {version}; update it")
    return kept


def network(parts: Parts) -> PhenDiffNet:
    """The denoiser, filled. Made without memory first, so a wrong file costs nothing. Raises CheckpointError."""
    weights, path, _ = parts.paths
    if (kind := parts.unet.get("_class_name", "UNet2DModel")) not in ("UNet2DModel", "CustomCondUNet2DModel"):
        raise CheckpointError(f"{path}: _class_name is {kind}; PhenDiff in pixel space has a UNet2DModel")
    model = diffusers().UNet2DModel
    config = _arguments(parts.unet, model, path)
    if not isinstance(classes := config.get("num_class_embeds"), int) or classes < 1 or config.get("class_embed_type"):
        raise CheckpointError(f"{path}: num_class_embeds is {classes}: not a network with a table of classes")
    if (inputs := config.get("in_channels", 3)) != (outputs := config.get("out_channels", 3)):
        raise CheckpointError(f"{path}: in_channels {inputs}, out_channels {outputs}: wanted as many in as out")
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) or not 1 <= layers <= len(parts.state):
        raise CheckpointError(f"{path}: layers_per_block is {layers!r}; the weights have {len(parts.state)} tensors")
    shapes_of(parts.state, weights)
    try:
        with torch.device("meta"):
            hollow = model(**config)
    except _REFUSED as error:
        raise CheckpointError(f"{path}: diffusers cannot build this network: {error!r:.200}") from None
    fill(hollow, parts.state, weights)
    unet = model(**config)
    fill(unet, parts.state, weights)
    return PhenDiffNet(unet, {"in_channels": inputs, **config})


def scheduler(parts: Parts) -> Any:
    """diffusers' DDIMScheduler of the configuration. Raises CheckpointError."""
    path = parts.paths[2]
    if (kind := parts.scheduler.get("_class_name", "DDIMScheduler")) != "DDIMScheduler":
        raise CheckpointError(f"{path}: _class_name is {kind}; PhenDiff has a DDIMScheduler")
    model = diffusers().DDIMScheduler
    config = _arguments(parts.scheduler, model, path)
    times = config.get("num_train_timesteps", 1000)
    if not isinstance(times, int) or not 1 <= times <= MOST_TIMES:
        raise CheckpointError(f"{path}: num_train_timesteps is {times!r}; from 1 to {MOST_TIMES}")
    try:
        made = model(**config)
        made.set_timesteps(1)
    except _REFUSED as error:
        raise CheckpointError(f"{path}: diffusers cannot build this schedule: {error!r:.200}") from None
    return made


def inverse_of(schedule: Any) -> Any:
    """diffusers' DDIMInverseScheduler of a schedule, with the options that both have."""
    model = diffusers().DDIMInverseScheduler
    known = set(inspect.signature(model.__init__).parameters)
    return model(**{key: value for key, value in dict(schedule.config).items() if key in known})
