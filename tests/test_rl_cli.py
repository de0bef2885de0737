"""`biorewards rl` and `best-of` on a small phantom with a small network: what they write, go on with, and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import generators
from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.io.manifest import read_manifest
from biorewards.io.reading import plan_reading
from biorewards.phantom import write_dataset
from biorewards.reward import Score
from cli.main import run
from cli.rl import load_policy, read
from generators.cellflux import CellFlux
from rl.pool import Real, read_data, read_real
from rl.rewards import fitted

TWO = ["paxelone", "carboxen"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "cells"
    write_dataset(folder, 65, 48, 3)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows two compounds of the phantom and one of nobody; copies its control, more or less."""
    torch.manual_seed(0)
    made = CellFlux.create(
        compounds=[*TWO, "nobody"], width=8, mult=(1, 2), blocks=1, attention=(), noise_level=0.1, guidance=0.5
    )
    for p in made.net.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    made.save(path)
    return path


SMALL = ["--groups", "2", "--rollouts", "2", "--rollout-steps", "1", "--evaluate-images", "2", "--device", "cpu"]


def rl(checkpoint: Path, phantom: Path, out: Path, *more: str) -> int:
    return run(["rl", "--checkpoint", str(checkpoint), "--controls", str(phantom), "--out", str(out), *SMALL, *more])


