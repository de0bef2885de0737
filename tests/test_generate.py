"""`biorewards generate`: what it writes, what a second run does, and what it says about unusable input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import generators
from biorewards.io.manifest import ManifestError, read_manifest
from biorewards.phantom import COMPOUNDS, write_dataset
from cli.main import run
from generators.adm import AdmConfig, AdmNet
from generators.base import Capabilities, seeded, to_uint8
from generators.cellflux import CellFlux
from generators.embeddings import CompoundTable
from generators.generation import _folders, check_scale, generate, make_plan, pick_controls
from generators.pictures import mosaic
from generators.solvers import Solver
from tests.foreign import randomised

#: Names that a careless writer puts into one folder, or outside.
NAMES = ["taxol", "cytochalasin B", "Cytochalasin b"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small network with random weights, so that every image differs."""
    net = randomised(AdmNet(AdmConfig(3, 3, 32, (1, 1), 1, (), 0.0)))
    assert isinstance(net, AdmNet)
    table = CompoundTable(NAMES, torch.eye(3))
    path = tmp_path / "model.safetensors"
    CellFlux(net, table=table, solver=Solver("euler", "uniform", 2), noise_level=0.5).save(path)
    return path


@pytest.fixture
def controls(tmp_path: Path) -> Path:
    """An index of ten images: six controls on two plates, in two splits, and four treated ones."""
    folder, rows = tmp_path / "cells", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        treated = number >= 6
        rows.append({
            "file": name, "compound": "taxol" if treated else "DMSO", "moa": "stabilizers" if treated else "DMSO",
            "state": int(treated), "plate": f"P{number % 2}", "split": "train" if number % 3 else "test",
        })  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    hints = {"assay": "phantom", "channels": {"actin": 0, "tubulin": 1, "dna": 2}, "pixel_size_um": 0.64, "seed": 1}
    (folder / "biorewards.json").write_text(json.dumps(hints))
    return folder


def draw(checkpoint: Path, controls: Path, out: Path, *more: str) -> int:
    arguments = ["generate", "--generator", "cellflux", "--checkpoint", str(checkpoint), "--controls", str(controls)]
    return run([*arguments, "--out", str(out), *more])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


# ---- what is written --------------------------------------------------------------------------------------------


