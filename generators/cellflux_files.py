"""CellFlux's own checkpoint files: the layout that its training script writes and its evaluation reads.

A dictionary of `model`, `optimizer`, `lr_schedule`, `epoch`, `scaler` and `args`. With an average (EMA) `model` holds
`num_updates`, the raw weights as `model.<name>`, and the average as `shadow_params.<i>`, matched by position.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from biorewards.io.tables import atomic
from generators.adm import GROUPS, AdmConfig, AdmNet, infer_config
from generators.checkpoints import CheckpointError, fill, read_own, read_pickle, shapes_of
from generators.embeddings import CompoundTable
from generators.solvers import Solver

#: `args.use_initial` of the official code.
SOURCES = ("noise", "control", "control_plus_noise")
#: A gradient scaler at its start. Not {}: a scaler that is switched on refuses an empty state.
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
#: Tables of IMPA's archive -> what they hold; CellFlux's BBBC021 runs use the first.
_FINGERPRINTS = {"emb_fp.csv": "counts", "emb_fp_all.csv": "binary"}
#: Name of the table's values among the tensors of a .safetensors file.
TABLE = "compounds"
#: Options of sampling that a file keeps.
SAMPLING = ("source", "noise_level", "guidance", "solver", "grid", "steps", "step_size")
#: Keys at the top of other systems' files -> what they are.
_OTHERS = (
    ({"generator", "mapping_network"}, "a checkpoint of IMPA (generator 'impa')"),
    ({"ddp", "ema"}, "a checkpoint of MiT (generator 'mit')"),
    ({"embedding_matrix"}, "an embedding file of IMPA"),
    ({"hyper_parameters", "state_dict"}, "a Lightning checkpoint"),
)


@dataclass
class Origin:
    """What a file says beside its weights; kept so that it can be written back.

    args: plain values only. average: the file holds an average (EMA) beside the raw weights.
    """

    args: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    num_updates: int = 0
    average: bool = True


def read_official(path: Path, weights: str | None) -> tuple[dict[str, Tensor], str, Origin]:
    """(state dict with bare names, "ema" or "raw", origin) of a file. Raises CheckpointError.

    weights: "ema", "raw", or None: the average where the file has one, as the official evaluation does.
    A bare state dict is read, too.
    """
    content = read_pickle(path)
    model = content.get("model", content)
    if not isinstance(model, dict) or not any(str(key).endswith("mol_embed_transform.weight") for key in model):
        what = next((f"; it looks like {text}" for keys, text in _OTHERS if keys <= set(content)), "")
        some = ", ".join(repr(key) for key in list(content)[:6])
        raise CheckpointError(f"{path}: no CellFlux checkpoint (no mol_embed_transform.weight; it has {some}){what}")
    model = {str(key): value for key, value in model.items()}
    args = content.get("args", {})
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    averaged = [key for key in model if key.startswith("shadow_params.")]
    origin = Origin(
        args={str(key): _plain(value) for key, value in args.items()},
        epoch=_whole(content.get("epoch", 0), "epoch", path),
        num_updates=_whole(model.pop("num_updates", 0), "num_updates", path),
        average=bool(averaged),
    )
    if weights == "ema" and not averaged:
        raise CheckpointError(f"{path}: has no averaged weights (shadow_params); load it with weights='raw'")
    if not averaged:
        return model, "raw", origin
    names = [key.removeprefix("model.") for key in model if key.startswith("model.")]
    if weights == "raw":
        return {name: model[f"model.{name}"] for name in names}, "raw", origin
    if set(averaged) != {f"shadow_params.{i}" for i in range(len(names))}:
        raise CheckpointError(
            f"{path}: {len(averaged)} averaged tensors (shadow_params) for {len(names)} weights; they are matched by "
            "position, so the file is not whole. The raw weights can be had with weights='raw'"
        )
    state = {name: model[f"shadow_params.{i}"] for i, name in enumerate(names)}
    for name in names:
        raw, mean = model[f"model.{name}"], state[name]
        if getattr(raw, "shape", None) != getattr(mean, "shape", None):
            raise CheckpointError(f"{path}: the averaged weight at the place of {name} has another shape")
    return state, "ema", origin


def _whole(value: Any, key: str, path: Path) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if not isinstance(value, int):
        raise CheckpointError(f"{path}: {key} is {type(value).__name__}, wanted a whole number")
    return int(value)


def _plain(value: Any) -> Any:
    """Options as JSON holds them: paths and anything unusual become text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, PurePath) else repr(value)


