"""`biorewards convert`: once, checked, and with errors as one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import generators
from cli.main import run
from cli.options import parse_settings
from tests.foreign import cellflux_content, touches
from tests.test_generators_cellflux_use import NAMES, controls, net, write_csv


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(cellflux_content(net(seed=1).state_dict(), net(seed=2).state_dict(), dataset="bbbc021"), path)
    return path


def convert(checkpoint: Path, out: Path, *more: str) -> int:
    return run(["convert", str(checkpoint), "--generator", "cellflux", "--out", str(out), *more])


def test_converted_file_draws_the_same_without_the_original(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write_csv(tmp_path / "emb_fp.csv"), tmp_path / "new" / "m.safetensors"
    before = generators.load("cellflux", checkpoint, embeddings=table, steps=3)
    images = before.sample(controls(), NAMES, generator=torch.Generator().manual_seed(0))
    assert convert(checkpoint, out, "--set", f"embeddings={table}", "--set", "steps=3") == 0
    said = capsys.readouterr().out
    assert str(out) in said
    assert "3 compounds" in said
    assert before.describe()["digest"] in said
    checkpoint.unlink()
    table.unlink()
    after = generators.load("cellflux", out)
    assert torch.equal(after.sample(controls(), NAMES, generator=torch.Generator().manual_seed(0)), images)
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.json", "m.safetensors"]


def test_back_to_the_official_layout(checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, tmp_path / "m.safetensors") == 0
    assert convert(tmp_path / "m.safetensors", tmp_path / "back.pth") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=False)
    original = torch.load(checkpoint, weights_only=False)
    assert list(back["model"]) == list(original["model"])
    shadows = [key for key in original["model"] if key.startswith("shadow")]
    assert all(torch.equal(back["model"][key], original["model"][key]) for key in shadows)
    assert vars(back["args"]) == vars(original["args"])


def test_raw_weights_on_request(checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, tmp_path / "raw.safetensors", "--set", "weights=raw") == 0
    loaded = generators.load("cellflux", tmp_path / "raw.safetensors")
    assert torch.equal(loaded.net.out[2].weight, net(seed=1).out[2].weight)


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for there in ("m.safetensors", "m.json"):
        path = tmp_path / there
        path.write_text("mine")
        assert convert(checkpoint, tmp_path / "m.safetensors") == 2
        assert f"{there} is there already" in capsys.readouterr().err
        assert path.read_text() == "mine"
        path.unlink()


def test_hostile_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.pth"
    torch.save({"model": touches(tmp_path / "marker")}, bad)
    assert convert(bad, tmp_path / "m.safetensors") == 2
    said = capsys.readouterr().err
    assert "bad.pth: not read, because it holds more than data" in said
    assert "Traceback" not in said
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "steps"], "write NAME=VALUE"),
        (["--set", "steps=3", "--set", "steps=4"], "steps is given twice"),
        (["--set", "stps=3"], "no option 'stps'; it has:"),
        (["--set", "steps=many"], "steps is 'many', wanted a number"),
        (["--set", "embeddings=none.csv"], "none.csv: no such file"),
        (["--set", "embeddings=5"], "wanted a path"),
        (["--generator", "imp"], "did you mean 'impa'"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(checkpoint, tmp_path / "m.safetensors", *more) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "m.safetensors").exists()


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "none.pth", tmp_path / "m.safetensors") == 2
    assert "none.pth: no such file" in capsys.readouterr().err


def test_settings_are_read_as_what_they_look_like() -> None:
    assert parse_settings(("a=1", "b-c=0.5", "d=true", "e=raw", "f=x=y")) == {
        "a": 1, "b_c": 0.5, "d": True, "e": "raw", "f": "x=y",
    }  # fmt: skip
