"""Solvers and time grids against closed forms and the official grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from generators.solvers import CALLS, Solver, edm_times, integrate, trajectory, uniform_times


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_edm_grid_is_the_official_one(shared: Path, steps: int) -> None:
    expected = np.load(shared / "golden" / "cellflux_tiny" / "expected.npz")[f"edm_grid_{steps}"]
    np.testing.assert_allclose(edm_times(steps), expected, rtol=0, atol=1e-12)


def test_edm_grid_starts_at_a_fixed_time_and_ends_at_one() -> None:
    for steps in (2, 3, 100):
        times = edm_times(steps)
        assert len(times) == steps + 1
        assert times[0] == pytest.approx(1 / 81)
        assert times[-1] == 1.0
        assert all(np.diff(times) > 0)


def test_uniform_grid_cuts_its_last_step() -> None:
    assert uniform_times(step_size=0.3) == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert uniform_times(step_size=0.25) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert len(uniform_times(step_size=0.01)) == 101
    assert uniform_times(step_size=1) == [0, 1]
    assert uniform_times(4) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2)])
def test_order_of_convergence(method: str, order: int) -> None:
    """dx/dt = x cos t has the solution x0 exp(sin t); halving the step divides the error by 2^order."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def error(steps: int) -> float:
        end = integrate(lambda x, t: x * math.cos(t), start, uniform_times(steps), method)
        return float((end - start * math.exp(math.sin(1.0))).abs().max())

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("method", CALLS)
def test_calls_are_counted_as_made(method: str) -> None:
    solver, calls = Solver(method, "edm", 6), []
    solver(lambda x, t: calls.append(t) or x, torch.ones(1))
    assert len(calls) == solver.calls()
    assert max(calls) <= 1.0


def test_trajectory_gives_every_state() -> None:
    states = list(trajectory(lambda x, t: torch.ones_like(x), torch.zeros(2), uniform_times(4), "heun2"))
    assert [float(state[0]) for state in states] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_steps_override_either_form_of_a_uniform_grid() -> None:
    assert len(Solver("euler", "uniform", step_size=0.1).times()) == 11
    assert len(Solver("euler", "uniform", step_size=0.1).times(4)) == 5
    assert len(Solver("euler", "edm", 10).times(3)) == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Solver("rk4"), "euler, midpoint, heun2"),
        (lambda: Solver("edm_heun"), "solver='edm_heun'"),
        (lambda: Solver(grid="cosine"), "edm, uniform"),
        (lambda: Solver(steps=1), "at least 2"),
        (lambda: Solver(grid="uniform", steps=0), "at least 1"),
        (lambda: Solver(step_size=0.1), "grid='uniform'"),
        (lambda: Solver(grid="uniform", step_size=0.0), "above 0"),
        (lambda: integrate(lambda x, t: x, torch.ones(1), [0.0, 1.0], "rk4"), "euler"),
    ],
)
def test_errors_say_what_there_is(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
