"""Fixed-step solvers of dx/dt = v(x, t) from t = 0 (source) to t = 1 (image), and their time grids.

The rules are those of torchdiffeq's fixed-grid solvers; the grids those of CellFlux (EDM: Karras et al. 2022, eq. 5,
with t = 1 / (1 + sigma)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

#: v(x, t) -> velocity, like x.
Velocity = Callable[[Tensor, float], Tensor]
#: Velocity calls per step.
CALLS = {"euler": 1, "midpoint": 2, "heun2": 2}
GRIDS = ("edm", "uniform")


def edm_times(steps: int) -> list[float]:
    """The EDM grid: steps + 1 times, dense near t = 1. It starts at 1/81, where the source is placed unchanged.

    Raises ValueError for fewer than 2 steps (the formula divides by steps - 1).
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: the EDM grid has at least 2 (with fewer, use grid='uniform')")
    high, low, rho = 80.0, 0.002, 7.0
    ramp = np.arange(steps, dtype=np.float64) / (steps - 1)
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [float(t) for t in 1 / (1 + np.append(sigma, 0.0))]


def uniform_times(steps: int | None = None, step_size: float | None = None) -> list[float]:
    """Equal steps on [0, 1]: `steps` of them, or steps of `step_size`, the last one cut at 1. Raises ValueError."""
    if step_size is None:
        if steps is None or steps < 1:
            raise ValueError(f"steps={steps}: at least 1")
        return [float(t) for t in np.linspace(0.0, 1.0, steps + 1)]
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size={step_size}: a number above 0, at most 1")
    count = math.ceil(1 / step_size + 1)
    return [min(i * step_size, 1.0) for i in range(count - 1)] + [1.0]


@dataclass(frozen=True)
class Solver:
    """How a flow is integrated. method: a key of `CALLS`. grid: `edm` or `uniform`. steps, or step_size (uniform only).

    CellFlux's published samples: heun2, edm, 50 steps = 100 velocity calls.
    """

    method: str = "heun2"
    grid: str = "edm"
    steps: int = 50
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.method not in CALLS:
            raise ValueError(f"solver={self.method!r}: one of {', '.join(CALLS)}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid={self.grid!r}: one of {', '.join(GRIDS)}")
        if self.step_size is not None and self.grid != "uniform":
            raise ValueError("step_size belongs to grid='uniform'; the EDM grid takes steps")
        self.times()

    def times(self, steps: int | None = None) -> list[float]:
        """The time grid; `steps` overrides the solver's own number."""
        if self.grid == "edm":
            return edm_times(self.steps if steps is None else steps)
        if steps is not None:
            return uniform_times(steps)
        return uniform_times(self.steps, self.step_size)

    def calls(self, steps: int | None = None) -> int:
        """Velocity calls of one sample; guidance makes each two network passes."""
        return CALLS[self.method] * (len(self.times(steps)) - 1)

    def __call__(self, velocity: Velocity, x: Tensor, steps: int | None = None) -> Tensor:
        """The state at t = 1 from the source x. No clamp."""
        return integrate(velocity, x, self.times(steps), self.method)


def integrate(velocity: Velocity, x: Tensor, times: Sequence[float], method: str) -> Tensor:
    """The state at times[-1] from the state x at times[0], one step between neighbours of `times`."""
    for state in trajectory(velocity, x, times, method):
        x = state
    return x


def trajectory(velocity: Velocity, x: Tensor, times: Sequence[float], method: str) -> Iterator[Tensor]:
    """The states after each step, len(times) - 1 of them.

    euler: x + dt v(x, t). midpoint: x + dt v(x + dt/2 v(x, t), t + dt/2). heun2: x + dt/2 (k1 + k2) with
    k1 = v(x, t), k2 = v(x + dt k1, t + dt).
    """
    if method not in CALLS:
        raise ValueError(f"solver={method!r}: one of {', '.join(CALLS)}")
    for start, end in pairwise(times):
        dt = end - start
        k = velocity(x, start)
        if method == "midpoint":
            k = velocity(x + dt / 2 * k, start + dt / 2)
        elif method == "heun2":
            k = (k + velocity(x + dt * k, end)) / 2
        x = x + dt * k
        yield x
