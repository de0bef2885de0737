"""`biorewards score` from the command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bundled import bundled
from exact import statistics
from PIL import Image
from real_crops import CHANNELS, RANGE, write_crops68

from biorewards.assay import Assay
from biorewards.io.tables import read_info, read_table
from biorewards.phantom import render_dataset, write_dataset
from biorewards.reward import Suite
from cli.main import run

CLASSES = ["DMSO", "small", "rare", "unmeasured"]


@pytest.fixture(scope="module")
def assay_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assay without networks: the classical segmenter, statistics, no classifier."""
    folder = tmp_path_factory.mktemp("assay") / "plain"
    known = statistics()
    steps = {"q05": -1.64, "q25": -0.67, "q50": 0, "q75": 0.67, "q95": 1.64}
    known = known.assign(**{name: known["mean"] + step * known["sd"] for name, step in steps.items()})
    Assay(
        name="plain", channels={"actin": 0, "tubulin": 1, "dna": 2}, pixel_size=0.32, crop_size=96,
        intensity={"actin": (0.03, 0.6), "tubulin": (0.03, 0.6), "dna": (0.03, 0.6)}, classes=CLASSES,
        compounds={"drug-a": "small"}, nucleus_diameter=35.0, statistics=known, segmenter_name="classical",
        card={"real_scores": {"nucleus_count": {"mean": -1.1, "n": 50}}},
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    """(20, 96, 96, 3) uint8: phantom cells."""
    return render_dataset(20, seed=4).images


@pytest.fixture
def folder(tmp_path: Path, crops: np.ndarray) -> Path:
    """Twenty crops: ten of a compound, six of the control, four without a label."""
    for k, crop in enumerate(crops):
        path = tmp_path / "images" / ("drug-a" if k < 10 else "DMSO" if k < 16 else "") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path)
    return tmp_path / "images"