def test_every_image_has_its_control_compound_seed_and_settings(
    checkpoint: Path, controls: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drawn"
    assert draw(checkpoint, controls, out, "--n", "4", "--cfg", "0.5", "--steps", "3") == 0
    table = pd.read_csv(out / "manifest.csv", keep_default_na=False)
    assert table["compound"].value_counts().to_dict() == dict.fromkeys(NAMES, 4)
    assert table["seed"].nunique() == 12
    assert set(table["control"]) <= {f"{n}.png" for n in range(6)}
    assert set(table[table["compound"] == "taxol"]["moa"]) == {"stabilizers"}
    assert set(zip(table["guidance"].astype(float), table["steps"], strict=True)) == {(0.5, 3)}
    index = pd.read_csv(controls / "index.csv").set_index("file")
    assert table["plate"].tolist() == index["plate"][table["control"]].tolist()
    for _, group in table.groupby("compound"):
        assert group["control"].nunique() == 4, "a control comes again only when all had their turn"
    settings = json.loads((out / "generation.json").read_text())
    assert settings["guidance"] == 0.5 and settings["steps"] == 3 and settings["seed"] == 0
    # One image, made by hand from what the manifest says.
    line = table.iloc[5]
    model = generators.load("cellflux", checkpoint, guidance=0.5)
    pixels = np.asarray(Image.open(controls / line["control"]), np.float32).transpose(2, 0, 1) / 255
    image = model.sample(
        torch.from_numpy(pixels)[None], [line["compound"]], steps=3, generator=seeded([int(line["seed"])])
    )
    written = np.asarray(Image.open(out / line["file"])).transpose(2, 0, 1)
    assert np.abs(written.astype(int) - to_uint8(image)[0].int().numpy()).max() <= 1


def test_score_and_audit_read_the_folder(checkpoint: Path, controls: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    assert draw(checkpoint, controls, out, "--n", "2") == 0
    found = read_manifest(out)
    assert len(found) == 6 and not found.problems
    assert all(file.exists() for files in found.files for file in files)
    assert set(found.table["Metadata_Compound"]) == set(NAMES)
    assert {"Metadata_control", "Metadata_seed", "Metadata_guidance"} <= set(found.table)
    assert found.hints.assay == "phantom" and found.hints.pixel_size == 0.64
    assert found.hints.channels == {"actin": 0, "tubulin": 1, "dna": 2}
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape[0] > 3 * 96 and grid.std() > 10


def test_every_compound_has_one_folder_whatever_else_is_drawn(checkpoint: Path, controls: Path, tmp_path: Path) -> None:
    assert draw(checkpoint, controls, tmp_path / "d", "--n", "1") == 0
    folders = {path.parent.name for path in (tmp_path / "d").rglob("00000.png")}
    assert len({name.casefold() for name in folders}) == 3
    assert draw(checkpoint, controls, tmp_path / "e", "--n", "1", "--compounds", NAMES[2]) == 0
    assert {path.parent.name for path in (tmp_path / "e").rglob("00000.png")} < folders


def test_no_name_leads_out_of_the_folder() -> None:
    names = ["..", "a/b", "../x", ".hidden", "C\\d", "β-x", "CC(=O)" * 60, "a b"]
    folders = _folders(names)
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    assert not any(folder.startswith(".") or set(folder) & set("/\\:*?") for folder in folders.values())
    assert max(map(len, folders.values())) <= 120 and folders["a b"] == "a b"


def test_images_that_are_no_numbers_are_not_written(checkpoint: Path, controls: Path, tmp_path: Path) -> None:
    model = generators.load("cellflux", checkpoint)
    with torch.no_grad():
        next(model.net.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="drew NaN"):
        generate(model, make_plan(model, read_manifest(controls), None, 1, 0), tmp_path / "out", seed=0)
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(("floors", "wanted"), [(True, [0, 1, 1, 254, 255]), (False, [1, 1, 2, 255, 255])])
def test_rule_of_eight_bit_is_the_generators(floors: bool, wanted: list[int]) -> None:
    levels = torch.tensor([0.6, 1.4, 1.6, 254.9, 255.0], dtype=torch.float64) / 255
    assert to_uint8(levels, floors).tolist() == wanted
    assert not Capabilities(False, False, True, 3).floors


def test_other_channel_numbers_become_arrays(tmp_path: Path) -> None:
    net = randomised(AdmNet(AdmConfig(5, 2, 32, (1,), 1, (), 0.0)))
    assert isinstance(net, AdmNet)
    model = CellFlux(net, table=CompoundTable(["a", "b"], torch.eye(2)), solver=Solver("euler", "uniform", 1))
    cells = tmp_path / "cells"
    cells.mkdir()
    np.save(cells / "one.npy", np.zeros((8, 8, 5), np.uint8))
    generate(model, make_plan(model, read_manifest(cells), None, 1, 0), tmp_path / "out", seed=0)
    assert np.load(tmp_path / "out" / "a" / "00000.npy").shape == (8, 8, 5)


# ---- a second run -----------------------------------------------------------------------------------------------


def test_an_interrupted_run_makes_only_what_is_missing(checkpoint: Path, controls: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    assert draw(checkpoint, controls, out, "--n", "5", "--batch-size", "4") == 0
    whole = contents(out)
    table = (out / "manifest.csv").read_bytes()
    lost = [out / name for name in list(whole)[2:11:3] if name != "grid.png"]
    for path in (*lost, out / "manifest.csv", out / "grid.png"):
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    assert draw(checkpoint, controls, out, "--n", "5", "--batch-size", "4") == 0
    assert contents(out) == whole and (out / "manifest.csv").read_bytes() == table
    assert all(path.stat().st_mtime_ns == time for path, time in times.items()), "an image was made twice"


def test_a_finished_run_draws_nothing(
    checkpoint: Path, controls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "drawn"
    assert draw(checkpoint, controls, out, "--n", "2") == 0
    monkeypatch.setattr(CellFlux, "sample", lambda *_, **__: pytest.fail("drew again"))
    assert draw(checkpoint, controls, out, "--n", "2") == 0


def test_interrupted_folder_has_no_manifest(
    checkpoint: Path, controls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, real = tmp_path / "drawn", CellFlux.sample
    calls = []

    def stop(self: CellFlux, *args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CellFlux, "sample", stop)
    assert draw(checkpoint, controls, out, "--batch-size", "3", "--n", "3") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(contents(out)) == 3 and not (out / "manifest.csv").exists()
    monkeypatch.undo()
    assert draw(checkpoint, controls, out, "--batch-size", "3", "--n", "3") == 0
    assert len(contents(out)) == 10


def test_more_images_and_compounds_are_added_to_those_that_are_there(
    checkpoint: Path, controls: Path, tmp_path: Path
) -> None:
    out, fresh = tmp_path / "drawn", tmp_path / "fresh"
    assert draw(checkpoint, controls, out, "--n", "2", "--compounds", "taxol") == 0
    before = contents(out)
    before.pop("grid.png")
    assert draw(checkpoint, controls, out, "--n", "4", "--compounds", "taxol,cytochalasin B") == 0
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert draw(checkpoint, controls, fresh, "--n", "4", "--compounds", "taxol", "--compounds", "cytochalasin B") == 0
    assert (out / "manifest.csv").read_bytes() == (fresh / "manifest.csv").read_bytes()
    for name, data in contents(fresh).items():
        if name != "grid.png":
            one, two = (np.asarray(Image.open(folder / name)).astype(int) for folder in (fresh, out))
            assert np.abs(one - two).max() <= 1, f"{name}: {len(data)} bytes"


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--seed", "1"), "seed 0"), (("--cfg", "2"), "guidance"), (("--split", "test"), "control_files")],
)
def test_a_folder_of_other_settings_is_not_mixed(
    checkpoint: Path,
    controls: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    what: str,
) -> None:
    out = tmp_path / "drawn"
    assert draw(checkpoint, controls, out, "--n", "1") == 0
    before = contents(out)
    assert draw(checkpoint, controls, out, "--n", "1", *more) == 2
    assert f"was begun with {what}" in capsys.readouterr().err
    assert contents(out) == before and (out / "manifest.csv").exists()


# ---- unusable input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--compounds", "taxoll"), "no compound 'taxoll'; did you mean 'taxol'"),
        (("--split", "val"), "no control has SPLIT 'val'; there are test, train"),
        (("--set", "steps=ten"), "steps is 'ten'"),
        (("--set", "colour=red"), "cellflux has no option 'colour'"),
        (("--set", "embeddings=3"), "3"),
        (("--device", "cuda:7"), "no CUDA device"),
    ],
)
def test_one_line_says_what_is_wrong(
    checkpoint: Path,
    controls: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    said: str,
) -> None:
    assert draw(checkpoint, controls, tmp_path / "drawn", *more) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "drawn").exists()


def test_controls_that_do_not_fit_are_named(checkpoint: Path, controls: Path, tmp_path: Path) -> None:
    model = generators.load("cellflux", checkpoint)
    found = read_manifest(controls)
    assert pick_controls(found).tolist() == list(range(6))
    assert pick_controls(found, "Test").tolist() == [0, 3]
    for name in ("0.png", "3.png"):
        Image.fromarray(np.zeros((15, 16, 3), np.uint8)).save(controls / name)
    with pytest.raises(ValueError, match="multiples of 2 px; these images are 15x16"):
        generate(model, make_plan(model, found, None, 1, 0, "test"), tmp_path / "a", seed=0, batch=1)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(controls / "0.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(controls / "3.png")
    with pytest.raises(ManifestError, match=r"control .*3\.png: has 1 channel, 3 are wanted"):
        generate(model, make_plan(model, found, None, 6, 0, "test"), tmp_path / "b", seed=0, batch=1)
    table = pd.read_csv(controls / "index.csv")
    table[table["state"] == 1].to_csv(controls / "index.csv", index=False)
    with pytest.raises(ManifestError, match="column STATE has no control"):
        pick_controls(read_manifest(controls))
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_controls_at_another_scale_are_refused(checkpoint: Path, controls: Path) -> None:
    model = generators.load("cellflux", checkpoint)
    assert isinstance(model, CellFlux)
    check_scale(model, read_manifest(controls))
    model.origin.args["pixel_size_um"] = 0.32
    with pytest.raises(ValueError, match=r"pixels are 0\.64 um .* trained on 0\.32 um"):
        check_scale(model, read_manifest(controls))


def test_a_model_without_a_table_says_what_it_needs(controls: Path) -> None:
    net = randomised(AdmNet(AdmConfig(3, 3, 32, (1,), 1, (), 0.0)))
    assert isinstance(net, AdmNet)
    with pytest.raises(ValueError, match="no compound table here: load it with one"):
        make_plan(CellFlux(net), read_manifest(controls), None, 1, 0)


def test_options_that_need_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--controls", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run(["generate", "--generator", "impa", *rest]) == 2
    assert "needs its --checkpoint" in capsys.readouterr().err
    assert run(["generate", "--checkpoint", "a.pth", *rest]) == 2
    assert "needs the --generator" in capsys.readouterr().err


def test_mosaic_shows_small_images_large_and_leaves_a_gap() -> None:
    rows = [torch.rand(3, 3, 16, 16), torch.rand(2, 3, 16, 16)]
    picture = mosaic(rows)
    assert picture.shape == (2 * 98 - 2, 3 * 98 + 4, 3)
    assert (picture[:, 98:104] == 255).all(), "the gap after the control"
    assert mosaic([torch.zeros(1, 1, 128, 128)]).shape[0] == 128


# ---- the bundled model ------------------------------------------------------------------------------------------


def test_the_bundled_model_draws_phantoms_of_the_class_asked_for(tmp_path: Path) -> None:
    """Strong effects only: rounded bright cells are brighter in actin than giant pale ones, on the same controls."""
    model = generators.load("cellflux", generators.MINI_CELLFLUX)
    assert sum(p.numel() for p in model.net.parameters()) < 3_000_000
    assert set(model.compounds or []) == set(COMPOUNDS) - {"DMSO"}
    write_dataset(tmp_path / "cells", 60, 48, seed=5)
    found = read_manifest(tmp_path / "cells")
    check_scale(model, found)
    plan = make_plan(model, found, ["emetasol", "spredolin"], 6, 0)
    generate(model, plan, tmp_path / "out", seed=0, steps=4, batch=12)
    mean = {
        name: np.mean([np.asarray(Image.open(path))[..., 0].mean() for path in (tmp_path / "out" / name).iterdir()])
        for name in plan.compounds
    }
    assert mean["emetasol"] > mean["spredolin"] + 5
    write_dataset(tmp_path / "large", 20, 96, seed=5)
    with pytest.raises(ValueError, match="biorewards phantom --size 48"):
        check_scale(model, read_manifest(tmp_path / "large"))
