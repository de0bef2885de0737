"""`biorewards audit` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from bundled import bundled

from biorewards.io.tables import read_info, read_table
from biorewards.phantom import write_dataset
from cli.audit import parse_models
from cli.main import run


def test_models_are_named() -> None:
    assert parse_models(("a=x", "b.1=y=z")) == {"a": Path("x"), "b.1": Path("y=z")}
    for given in (("x/",), ("=x",), ("a=",), ("../a=x",), ("a b=x",), ("a=x", "a=y")):
        with pytest.raises(Exception, match=r"write NAME=DIR|two models are called"):
            parse_models(given)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--real", "NAME=DIR", "returns a control image", "audit.html", "--second-opinion"):
        assert word in text


def test_wrong_usage_is_one_line_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "--assay", "phantom", "--real", str(tmp_path), "--model", "a=", "--out", "o"]) == 2
    missing = ["audit", "--assay", "phantom", "--real", str(tmp_path / "no"), "--model", "a=b", "--out", "o"]
    assert run(missing) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(["audit", "--real", str(tmp_path), "--model", "a=b", "--out", "o"]) == 2


@pytest.mark.slow
def test_two_models_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundled("phantom")
    write_dataset(tmp_path / "real", 300, 48, 1)
    write_dataset(tmp_path / "a", 80, 48, 2)
    write_dataset(tmp_path / "b", 80, 48, 3)
    args = ["audit", "--assay", "phantom", "--real", str(tmp_path / "real"), "--model", f"a={tmp_path / 'a'}",
            "--model", f"b={tmp_path / 'b'}", "--out", str(tmp_path / "out"), "--device", "cpu"]  # fmt: skip
    assert run([*args, "--second-opinion"]) == 0
    printed = capsys.readouterr()
    assert "copy-control" in printed.out and "Rank by gap" in printed.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"audit.html", "audit.json", "audit.parquet", "scores", "finished"}
    answer = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert set(answer["rows"]) == {"real", "copy-control", "a", "b"} and "second_opinions" in answer
    assert str(tmp_path) in answer["command"]
    frame = read_table(tmp_path / "out" / "audit.parquet")
    assert {"row", "metric", "scope", "group", "value", "ci_low", "ci_high", "anchored"} <= set(frame)
    assert read_info(tmp_path / "out" / "audit.parquet")["suite"] == answer["suite"]
    assert len(read_table(tmp_path / "out" / "scores" / "a.parquet")) == 80
    html = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "Second opinions" in html and len(html) < 3_000_000
    # Again: nothing is scored, the numbers are the same, and --json prints them alone.
    assert run([*args, "--second-opinion", "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["rows"] == answer["rows"]
    assert "a: 80 done" not in again.err
    pd.testing.assert_frame_equal(read_table(tmp_path / "out" / "audit.parquet"), frame)