def test_a_folder_gives_a_table_a_summary_and_a_first_line(
    folder: Path, assay_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.parquet"
    assert run(["score", str(folder), "--assay", str(assay_dir), "--out", str(out)]) == 0
    said = capsys.readouterr()
    first = said.out.splitlines()[0]
    wanted = re.escape(
        "20 images; assay plain (given; --assay), channels actin=0, tubulin=1, dna=2 (assay's order; --channels), "
        "intensity full range of the files' integers (--intensity-range LO,HI), pixel 0.32 um (the assay's; "
        "--pixel-size UM); classical segmenter on cpu, float32, batches of 16 ("
    )
    assert re.fullmatch(wanted + r"\d+\.\d GiB free; --batch-size\)", first), first
    scores = read_table(out)
    assert len(scores) == 20 and scores["Reason_nucleus_count"].value_counts()["NO_TARGET"] == 4
    assert scores["Reward_nucleus_in_cytoplasm"].notna().all(), "the label-free reward needs no label"
    row = next(line for line in said.out.splitlines() if line.startswith("nucleus_count"))
    value = scores["Reward_nucleus_count"]
    assert row.split()[1] == "16" and f"{value.mean():.3f}" in row and "-1.100" in row
    assert "Missing: 4 images without a label (moa, nucleus_roundness, " in said.out
    assert "16 labels that the assay has no reference for (moa)." in said.out
    assert not (tmp_path / "scores.parquet.partial").exists() and f"wrote {out}" in said.out
    assert read_info(out)["suite"] == scores["Metadata_Suite"].iloc[0]


def test_json_alone_on_stdout_and_the_same_numbers(
    folder: Path, assay_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["score", str(folder), "--assay", str(assay_dir), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["images"] == 20 and found["rewards"]["nucleus_count"]["n"] == 16
    assert found["rewards"]["moa"]["n"] == 0 and found["rewards"]["moa"]["reasons"] == {
        "NO_REFERENCE": 16,
        "NO_TARGET": 4,
    }
    assert said.err.startswith("20 images; assay plain")


def test_two_runs_write_the_same_bytes_whatever_the_number_of_threads_that_read(
    folder: Path, assay_dir: Path, tmp_path: Path
) -> None:
    for suffix in (".parquet", ".csv"):
        written = []
        for name, workers in (("a", "1"), ("b", "3")):
            out, objects = tmp_path / f"{name}{suffix}", tmp_path / f"{name}_objects{suffix}"
            args = ["--assay", str(assay_dir), "--out", str(out), "--objects", str(objects), "--workers", workers]
            assert run(["score", str(folder), *args]) == 0
            written.append((out.read_bytes(), objects.read_bytes()))
        assert written[0] == written[1]
    objects_table = read_table(tmp_path / "a_objects.parquet")
    scores = read_table(tmp_path / "a.parquet")
    nuclei = objects_table[objects_table["Metadata_Object"] == "Nuclei"].groupby("ImageNumber").size()
    assert nuclei.to_dict() == {k + 1: n for k, n in enumerate(scores["Measure_nucleus_count"].astype(int)) if n}


def test_strict_lists_bad_rows_and_exits_one(
    folder: Path, assay_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "DMSO" / "11.png").write_bytes(b"no picture")
    (folder / "drogue-a").mkdir()
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(folder / "drogue-a" / "x.png")
    args = ["score", str(folder), "--assay", str(assay_dir), "--out", str(tmp_path / "s.csv")]
    assert run(args) == 0
    assert "2 of 21 rows are bad" in capsys.readouterr().err
    assert run([*args, "--strict"]) == 1
    err = capsys.readouterr().err
    assert "DMSO/11.png: is not a PNG file" in err and "drogue-a/x.png: unknown label drogue-a" in err
    assert "unknown label 'drogue-a' (1 rows): nearest known: drug-a" in err
    assert len(read_table(tmp_path / "s.csv")) == 21, "the table is written all the same"


def test_nothing_readable_is_an_error(assay_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert run(["score", str(tmp_path), "--assay", str(assay_dir)]) == 2
    assert "no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--resume"], "--resume goes on with the run of an --out"),
        (["--rewards", "moa,niceness"], "unknown rewards ['niceness']"),
        (["--weights", "moa=much"], "write NAME=NUMBER"),
        (["--weights", "niceness=2"], "unknown rewards ['niceness']"),
        (["--channels", "actin"], "write ROLE=CHANNEL"),
        (["--channels", "actin=0,dna=1"], "name each of its roles once"),
        (["--intensity-range", "5"], "LOW,HIGH"),
        (["--out", "scores.xlsx"], "tables are written as .parquet, .csv, .tsv"),
        (["--out", "a.csv", "--objects", "a.csv"], "need a file each"),
        (["--segmenter", "nothing"], "no segmenter 'nothing'"),
        (["--manifest", "gone.csv"], "gone.csv: is no file"),
        (["--assay", "gone"], "no assay at gone"),
    ],
)
def test_wrong_usage_exits_two_and_says_what_would_do(
    args: list[str], words: str, folder: Path, assay_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["score", str(folder), "--assay", str(assay_dir), *args]) == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["images"]


def test_a_path_that_is_not_there(assay_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["score", "/no/such/folder", "--assay", str(assay_dir)]) == 2
    assert "/no/such/folder: does not exist" in capsys.readouterr().err


