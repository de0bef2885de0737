"""The adaptive solver of MiT's published samples: Dormand-Prince 5(4), by torchdiffeq (extra `generators`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generators.solvers import CALLS, Solver, Velocity

INSTALL = 'pip install "biorewards[generators]"'


@dataclass(frozen=True)
class Dopri5:
    """Integrates from t = 0 to t = 1 to a relative and absolute tolerance, with as many steps as that takes.

    As in torchdiffeq the last step runs past 1 and is interpolated back, and the error is that of the whole batch: an
    image depends on its neighbours, by less than the tolerance allows (6e-5 in MiT's reference data).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method = "dopri5"

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol={self.rtol}, atol={self.atol}: both above 0")
        if importlib.util.find_spec("torchdiffeq") is None:
            raise ImportError(f"solver='dopri5' needs torchdiffeq: {INSTALL} (or choose a fixed-step solver)")

    def __call__(self, velocity: Velocity, x: Tensor, steps: int | None = None) -> Tensor:
        """The state at t = 1 from the source x. Raises ValueError for `steps`: the tolerance decides."""
        if steps is not None:
            raise ValueError(f"steps={steps}: dopri5 chooses its own; load the generator with solver='heun2' for it")
        from torchdiffeq import odeint

        ends = torch.tensor([0.0, 1.0], device=x.device)
        states: Tensor = odeint(
            lambda t, state: velocity(state, float(t)), x, ends, rtol=self.rtol, atol=self.atol, method=self.method
        )
        return states[-1]


def choose(own: Mapping[str, Any], given: Mapping[str, Any]) -> Solver | Dopri5:
    """The solver that a file names (`own`: solver and its options), with options that the caller gave (not None) in
    place of its own. Raises ValueError for an unknown solver, and for an option that this one does not take.
    """
    method = own.get("solver", Dopri5.method)
    options = {key: value for key, value in given.items() if value is not None}
    fields = ("rtol", "atol") if method == Dopri5.method else ("grid", "steps", "step_size")
    if strange := sorted(set(options) - set(fields)):
        raise ValueError(f"{strange[0]}={options[strange[0]]}: the solver {method!r} takes {', '.join(fields)} only")
    kept = {key: own[key] for key in fields if own.get(key) is not None}
    if {"steps", "step_size"} & set(options):
        kept = {key: value for key, value in kept.items() if key not in ("steps", "step_size")}
    if method == Dopri5.method:
        return Dopri5(**kept | options)
    if method not in CALLS:
        raise ValueError(f"solver={method!r}: one of {', '.join([*CALLS, Dopri5.method])}")
    return Solver(method, **{"grid": "uniform"} | kept | options)
