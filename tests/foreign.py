"""Checkpoints as other systems write them, made without the code under test, and pickles that should be refused."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """`net` with random values everywhere: a fresh one returns 0 and would pass most tests unseen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 1 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale + (parameter.ndim == 1) * 0.1)
    return net


class Averaged(nn.Module):
    """A net, a counter and its average: what the official training script holds and saves when EMA is on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = net
        self.register_buffer("num_updates", torch.tensor(0))
        self.shadow_params = nn.ParameterList(
            nn.Parameter(p.clone().detach(), requires_grad=False) for p in net.parameters()
        )


def cellflux_content(state: Mapping[str, Tensor], average: Mapping[str, Tensor] | None, **args: Any) -> dict[str, Any]:
    """The six keys of a CellFlux file; `average` None: trained without EMA."""
    model: dict[str, Tensor] = dict(state)
    if average is not None:
        model = {"num_updates": torch.tensor(7)} | {f"model.{key}": value for key, value in state.items()}
        model |= {f"shadow_params.{i}": average[key] for i, key in enumerate(state)}
    options = {
        "dataset": "rxrx1", "use_ema": average is not None, "cfg_scale": 0.2, "ode_method": "heun2",
        "ode_options": {"nfe": 50}, "edm_schedule": True, "use_initial": 2, "noise_level": 1.0,
    }  # fmt: skip
    return {
        "model": model, "optimizer": {"state": {}, "param_groups": []}, "lr_schedule": {}, "epoch": 3, "scaler": {},
        "args": types.SimpleNamespace(**{**options, **args}),
    }  # fmt: skip


class Call:
    """Pickles to a call of `function`: run, if a reader runs what it reads."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def touches(marker: Path) -> Call:
    """A pickle whose reading would make the file `marker`."""
    return Call(os.system, f"touch '{marker}'")