def sampling_of(args: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """The official sampling options as options of `cellflux.load`; the published evaluation's where a file is silent.

    Keys: `SAMPLING`; `resolve` checks the values.
    """
    initial = args.get("use_initial", 2)
    if initial not in range(len(SOURCES)):
        raise CheckpointError(f"{path}: args.use_initial is {initial}, wanted 0, 1 or 2")
    options = args.get("ode_options") or {}
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: args.ode_options is {options!r}, wanted a dictionary")
    edm = bool(args.get("edm_schedule", True))
    return {
        "source": SOURCES[int(initial)],
        "noise_level": args.get("noise_level", 1.0),
        "guidance": args.get("cfg_scale", 0.2),
        "solver": args.get("ode_method", "heun2"),
        "grid": "edm" if edm else "uniform",
        "steps": options.get("nfe", 50) if edm else None,
        "step_size": None if edm else options.get("step_size", 0.01),
    }


def resolve(sampling: Mapping[str, Any], chosen: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `CellFlux` from a file's sampling options and the caller's (None: not given); the caller's win.

    Raises ValueError naming the option and the file for values that no sampler can have.
    """
    merged = {**sampling, **{key: value for key, value in chosen.items() if value is not None}}
    if chosen["grid"] is not None and chosen["grid"] != sampling["grid"]:
        # Steps and step size of the other grid mean nothing here.
        merged |= {key: chosen[key] for key in ("steps", "step_size")}
    elif chosen["steps"] is not None:
        merged["step_size"] = chosen["step_size"]
    for key in ("noise_level", "guidance", "steps", "step_size"):
        value, wanted = merged[key], int if key == "steps" else int | float
        empty = value is None and key in ("steps", "step_size")
        if not empty and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise ValueError(f"{path}: {key} is {value!r}, wanted a number")
    try:
        solver = Solver(
            merged["solver"], merged["grid"], Solver.steps if merged["steps"] is None else merged["steps"],
            merged["step_size"],
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {
        "source_mode": merged["source"], "noise_level": merged["noise_level"], "guidance": merged["guidance"],
        "solver": solver,
    }  # fmt: skip


def read(path: Path, weights: str | None) -> tuple[AdmNet, CompoundTable | None, dict[str, Any]]:
    """Network, compound table and settings of a .pth or .safetensors file. Raises CheckpointError.

    Settings: `sampling` (options of `cellflux.load`), `weights`, `fingerprints`, `origin`, perhaps `dequantise`.
    """
    return (_read_own if path.suffix == ".safetensors" else _read_foreign)(path, weights)


def _read_foreign(path: Path, weights: str | None) -> tuple[AdmNet, CompoundTable | None, dict[str, Any]]:
    state, which, origin = read_official(path, weights)
    table = str(origin.args.get("embedding_path", "")).replace("\\", "/").rpartition("/")[2]
    counts = str(origin.args.get("dataset", "")).startswith("bbbc021")
    kept = {
        "sampling": sampling_of(origin.args, path), "weights": which, "origin": origin,
        "fingerprints": _FINGERPRINTS.get(table, "counts" if counts else "any"),
    }  # fmt: skip
    return _network(state, path), None, kept


def _read_own(path: Path, weights: str | None) -> tuple[AdmNet, CompoundTable | None, dict[str, Any]]:
    state, config = read_own(path, "cellflux")
    try:
        kept = {key: config[key] for key in ("weights", "fingerprints", "dequantise")}
        kept["sampling"] = {key: config["sampling"][key] for key in SAMPLING}
        kept["origin"] = Origin(**config["origin"])
        groups, dropout = int(config["net"].get("groups", GROUPS)), float(config["net"]["dropout"])
        values = state.pop(TABLE) if "compounds" in config else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its JSON is not whole ({type(error).__name__}: {error})") from None
    if weights not in (None, kept["weights"]):
        raise CheckpointError(
            f"{path}: holds the weights {kept['weights']!r}; convert the original file with weights={weights!r}"
        )
    table = None if values is None else CompoundTable(list(config["compounds"]), values, str(path))
    return _network(state, path, groups, dropout), table, kept


def _network(state: Mapping[str, Any], path: Path, groups: int = GROUPS, dropout: float = 0.3) -> AdmNet:
    """The network that the shapes tell, filled. groups, dropout: what they do not tell.

    It is made without memory first, so a wrong file costs nothing.
    """
    shapes = shapes_of(state, path)
    try:
        config = infer_config(shapes, groups, dropout)
    except ValueError as error:
        raise CheckpointError(f"{path}: no CellFlux network: {error}") from None
    with torch.device("meta"):
        net = AdmNet(config)
    fill(net.to_empty(device="cpu"), state, path)
    return net.eval()


def write_official(path: Path, net: nn.Module, raw: Mapping[str, Tensor] | None, origin: Origin) -> None:
    """Write `net` in the official layout, with an average where the original had one (a new network has, too).

    `net` is the average then, and `raw` (default: the same weights) the raw weights; without an average `net` is all.
    The six keys have the form that the official loader takes: an AdamW state without moments, a constant learning
    rate, a fresh gradient scaler, and args as types.SimpleNamespace. Raises ValueError for `raw` without an average,
    and for a network that the official code would compute in another way.
    """
    if (groups := getattr(net, "config", AdmConfig()).groups) != GROUPS:
        raise ValueError(f"{path}: this network has {groups} groups, the official code {GROUPS}; write .safetensors")
    weights = {name: p.detach().cpu().contiguous() for name, p in net.named_parameters()}
    if origin.average:
        model: dict[str, Tensor] = {"num_updates": torch.tensor(origin.num_updates, dtype=torch.int64)}
        model |= {f"model.{name}": (raw or weights)[name].detach().cpu().contiguous() for name in weights}
        model |= {f"shadow_params.{i}": value for i, value in enumerate(weights.values())}
    elif raw is not None:
        raise ValueError(f"{path}: the original file has no average, so raw weights have no place beside the network's")
    else:
        model = weights
    # Stand-ins: the optimiser's form is torch's own, and nothing is carried over. Its list counts the average, too.
    stand_ins = [nn.Parameter(torch.zeros(1)) for _ in range((1 + origin.average) * len(weights))]
    optimizer = torch.optim.AdamW(stand_ins, lr=1e-4, betas=(0.9, 0.95))
    content = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "lr_schedule": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1).state_dict(),
        "epoch": origin.epoch,
        "scaler": SCALER,
        "args": types.SimpleNamespace(**{**origin.args, "use_ema": origin.average}),
    }
    with atomic(path) as (temporary,):
        torch.save(content, temporary)
