"""CellFlux against the outputs of the official code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import generators
from generators.adm import AdmConfig, sinusoid
from generators.base import evaluating, to_uint8, to_unit
from generators.cellflux import CellFlux
from generators.solvers import trajectory
from tests.conftest import SHARED

GOLDEN = SHARED / "golden" / "cellflux_tiny"
CHECKPOINT = GOLDEN / "checkpoint.pth"
RUNS = [
    "sample_noise_heun2_edm10_cfg0.2",
    "sample_control_heun2_edm10_cfg0.2",
    "sample_control_plus_noise_heun2_edm10_cfg0.2",
    "sample_control_plus_noise_heun2_edm10_cfg0",
    "sample_control_plus_noise_euler_edm10_cfg0.2",
    "sample_control_plus_noise_midpoint_edm10_cfg0.2",
    "sample_control_plus_noise_euler_uniform0.1_cfg0.2",
    "sample_control_plus_noise_midpoint_uniform0.1_cfg0.2",
    "sample_control_heun2_uniform0.3_cfg0.2",
]
pytestmark = pytest.mark.usefixtures("shared")


@cache
def arrays(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: torch.from_numpy(v) if v.dtype.kind in "fiu" else v for key, v in stored.items()}


def given(key: str) -> Tensor:
    out: Tensor = arrays("inputs")[key]
    return out


def wanted(key: str) -> Tensor:
    out: Tensor = arrays("expected")[key]
    return out


def close(got: Tensor, key: str, relative: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    want = wanted(key)
    assert float((got - want).abs().max()) <= relative * float(want.abs().max()), key


@pytest.fixture(scope="module")
def model() -> CellFlux:
    return generators.load("cellflux", CHECKPOINT)


def run_options(name: str) -> dict[str, Any]:
    found = re.fullmatch(r"sample_(.*)_(euler|midpoint|heun2)_(edm|uniform)([\d.]+)_cfg(.*)", name)
    assert found
    source, solver, grid, number, guidance = found.groups()
    size = {"steps": int(number)} if grid == "edm" else {"step_size": float(number)}
    return {"source": source, "solver": solver, "grid": grid, "guidance": float(guidance), **size}


@torch.no_grad()
def test_embeddings(model: CellFlux) -> None:
    times = given("t_values")
    close(sinusoid(times, model.net.config.width), "sinusoid")
    close(model.net.embedding(times, None), "time_emb")
    close(model.net.mol_embed_transform(given("cond")), "cond_emb")


@pytest.mark.parametrize("index", range(6))
@torch.no_grad()
def test_velocities(model: CellFlux, index: int) -> None:
    x, t, c = given("x_in"), float(given("t_values")[index]), given("cond")

    def close_at(got: Tensor, key: str) -> None:
        want = wanted(key)[index]
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max()), key

    close_at(model.velocity(x, t, c), "v_cond")
    close_at(model.velocity(x, t, None), "v_null")
    close_at(model.velocity(x, t, torch.zeros_like(c)), "v_zero_vector_cond")
    assert float((wanted("v_null")[index] - wanted("v_zero_vector_cond")[index]).abs().max()) > 1e-2
    for weight in (0.2, 1.5):
        guided = generators.load("cellflux", CHECKPOINT, guidance=weight)
        for guided.doubled in (False, True):
            close_at(guided.guided_velocity(x, t, c), f"v_cfg_{weight}")


@torch.no_grad()
def test_one_time_per_image_and_raw_weights(model: CellFlux) -> None:
    inputs = given("x_in"), given("t_vec"), given("cond")
    close(model.velocity(*inputs), "v_cond_tvec")
    raw = generators.load("cellflux", CHECKPOINT, weights="raw")
    close(raw.velocity(*inputs), "v_cond_tvec_raw_weights")
    assert (model.weights, raw.weights) == ("ema", "raw")
    assert model.describe()["digest"] != raw.describe()["digest"]


@torch.no_grad()
def test_condition_is_dropped_image_by_image(model: CellFlux) -> None:
    x, t, c = given("x_in"), float(given("t_values")[2]), given("cond")
    mixed = model.velocity(x, t, c, drop=torch.tensor([True, False, True]))
    for i, key in enumerate(("v_null", "v_cond", "v_null")):
        torch.testing.assert_close(mixed[i], wanted(key)[2][i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_states_inside_the_network(model: CellFlux) -> None:
    net, seen = model.net, {}
    blocks = {f"in{i:02d}": block for i, block in enumerate(net.input_blocks)}
    blocks |= {"mid": net.middle_block} | {f"out{i:02d}": block for i, block in enumerate(net.output_blocks)}
    hooks = [b.register_forward_hook(lambda *a, n=name: seen.update({n: a[2]})) for name, b in blocks.items()]
    model.velocity(given("x_in"), given("t_vec"), given("cond"))
    for hook in hooks:
        hook.remove()
    names = list(arrays("expected")["act_names"])
    assert [tuple(seen[n].shape) for n in names] == [tuple(s) for s in wanted("act_shape").tolist()]
    rms = torch.stack([seen[n].double().square().mean().sqrt() for n in names])
    torch.testing.assert_close(rms, wanted("act_rms"), rtol=1e-5, atol=0)
    close(seen["mid"], "act_mid")


@pytest.mark.parametrize("name", RUNS)
def test_samples(name: str) -> None:
    """Through `sample`; only the source is put in place, because its noise is given."""
    options = run_options(name)
    model = generators.load("cellflux", CHECKPOINT, **options)
    control, noise = given("x_ctrl"), given("noise")
    start = {"noise": noise, "control": control, "control_plus_noise": control + noise}[options["source"]]
    with evaluating(model.net):
        end = model.solver(lambda x, t: model.guided_velocity(x, t, given("cond")), start)
    assert float((end - wanted(name)).abs().max()) <= 1e-4
    model.source = lambda control, generator=None: start  # type: ignore[method-assign]
    images = model.sample(torch.zeros_like(control), given("cond"))
    torch.testing.assert_close(images, to_unit(wanted(name), (-1, 1)), rtol=0, atol=1e-4)
    if name == "sample_control_plus_noise_heun2_edm10_cfg0.2":
        written = to_uint8(images).permute(0, 2, 3, 1).int() - wanted("sample_png_uint8").int()
        assert int(written.abs().max()) <= 1
        assert float((written != 0).float().mean()) <= 1e-3


def test_trajectory() -> None:
    model = generators.load("cellflux", CHECKPOINT, source="control", solver="euler", steps=10)
    start = given("x_ctrl")
    with evaluating(model.net):
        states = trajectory(
            lambda x, t: model.guided_velocity(x, t, given("cond")), start, model.solver.times(), "euler"
        )
        got = torch.stack([start, *states])
    close(got, "traj_control_euler_edm10_cfg0.2", 1e-4)


def test_velocity_calls() -> None:
    expected = arrays("expected")
    counts = dict(zip(expected["nfe_names"], expected["nfe_counts"].tolist(), strict=True))
    for name in RUNS:
        model = generators.load("cellflux", CHECKPOINT, **run_options(name))
        assert model.solver.calls() == counts[name], name


def test_sources() -> None:
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(given("x_ctrl").shape, generator=draw)
    control = given("x_ctrl")
    expected = {"noise": noise, "control": control, "control_plus_noise": control + 0.5 * noise}
    for source, want in expected.items():
        model = generators.load("cellflux", CHECKPOINT, source=source, noise_level=0.5)
        assert torch.equal(model.source(control, torch.Generator().manual_seed(3)), want)
        assert model.capabilities.stochastic == (source != "control")
        assert model.capabilities.uses_control == (source != "noise")


def test_pixels(model: CellFlux) -> None:
    images = given("ctrl_uint8").permute(0, 3, 1, 2).float() / 255
    inside = (images + given("dequant_noise") / 255) * 2 - 1
    torch.testing.assert_close(inside, given("x_ctrl"), rtol=0, atol=1e-6)
    noisy = CellFlux(model.net, dequantise=True)._dequantised(images, torch.Generator().manual_seed(0))
    assert 0 <= float((noisy - images).min()) <= float((noisy - images).max()) < 1 / 255
    assert torch.equal(to_uint8(noisy), given("ctrl_uint8").permute(0, 3, 1, 2))


@pytest.mark.parametrize("condition", [True, False])
@torch.no_grad()
def test_training_loss(model: CellFlux, condition: bool) -> None:
    source, image, t = given("x_ctrl") + given("noise"), given("x_trt"), given("t_vec")[:, None, None, None]
    at, target = (1 - t) * source + t * image, image - source
    close(at, "train_x_t")
    close(target, "train_u_t")
    v = model.velocity(at, given("t_vec"), given("cond") if condition else None)
    loss = float((v - target).double().square().mean())
    assert loss == pytest.approx(float(wanted(f"train_loss_{'cond' if condition else 'null'}")), rel=1e-5)


def test_settings_come_from_the_file(model: CellFlux) -> None:
    said = model.describe()
    assert {key: said[key] for key in ("source", "noise_level", "guidance", "solver", "grid", "steps")} == {
        "source": "control_plus_noise", "noise_level": 1.0, "guidance": 0.2, "solver": "heun2", "grid": "edm",
        "steps": 50,
    }  # fmt: skip
    assert model.fingerprints == "counts"
    assert (model.origin.epoch, model.origin.num_updates) == (19, 1234)


def test_network_is_read_off_the_shapes(model: CellFlux) -> None:
    assert model.net.config == AdmConfig(3, 32, 16, (2, 2, 2), 1, (2,))
    assert sum(p.numel() for p in model.net.parameters()) == 345_123


def test_saved_file_has_the_official_keys(model: CellFlux, tmp_path: Path) -> None:
    """Same keys in the same order, same average, same counter: what the golden file has, read by torch itself."""
    official = torch.load(CHECKPOINT, weights_only=False)
    raw = generators.load("cellflux", CHECKPOINT, weights="raw")
    model.save(tmp_path / "again.pth", raw=raw.net.state_dict())
    again = torch.load(tmp_path / "again.pth", weights_only=False)
    assert list(again) == list(official)
    assert list(again["model"]) == list(official["model"])
    assert all(torch.equal(again["model"][key], value) for key, value in official["model"].items())
    assert (again["epoch"], again["args"].dataset, again["args"].use_ema) == (19, "bbbc021", True)
    assert type(again["args"]).__name__ == "SimpleNamespace"
    assert set(again["scaler"]) == set(official["scaler"])
    groups = again["optimizer"]["param_groups"], official["optimizer"]["param_groups"]
    assert [len(g["params"]) for g in groups[0]] == [len(g["params"]) for g in groups[1]]
