"""Tables on disk: whole or not at all, the same bytes for the same content, and nothing lost on the way back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biorewards.io.tables import atomic, read_info, read_table, write_table, write_tables, write_text


def scores() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    value = rng.normal(size=5).astype(np.float32) * np.float32([1e-8, 1, 1e8, 0.1, 1])
    value[3] = np.nan
    return pd.DataFrame(
        {
            "Metadata_File": ["a.png", "b, c.png", 'say "d".png', "naïve 細胞.png", "line\nbreak.png"],
            "Metadata_Plate": ["001", "", "1e5", "NA", "nan"],
            "Reward_moa": value,
            "Reason_moa": ["OK", "OK", "BLANK", "NO_TARGET", "OK"],
        }
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
def test_a_table_comes_back_as_it_was_and_has_the_same_bytes_twice(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        write_table(path, scores(), {"fingerprint": "abc"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = read_table(paths[0])
    assert list(found) == list(scores())
    for name in ("Metadata_File", "Metadata_Plate", "Reason_moa"):
        assert found[name].tolist() == scores()[name].tolist()
    np.testing.assert_array_equal(found["Reward_moa"].to_numpy(), scores()["Reward_moa"].to_numpy())
    assert found["Reward_moa"].dtype == np.float32
    assert read_info(paths[0]) == ({"fingerprint": "abc"} if suffix == ".parquet" else {})


def test_csv_numbers_are_the_shortest_that_mean_the_same_float32(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", pd.DataFrame({"Reward_x": np.float32([0.1, -25, np.nan])}))
    assert (tmp_path / "a.csv").read_text() == 'Reward_x\n0.1\n-25.0\n""\n'


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic(path) as (temporary,):
        temporary.write_text("new")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.csv"]


def test_tables_that_belong_together_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "new" / "a.parquet", tmp_path / "b.csv"
    with pytest.raises(ValueError, match=r"c.txt: tables are written as .parquet, .csv, .tsv"):
        write_tables({first: scores(), tmp_path / "c.txt": scores()})
    assert not first.exists()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_tables({first: scores(), second: scores()})
    assert not list(tmp_path.rglob("*.*"))
    monkeypatch.undo()
    write_tables({first: scores(), second: scores()})
    assert first.exists() and second.exists()


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_table(tmp_path / "a.csv", scores())
    assert os.stat(tmp_path / "a.csv").st_mode == os.stat(tmp_path / "plain").st_mode
