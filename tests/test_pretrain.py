"""Pre-training: which pairs it sees, what a stopped run does, and what it says about unusable input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import generators
from biorewards.io.images import ImageError
from biorewards.io.manifest import ManifestError
from cli.main import run as command
from generators.base import digest
from generators.cellflux import CellFlux
from generators.checkpoints import CheckpointError
from generators.pairs import read_pairs, read_rows
from generators.pretrain import LOG, PICTURES, STATE, WEIGHTS, Run, _share, accelerator_of
from generators.solvers import Solver
from generators.steps import Draw, Settings

COMPOUNDS = ("taxol", "ALLN", "colchicine")
QUICK = Settings(steps=6, batch=4, rate=1e-3, warmup=2, cooldown=0.5, clip=1.0, seed=5)

needs_accelerate = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


def write_index(folder: Path, *, size: int = 8, channels: int = 2, batches: int = 2) -> pd.DataFrame:
    """Every batch: three controls and two images of each compound, in train and val. A pixel value names its row."""
    rng = np.random.default_rng(0)
    rows = []
    for batch in range(batches):
        for split in ("train", "val"):
            for kind in ("DMSO",) * 3 + COMPOUNDS * 2:
                number = len(rows)
                key = f"Week{batch}_{100 + batch}_1_{number}_0.0"
                path = folder / f"Week{batch}" / str(100 + batch) / f"1_{number}_0.0.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                # Compounds differ in brightness, so that there is something to learn.
                level = 40 + 50 * ("DMSO", *COMPOUNDS).index(kind)
                image = rng.integers(level - 20, level + 20, (size, size, channels)).astype(np.uint8)
                image[0, 0, 0] = number
                np.save(path, image)
                rows.append({
                    "SAMPLE_KEY": key, "SPLIT": split, "STATE": int(kind != "DMSO"), "CPD_NAME": kind, "ANNOT": "x",
                    "BATCH": f"Week{batch}", "PLATE": 100 + batch,
                })  # fmt: skip
    table = pd.DataFrame(rows)
    table.to_csv(folder / "index.csv")
    return table


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of 36 images."""
    write_index(tmp_path / "data")
    return tmp_path / "data"


def tiny(names: list[str], dropout: float = 0.2) -> CellFlux:
    """A network of one level, the same at every call."""
    torch.manual_seed(0)
    return CellFlux.create(
        compounds=names, channels=2, width=16, mult=(1,), blocks=1, attention=(), noise_level=0.5,
        solver=Solver("euler", "uniform", 2), dropout=dropout,
    )  # fmt: skip


def train(index: Path, out: Path, settings: Settings = QUICK, dropout: float = 0.2, **options: int) -> Run:
    """A whole run."""
    pairs, checked = read_pairs(index), read_pairs(index, split="val")
    every = {"every": 1, "validate": 3, "save": 2} | options
    run = Run(tiny(pairs.names, dropout), pairs, checked, settings, out, accelerator_of(settings, cpu=True), **every)
    run.train()
    return run


# ---- pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["batch", "plate"])
def test_controls_share_batch_and_split_with_their_image(index: Path, match: str) -> None:
    pairs = read_pairs(index, match=match)
    table = pairs.manifest.table
    column = {"batch": "Metadata_Batch", "plate": "Metadata_Plate"}[match]
    seen: dict[int, set[int]] = {}
    for step in range(60):
        items, controls = pairs.draw(3, step, 4)
        for item, control in zip(items, controls, strict=True):
            row = int(pairs.treated[item])
            assert table["Metadata_State"][row] == "treated" and table["Metadata_State"][control] == "control"
            assert table[column][row] == table[column][control]
            assert table["Metadata_Split"][row] == table["Metadata_Split"][control] == "train"
            seen.setdefault(row, set()).add(int(control))
    assert len(seen) == len(pairs) == 12
    assert all(len(controls) == 3 for controls in seen.values()), "a control is drawn anew each time"