def test_chosen_rewards_and_weights(folder: Path, assay_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    chosen = ["--rewards", "nucleus_count,nucleus_size", "--weights", "nucleus_size=3"]
    assert run(["score", str(folder), "--assay", str(assay_dir), "--out", str(out), *chosen]) == 0
    scores = read_table(out)
    assert [name for name in scores if name.startswith("Reason_")] == ["Reason_nucleus_count", "Reason_nucleus_size"]
    np.testing.assert_allclose(
        scores["Reward_total"], scores["Reward_nucleus_count"] + 3 * scores["Reward_nucleus_size"], rtol=1e-6
    )


def test_an_interrupted_run_resumes_to_the_same_bytes(
    folder: Path, assay_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["score", str(folder), "--assay", str(assay_dir), "--batch-size", "4"]
    assert run([*args, "--out", str(tmp_path / "whole.parquet")]) == 0
    out = tmp_path / "stopped.parquet"
    judge, calls = Suite.__call__, []

    def stop(self: Suite, batch: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Suite, "__call__", stop)
    assert run([*args, "--out", str(out)]) == 130
    assert "stopped; what is done is kept in" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "stopped.parquet.partial").is_dir()
    assert run([*args, "--out", str(out), "--resume", "--weights", "moa=1"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert run([*args, "--out", str(out), "--resume"]) == 0
    assert len(calls) == 3 + 3, "two of five batches were done"
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "stopped.parquet.partial").exists()


def test_the_folders_own_index_names_assay_channels_and_pixel_size(
    assay_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "set", 13, size=48, seed=1)
    asked = []
    load = Assay.load

    def loaded(name: str) -> Assay:
        asked.append(name)
        return load(assay_dir)

    monkeypatch.setattr(Assay, "load", loaded)
    out = tmp_path / "s.csv"
    assert run(["score", str(tmp_path / "set"), "--out", str(out)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert asked == ["phantom"] and "assay plain (named by the folder; --assay)" in first
    assert "pixel 0.64 um resampled to 0.32 um (named by the folder; --pixel-size UM)" in first
    scores = read_table(out)
    index = pd.read_csv(tmp_path / "set" / "index.csv", dtype=str)
    assert scores["Metadata_SAMPLE_KEY"].tolist() == index["SAMPLE_KEY"].tolist()
    assert (scores["Metadata_Error"] == "").all() and scores["Metadata_Plate"].tolist() == index["PLATE"].tolist()
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "bare.png")
    assert run(["score", str(tmp_path / "bare.png")]) == 0
    assert asked[-1] == "bbbc021" and "(default; --assay)" in capsys.readouterr().out


def test_counts_of_a_twelve_bit_camera_are_noticed(
    assay_dir: Path, tmp_path: Path, crops: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = np.round(crops / 255.0 * 4095).astype(np.uint16)
    for k, one in enumerate(counts[:6]):
        np.save(tmp_path / f"{k}.npy", one)
    assert run(["score", str(tmp_path), "--assay", str(assay_dir)]) == 0
    assert "For 12-bit counts pass --intensity-range 0,4095" in capsys.readouterr().err
    assert run(["score", str(tmp_path), "--assay", str(assay_dir), "--intensity-range", "0,4095"]) == 0
    said = capsys.readouterr()
    assert "counts" not in said.err and "intensity 0 to 4095" in said.out


def test_another_segmenter_is_said_to_change_the_comparison(
    folder: Path, assay_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["score", str(folder), "--assay", str(assay_dir), "--segmenter", "classical"]) == 0
    assert "measured with its own segmenter, not classical" in capsys.readouterr().err


def test_a_report_is_written_beside_the_table(folder: Path, assay_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert run(["score", str(folder), "--assay", str(assay_dir), "--report", str(report), "--seed", "3"]) == 0
    page = report.read_text()
    assert f"biorewards score {folder}" in page and "--seed 3" in page and "drug-a" in page


@pytest.mark.parametrize("data", ["bbbc021_crops68", "bbbc021_pairs96"])
def test_real_crops_of_bbbc021_are_scored(
    data: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file is read, nearly every crop has a nucleus and a cell, and most nuclei lie in cells."""
    bundled("bbbc021")
    source, args = shared / "data" / data, ["--channels", CHANNELS]
    if data == "bbbc021_crops68":
        source, args = write_crops68(shared / "data", tmp_path / "crops", every=6), [*args, "--intensity-range", RANGE]
    out = tmp_path / "scores.parquet"
    assert run(["score", str(source), "--assay", "bbbc021", *args, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = read_table(out)
    assert found["unreadable"] == 0 and (scores["Metadata_Error"] == "").all()
    assert (scores["Measure_nucleus_count"] >= 1).mean() > 0.95
    assert (scores["Measure_cytoplasm_count"] >= 1).mean() > 0.95
    assert scores["Reward_nucleus_in_cytoplasm"].median() > 0.97
