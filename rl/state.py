"""The state of a run in one file, whole or not at all; a run that goes on from it is the one that never stopped.

The draws of a step are functions of (seed, step), so the sampler's position is the step. The global random streams are
kept all the same, for rewards and generators that draw from them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from biorewards.io.tables import atomic

if TYPE_CHECKING:
    from rl.nft import Learner

FORMAT = 1
#: A later state may differ from the run's beginning in these alone.
MAY_CHANGE = ("steps",)


class StateError(ValueError):
    """A state that cannot be gone on from; says what differs."""


def save_state(path: Path, learner: Learner, run: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write weights (trained, lagged, average, base), optimiser, random streams and step; all processes must call it.

    run: what a resumed run must share (settings, digests of base and rewards); progress: best so far and so on, JSON.
    """
    accelerator = learner.accelerator
    chance = accelerator.gather(random_state().to(accelerator.device)[None]).cpu()
    if not accelerator.is_main_process:
        return
    tensors = {"random": chance}
    for name, net in networks(learner).items():
        tensors |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
    for number, kept in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in kept.items()}
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    about = {
        "format": FORMAT, "step": learner.step, "updates": learner.updates, "run": run, "progress": progress,
        "scaler": scaler,
    }  # fmt: skip
    with atomic(path) as (temporary,):
        whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(whole, temporary, {"state": json.dumps(about, sort_keys=True)})


def load_state(path: Path, learner: Learner, run: dict[str, Any]) -> dict[str, Any]:
    """Put a learner where the state left it and return `progress`. Raises StateError: another run, or no whole file."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"{path}: is no state of a run ({error})") from None
    except FileNotFoundError:
        raise StateError(f"{path}: there is no state to resume from; start without --resume") from None
    if about.get("format") != FORMAT:
        raise StateError(f"{path}: written by another version (format {about.get('format')}, this one reads {FORMAT})")
    check_same(path, about["run"], run)
    for name, net in networks(learner).items():
        net.load_state_dict(_part(tensors, f"{name}."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(tensors, "optimizer.").items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if about["scaler"] is not None and learner.accelerator.scaler is not None:
        learner.accelerator.scaler.load_state_dict(about["scaler"])
    learner.step, learner.updates = about["step"], about["updates"]
    if learner.accelerator.process_index < len(tensors["random"]):
        set_random_state(tensors["random"][learner.accelerator.process_index])
    progress: dict[str, Any] = about["progress"]
    return progress


def check_same(path: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise StateError naming the first thing in which two runs differ."""
    now = json.loads(json.dumps(now))
    for key in sorted(set(kept) | set(now)):
        if key not in MAY_CHANGE and kept.get(key) != now.get(key):
            raise StateError(
                f"{path}: this run was started with {key} {kept.get(key)!r}, now it is {now.get(key)!r}; give what it "
                "was started with, or another --out"
            )


def networks(learner: Learner) -> dict[str, torch.nn.Module]:
    """The four networks of a run by the name that the file gives them."""
    return {
        "trained": learner.trained.net, "old": learner.old.net, "average": learner.average.net,
        "base": learner.base.net,
    }  # fmt: skip


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def random_state() -> Tensor:
    """The global streams of torch (CPU, current GPU), numpy and Python as one row of bytes (uint8)."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (the global stream itself)
    parts = [
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.zeros(0, dtype=torch.uint8),
        _bytes(np.array([version, *words], dtype=np.int64)),
        _bytes(np.array([gauss is not None, gauss or 0.0], dtype=np.float64)),
        _bytes(np.asarray(keys, dtype=np.uint32)),
        _bytes(np.array([position, has_gauss, cached], dtype=np.float64)),
    ]
    sizes = _bytes(np.array([len(part) for part in parts], dtype=np.int64))
    return torch.cat([sizes, *parts])


def set_random_state(row: Tensor) -> None:
    """Undo `random_state`."""
    row = row.cpu()
    sizes = row[: 8 * 6].clone().numpy().view(np.int64).tolist()
    # Copies: a slice need not lie where the numbers in it may be read.
    cpu, gpu, python, gauss, keys, rest = (part.clone() for part in torch.split(row[8 * 6 :], sizes))
    torch.set_rng_state(cpu)
    if len(gpu) and torch.cuda.is_available():
        torch.cuda.set_rng_state(gpu)
    version, *words = python.numpy().view(np.int64).tolist()
    there, value = gauss.numpy().view(np.float64).tolist()
    random.setstate((version, tuple(words), value if there else None))
    position, has_gauss, cached = rest.numpy().view(np.float64).tolist()
    words_of_numpy = keys.numpy().view(np.uint32)
    np.random.set_state(("MT19937", words_of_numpy, int(position), int(has_gauss), cached))  # noqa: NPY002


def _bytes(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(array.tobytes(), dtype=np.uint8).copy())