def test_every_image_comes_once_in_every_round_and_in_another_order(index: Path) -> None:
    pairs = read_pairs(index)
    rounds = [pairs.order(1, 12 * k, 12).tolist() for k in range(3)]
    assert all(sorted(order) == list(range(12)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    # The sequence does not depend on where it is cut.
    assert pairs.order(1, 5, 20).tolist() == (rounds[0] + rounds[1] + rounds[2])[5:25]


def test_held_out_compounds_are_never_seen(index: Path) -> None:
    pairs = read_pairs(index, held_out=["ALLN"])
    assert pairs.names == ["colchicine", "taxol"] and len(pairs) == 8
    drawn = {pairs.compounds[item] for step in range(40) for item in pairs.draw(0, step, 4)[0]}
    assert drawn == {"colchicine", "taxol"}
    rows = {int(pairs.treated[item]) for step in range(40) for item in pairs.draw(0, step, 4)[0]}
    assert not set(pairs.manifest.table.index[pairs.manifest.table["Metadata_Compound"] == "ALLN"]) & rows
    assert read_pairs(index, only=["ALLN"]).names == ["ALLN"]


def test_every_spelling_of_state_is_read(tmp_path: Path) -> None:
    """cpg0000 says trt and control; rxrx1 has no STATE and says it in ANNOT."""
    table = write_index(tmp_path)
    wanted = read_pairs(tmp_path).treated.tolist()
    table.assign(STATE=table["STATE"].map({1: "trt", 0: "control"})).to_csv(tmp_path / "index.csv")
    assert read_pairs(tmp_path).treated.tolist() == wanted
    annot = table["STATE"].map({1: "treated", 0: "negative_control"})
    table.assign(ANNOT=annot).drop(columns="STATE").to_csv(tmp_path / "index.csv")
    assert read_pairs(tmp_path).treated.tolist() == wanted


def test_noise_and_drop_are_drawn_for_every_image(index: Path) -> None:
    settings = Settings(batch=12, noise=0.5, drop=0.25)
    draw = Draw(read_pairs(index), settings, 2, (8, 8))
    steps = [draw(step) for step in range(60)]
    mixed = [bool(step.noisy.any() and not step.noisy.all()) for step in steps]
    assert np.mean(mixed) > 0.95, "one draw a batch would never mix"
    assert np.mean([step.noisy.float().mean() for step in steps]) == pytest.approx(0.5, abs=0.06)
    assert np.mean([step.drop.float().mean() for step in steps]) == pytest.approx(0.25, abs=0.06)
    times = torch.cat([step.t for step in steps])
    assert float(times.median()) == pytest.approx(1 / (1 + np.exp(-1.2)), abs=0.04)
    again = draw(7)
    assert torch.equal(again.treated, steps[7].treated) and torch.equal(again.noise, steps[7].noise)


def test_augmentation_moves_pixels_and_changes_none(index: Path) -> None:
    pairs = read_pairs(index)
    plain = Draw(pairs, Settings(batch=12, augment=0.0), 2, (8, 8))(0).treated
    turned = Draw(pairs, Settings(batch=12, augment=0.5), 2, (8, 8))(0).treated
    assert not torch.equal(plain, turned)
    assert torch.equal(plain.flatten(2).sort(-1).values, turned.flatten(2).sort(-1).values)


def test_processes_share_a_step_without_overlap(index: Path) -> None:
    whole = Draw(read_pairs(index), Settings(batch=4), 2, (8, 8))(0)
    parts = [_share(whole, i, 2) for i in range(2)]
    assert torch.equal(torch.stack([p.noise for p in parts], 1).flatten(0, 1), whole.noise)
    assert [name for pair in zip(*(p.compounds for p in parts), strict=True) for name in pair] == whole.compounds


# ---- runs -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_pretrain import QUICK, train
from dataclasses import replace
train(Path(sys.argv[2]), Path(sys.argv[3]), replace(QUICK, steps=int(sys.argv[4])), save=1)
"""


@needs_accelerate
def test_a_killed_run_ends_bitwise_where_the_uninterrupted_one_does(root: Path, index: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment between the first and the last step, then the same command."""
    steps = 40
    arguments = [sys.executable, "-c", SCRIPT, str(root), str(index)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(index, whole, replace(QUICK, steps=steps), save=1)
    wanted = random.randint(2, steps - 5)
    process = subprocess.Popen([*arguments, str(broken), str(steps)], env=environment)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        log = broken / LOG
        if log.exists() and len(log.read_text().splitlines()) > wanted:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = json.loads((broken / LOG).read_text().splitlines()[-1])["step"]
    assert process.returncode == -signal.SIGKILL and reached < steps
    train(index, broken, replace(QUICK, steps=steps), save=1)
    first, second = load_file(whole / STATE), load_file(broken / STATE)
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[key], second[key]) for key in first), f"killed at step {wanted}"
    assert (whole / WEIGHTS).read_bytes() == (broken / WEIGHTS).read_bytes()
    lines = [[json.loads(text) for text in (folder / LOG).read_text().splitlines()] for folder in (whole, broken)]
    for line in (line for log in lines for line in log):
        line.pop("images_per_s", None)
    assert lines[0] == lines[1], "the log has no line twice and none missing"


@needs_accelerate
def test_a_run_learns_writes_and_can_be_made_longer(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = Settings(steps=40, batch=6, rate=2e-3, noise=1.0, ema=0.9)
    run = train(index, out, settings, validate=20, save=20)
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    validation = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(validation) == 2 and validation[1] < validation[0]
    assert len(list((out / PICTURES).glob("*.png"))) == 2
    loaded = generators.load("cellflux", out / WEIGHTS)
    assert loaded.compounds == sorted(COMPOUNDS) and digest(loaded.net) == digest(run.average)
    longer = train(index, out, replace(settings, steps=42))
    assert longer.step == 42 and digest(longer.average) != digest(run.average)


@needs_accelerate
def test_a_run_of_other_settings_or_data_is_not_continued(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(index, out, Settings(steps=2, batch=4))
    with pytest.raises(CheckpointError, match=r"rate 0\.0001, now it is 0\.01"):
        train(index, out, Settings(steps=2, batch=4, rate=0.01))
    table = pd.read_csv(index / "index.csv", index_col=0)
    table.iloc[:-1].assign(CPD_NAME=table["CPD_NAME"].replace("ALLN", "MG-132")).to_csv(index / "index.csv")
    with pytest.raises(CheckpointError, match="started with compounds"):
        train(index, out, Settings(steps=2, batch=4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        train(index, tmp_path / "other")


@needs_accelerate
@pytest.mark.slow
def test_two_processes_train_the_same_run(root: Path, index: Path, tmp_path: Path) -> None:
    """The same images, noise and updates as in one process; only sums are taken in another order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("save=1", "save=1, dropout=0.0"))
    arguments = [str(script), str(root), str(index)]
    for out, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29613"]),
    ):
        subprocess.run([*launcher, *arguments, str(tmp_path / out), "6"], check=True, env=environment, timeout=300)
    one, two = (load_file(tmp_path / out / STATE) for out in ("one", "two"))
    for key, value in one.items():
        assert torch.allclose(value.float(), two[key].float(), rtol=1e-3, atol=1e-4), key


# ---- unusable input ---------------------------------------------------------------------------------------------


def change(index: Path, **columns: object) -> None:
    table = pd.read_csv(index / "index.csv", index_col=0)
    table.assign(**columns).to_csv(index / "index.csv")


def test_what_cannot_be_paired_is_named(index: Path) -> None:
    with pytest.raises(ManifestError, match="no compound 'taxoll'; did you mean 'taxol'"):
        read_pairs(index, held_out=["taxoll"])
    with pytest.raises(ManifestError, match="SPLIT has no 'test'; it has 'train', 'val'"):
        read_pairs(index, split="test")
    with pytest.raises(ManifestError, match="no treated row is left"):
        read_pairs(index, held_out=COMPOUNDS)
    table = pd.read_csv(index / "index.csv", index_col=0)
    table[(table["STATE"] == 1) | (table["BATCH"] == "Week0")].to_csv(index / "index.csv")
    with pytest.raises(ManifestError, match="batch 'Week1' has treated rows and no control"):
        read_pairs(index)
    table.drop(columns="BATCH").to_csv(index / "index.csv")
    with pytest.raises(ManifestError, match="no column BATCH, by which controls are matched; match by plate"):
        read_pairs(index)
    assert len(read_pairs(index, match="plate")) == 12
    table.drop(columns="SPLIT").to_csv(index / "index.csv")
    with pytest.raises(ManifestError, match="no column SPLIT"):
        read_pairs(index)
    table.assign(STATE=0).to_csv(index / "index.csv")
    with pytest.raises(ManifestError, match="no row is treated"):
        read_pairs(index)


def test_an_image_of_another_size_is_named(index: Path) -> None:
    pairs = read_pairs(index)
    file = pairs.manifest.files[int(pairs.treated[3])][0]
    np.save(file, np.zeros((16, 16, 2), np.uint8))
    with pytest.raises(ImageError, match=f"{file.name}: is 16 x 16 px, others are 8 x 8"):
        read_rows(pairs.manifest, pairs.treated, 2)
    file.unlink()
    with pytest.raises(ImageError, match=f"{file.name}: does not exist"):
        read_rows(pairs.manifest, pairs.treated, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("batch", 0), ("drop", 1.5), ("rate", -1.0), ("ema", float("nan"))]
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        Settings(**{name: value})


@needs_accelerate
def test_a_run_that_breaks_down_says_so_and_keeps_its_last_save(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="lower rate"):
        train(index, out, Settings(steps=60, batch=4, rate=1e30), save=1, validate=1000)
    if (out / STATE).exists():
        assert all(
            torch.isfinite(value).all() for key, value in load_file(out / STATE).items() if key.startswith("net.")
        )


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"biorewards\[train\]"):
        accelerator_of(QUICK)


# ---- the command ------------------------------------------------------------------------------------------------


@needs_accelerate
def test_the_command_trains_goes_on_and_its_weights_are_drawn_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, out = tmp_path / "cells", tmp_path / "run"
    write_index(index, size=20)
    shape = ["--width", "16", "--mult", "1", "--blocks", "1", "--attention", "", "--dropout", "0"]
    arguments = ["pretrain", str(index), "--out", str(out), *shape, "--batch", "4", "--cpu", "--held-out", "ALLN"]
    assert command([*arguments, "--steps", "2", "--save-every", "1"]) == 0
    assert "8 treated images of 2 compounds" in capsys.readouterr().out
    assert command([*arguments, "--steps", "4"]) == 0
    assert "goes on after step 2" in capsys.readouterr().out
    drawn = tmp_path / "drawn"
    generate = ["generate", "--generator", "cellflux", "--checkpoint", str(out / WEIGHTS), "--controls", str(index)]
    assert command([*generate, "--n", "2", "--steps", "2", "--out", str(drawn)]) == 0
    assert len(pd.read_csv(drawn / "manifest.csv")) == 4
    capsys.readouterr()
    assert command([*arguments, "--steps", "4", "--rate", "0.5"]) == 2
    assert "started with rate" in capsys.readouterr().err
    assert command([*arguments[:-1], "taxl", "--out", str(tmp_path / "x"), "--steps", "2"]) == 2
    assert "did you mean 'taxol'" in capsys.readouterr().err