def test_run_resume_and_result(
    checkpoint: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert rl(checkpoint, phantom, out, "--steps", "1") == 0
    said = capsys.readouterr()
    assert "2 compounds" in said.out and "held-out controls" in said.out and "images x 2" in said.out
    assert "nobody" in said.err and "its statistics anew" in said.err
    assert "step 1/1" in said.err and "evaluation at step 0" in said.err and "own solver" in said.err
    assert rl(checkpoint, phantom, out, "--steps", "2") == 2
    assert "--resume" in capsys.readouterr().err
    assert rl(checkpoint, phantom, out, "--steps", "2", "--resume", "--kl-weight", "0.2") == 2
    assert "kl_weight 0.1, now it is 0.2" in capsys.readouterr().err
    assert rl(checkpoint, phantom, out, "--steps", "2", "--resume") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert {"reward/moa", "share/moa", "kl", "useful_groups", "score_share", "samples_per_s"} <= set(lines[-2])
    assert {"spread/nucleus_size", "distance", "diversity", "class_entropy", "dark"} <= set(lines[-1])
    made: Any = generators.load("cellflux", out / "generator.safetensors")
    before: Any = generators.load("cellflux", checkpoint)
    # What is saved samples as it was trained.
    assert (made.guidance, made.solver.method, made.solver.grid, made.solver.steps) == (0.0, "euler", "uniform", 1)
    assert made.compounds == before.compounds and made.describe()["digest"] != before.describe()["digest"]


def test_presets_rewards_and_weights(
    checkpoint: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(checkpoint, phantom, tmp_path / "a", "--steps", "1", "--preset", "distribution",
              "--advantage", "per-reward", "--coupling", "control", "--hold-out", "carboxen",
              "--reward", "tests.test_rl_cli:Brightness", "--weights", "brightness=3,moa=1") == 0  # fmt: skip
    assert "population is that of the assay" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["about"]["weights"]["brightness"] == 3 and config["about"]["weights"]["moa"] == 1
    assert "quantiles of assay phantom" in config["about"]["population"]
    last = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "total_unseen" in last and "reward/brightness" in last


class Brightness:
    name = "brightness"

    def __call__(self, batch: Batch) -> Score:
        value = batch.images.mean((1, 2, 3))
        return Score(value, value, torch.zeros(len(batch), dtype=torch.uint8))

    def __repr__(self) -> str:
        return "Brightness()"


class Gan:
    """Stochastic, without a velocity; draws the control with noise."""

    name = "gan"
    net = nn.Identity()
    compounds = TWO
    capabilities = SimpleNamespace(
        post_trainable=False, stochastic=True, uses_control=True, channels=3, floors=False, range=(0.0, 1.0)
    )

    def sample(self, control: Tensor, perturbation: Any, *, steps: int | None = None, generator: Any = None) -> Tensor:
        noise = torch.stack([torch.randn(control.shape[1:], generator=g) for g in generator])
        return (control + 0.05 * noise).clamp(0, 1)

    def to(self, device: Any) -> Gan:
        return self

    def describe(self) -> dict[str, Any]:
        return {"generator": "gan"}


def load(checkpoint: str) -> Gan:
    return Gan()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--generator", "tests.test_rl_cli:load"], "biorewards best-of"),
        (["--set", "source=control"], "control_plus_noise"),
        (["--compounds", "taxol"], "'taxol' cannot be rolled out"),
        (["--lag", "sometimes"], "none, ramp, late"),
        (["--track", "wandb"], "install the others"),
        (["--reward", "tests.test_rl_cli:Nothing"], "Nothing"),
        (["--rewards", "beauty"], "unknown rewards"),
        (["--hold-out", ",".join(TWO)], "no compound"),
    ],
)
def test_errors_say_what_to_do(
    options: list[str], text: str, checkpoint: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(checkpoint, phantom, tmp_path / "run", "--steps", "1", *options) == 2
    assert text in capsys.readouterr().err


def test_hacking_corner_warns_on_the_command_line(
    phantom: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corner = ["--lag", "none", "--kl-weight", "0.001", "--steps", "1", "--rewards", "moa"]
    assert rl(checkpoint, phantom, tmp_path / "run", *corner) == 0
    assert "warning: lag=none" in capsys.readouterr().err


def test_missing_arguments(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rl", "--generator", "impa"]) == 2
    said = capsys.readouterr().err
    assert "needs its --checkpoint" in said and "biorewards best-of" in said
    assert run(["rl", "--checkpoint", str(checkpoint)]) == 2 and "needs --controls" in capsys.readouterr().err


# ---- data --------------------------------------------------------------------------------------------------------


def data_of(folder: Path, **options: Any) -> Any:
    assay, found = Assay.load("phantom"), read_manifest(folder)
    return read_data(found, plan_reading(found, assay), assay, TWO, **options)


def test_controls_and_real_images_are_parted_by_split(phantom: Path) -> None:
    found = data_of(phantom)
    index = pd.read_csv(phantom / "index.csv")
    trained, control = index["SPLIT"] == "train", index["STATE"] == "control"
    assert (
        len(found.train.controls) == (trained & control).sum()
        and len(found.test.controls) == (~trained & control).sum()
    )
    assert (
        len(found.real.images) == (trained & ~control).sum()
        and len(found.real_test.images) == (~trained & ~control).sum()
    )
    assert found.scale == 2.0 and found.train.controls.shape[1:] == (3, 48, 48)
    assert found.train.compounds == TWO
    names = Assay.load("phantom").classes
    assert [names[k] for k in found.train.targets] == [Assay.load("phantom").compounds[name] for name in TWO]
    held = data_of(phantom, hold_out=["carboxen"])
    assert held.train.compounds == ["paxelone"] and held.test.compounds == TWO and held.unseen == ["carboxen"]


def test_plates_are_held_out_where_no_split_says(phantom: Path, tmp_path: Path) -> None:
    index = pd.read_csv(phantom / "index.csv", index_col=0).drop(columns="SPLIT")
    index.to_csv(tmp_path / "index.csv")
    for folder in ("Batch1", "biorewards.json"):
        (tmp_path / folder).symlink_to(phantom / folder)
    assay = Assay.load("phantom")
    found = read_manifest(tmp_path / "index.csv", images=phantom)
    made = read_data(found, plan_reading(found, assay), assay, TWO)
    assert not set(made.train.plate.tolist()) & set(made.test.plate.tolist())
    assert len(set(made.test.plate.tolist())) == 1


def test_folder_of_images_without_labels_is_all_controls(tmp_path: Path) -> None:
    for k in range(6):
        np.save(tmp_path / f"{k}.npy", np.full((48, 48, 3), 20 * k, np.uint8))
    (tmp_path / "biorewards.json").write_text('{"assay": "phantom", "pixel_size_um": 0.64}')
    found = data_of(tmp_path)
    assert len(found.train.controls) + len(found.test.controls) == 6 and len(found.test.controls) == 1
    assert not len(found.real.images)


# ---- best-of -----------------------------------------------------------------------------------------------------


def best_of(out: Path, phantom: Path, *more: str) -> int:
    return run(["best-of", "--controls", str(phantom), "--out", str(out), "--images", "2", "--device", "cpu", *more])


def test_best_of_any_generator(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept"
    gan = ["--generator", "tests.test_rl_cli:load", "--checkpoint", "none"]
    assert best_of(out, phantom, *gan, "--n", "4", "--curve") == 0
    assert "best of 4" in capsys.readouterr().out
    table = pd.read_csv(out / "manifest.csv")
    pool = pd.read_parquet(out / "pool.parquet")
    assert len(table) == 4 and len(pool) == 16
    assert np.allclose(
        table["reward_total"], pool.groupby("Metadata_File")["Reward_total"].max()[table["file"]], atol=1e-4
    )
    curve = pd.read_csv(out / "curve.csv")
    assert curve["n"].tolist() == [1, 2, 4] and curve["total"].is_monotonic_increasing
    assert curve["total"].iloc[-1] == pytest.approx(table["reward_total"].mean(), rel=1e-5)
    assert curve["total"].iloc[0] == pytest.approx(pool["Reward_total"].mean(), rel=1e-5)
    manifest = read_manifest(out)
    assert manifest.hints.assay == "phantom" and set(manifest.table["Metadata_Compound"]) == set(TWO)
    assert not manifest.problems
    assert best_of(out, phantom, *gan) == 2 and "not empty" in capsys.readouterr().err
    assert best_of(tmp_path / "b", phantom, *gan, "--method", "search") == 2
    assert "method=random" in capsys.readouterr().err


def test_rl_and_best_of_judge_alike(phantom: Path, checkpoint: Path) -> None:
    """The same real images whatever the seed, so one fingerprint; and statistics that were measured on them."""
    own, _ = load_policy("cellflux", str(checkpoint), {}, 1)
    given = dict.fromkeys(("assay_name", "pixel_size", "hold_out", "compounds"))
    data, trained_by, _ = read(phantom, given, own, seed=0)
    assay, found = Assay.load("phantom"), read_manifest(phantom)
    reader = plan_reading(found, assay)
    real, _ = read_real(found, reader, assay, seed=5)
    assert torch.equal(real.images, data.real.images) and torch.equal(real.target, data.real.target)
    # 65 crops hold fewer than 20 of each class: the assay's own statistics stay, and a note says so.
    selected_by, notes = fitted(assay, real, reader.scale)
    assert selected_by.fingerprint == trained_by.fingerprint == assay.fingerprint and "no real images" in notes[0]
    many = Real(real.images.repeat(10, 1, 1, 1), real.target.repeat(10))
    measured, notes = fitted(assay, many, reader.scale)
    again, _ = fitted(assay, many, reader.scale)
    assert measured.fingerprint == again.fingerprint != assay.fingerprint and "measured anew" in notes[0]
    same, none = fitted(assay, many, 1.0)
    assert same is assay and none == []


def test_best_of_says_by_what_it_judges(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gan = ["--generator", "tests.test_rl_cli:load", "--checkpoint", "none", "--n", "1"]
    assert best_of(tmp_path / "kept", phantom, *gan) == 0
    said = capsys.readouterr()
    assert "its statistics were measured anew" in said.err or "no real images to measure" in said.err


def test_best_of_a_flow_by_search(checkpoint: Path, phantom: Path, tmp_path: Path) -> None:
    more = [
        "--checkpoint",
        str(checkpoint),
        "--n",
        "4",
        "--method",
        "search",
        "--steps",
        "2",
        "--compounds",
        "paxelone",
    ]
    assert best_of(tmp_path / "kept", phantom, *more) == 0
    assert len(pd.read_csv(tmp_path / "kept" / "manifest.csv")) == 2
