"""Broken files among good ones: no crash, no lost or moved row, and the good rows keep their bits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bundled import bundled
from exact import assay
from pictures import broken, picture
from PIL import Image

from biorewards import Assay, Suite, score_folder, suite
from biorewards.io.manifest import read_manifest
from biorewards.io.tables import write_table
from biorewards.reward import UNSCORED, Reason
from biorewards.scoring import bad_rows

#: Readable, and judged: what the masks say decides. Name -> picture from a good one.
JUDGED = {
    "black.png": lambda p: np.zeros_like(p),
    "white.png": lambda p: np.full_like(p, 255),
    "grey.tif.png": lambda p: np.full_like(p, 120),
    "noise.png": lambda p: np.random.default_rng(0).integers(0, 256, p.shape, dtype=np.uint8),
}
GOOD = 21


def small() -> Assay:
    """The test double for 32 px crops, so that other sizes are refused."""
    return replace(assay(), crop_size=32)


def good_rows(folder: Path, side: int) -> list[dict[str, str]]:
    rows = []
    for k in range(GOOD):
        name = ["{}.png", "héllo 細胞 {}.png", "{}.npy"][k % 3].format(k)
        if name.endswith("npy"):
            np.save(folder / name, picture(k, side))
        else:
            Image.fromarray(picture(k, side)).save(folder / name)
        rows.append({"file": name, "compound": ["drug-a", "DMSO", ""][k % 3]})
    rows[5] = dict(rows[4])  # duplicates stay rows of their own
    return rows


def bad_files(folder: Path) -> dict[str, str]:
    """Write every broken file; name -> words of its message."""
    trace = folder / "trace"
    words = {}
    for name, (write, text) in broken(picture(), trace).items():
        write(folder / name)
        words[name] = text
    (folder / "folder.png").mkdir()
    words["folder.png"] = "is a folder"
    words["gone.png"] = "does not exist"
    words["../outside.png"] = "leaves the image root"
    Image.fromarray(picture()).save(folder.parent / "outside.png")
    (folder / "leaving.png").symlink_to(folder.parent / "outside.png")
    words["leaving.png"] = "leaves the image root"
    words["https://example.org/a.png"] = "is a URL"
    words["photo.jpg"] = ".jpg"
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    if os.geteuid() != 0:
        Image.fromarray(picture()).save(folder / "locked.png")
        (folder / "locked.png").chmod(0)
        words["locked.png"] = "Permission denied"
    return words


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[dict[str, str]], dict[str, str]]:
    """Folder, rows of the good files alone, and what is broken; `list.csv` has the bad ones spread among the good."""
    folder = tmp_path / "images"
    folder.mkdir()
    good = good_rows(folder, 32)
    words = bad_files(folder)
    rows = list(good)
    rng = np.random.default_rng(3)
    for name in words:
        rows.insert(int(rng.integers(0, len(rows) + 1)), {"file": name, "compound": "drug-a"})
    pd.DataFrame(rows).to_csv(folder / "list.csv", index=False)
    return folder, good, words


def test_there_are_at_least_twenty_five_kinds_of_broken_input(
    mixed: tuple[Path, list[dict[str, str]], dict[str, str]],
) -> None:
    assert len(mixed[2]) >= 35


def test_bad_files_are_rows_with_their_message_and_good_rows_keep_their_bits(
    mixed: tuple[Path, list[dict[str, str]], dict[str, str]], tmp_path: Path
) -> None:
    folder, good, words = mixed
    judge = suite(small())
    found = score_folder(folder, small(), judge, batch_size=4).scores
    assert found["Metadata_File"].tolist() == pd.read_csv(folder / "list.csv")["file"].tolist()
    for name, text in words.items():
        row = found[found["Metadata_File"] == name].iloc[0]
        assert text in row["Metadata_Error"], name
        assert all(row[f"Reason_{one}"] == "BAD_IMAGE" for one in judge.rewards)
        assert row[[column for column in found if str(column).startswith(("Reward_", "Measure_"))]].isna().all(), name
    assert not (folder / "trace").exists(), "something was unpickled"
    pd.DataFrame(good).to_csv(tmp_path / "good.csv", index=False)
    alone = score_folder(read_manifest(tmp_path / "good.csv", images=folder), small(), judge, batch_size=4).scores
    kept = found[~found["Metadata_File"].isin(list(words))].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, alone, check_exact=True)
    write_table(tmp_path / "kept.parquet", kept)
    write_table(tmp_path / "alone.parquet", alone)
    assert (tmp_path / "kept.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


def test_a_folder_of_broken_files_without_a_manifest(mixed: tuple[Path, list[dict[str, str]], dict[str, str]]) -> None:
    folder, good, words = mixed
    (folder / "list.csv").unlink()
    found = score_folder(folder, small(), suite(small())).scores
    on_disk = {name for name in words if (folder / name).is_file() and name not in ("photo.jpg", "../outside.png")}
    assert set(found["Metadata_File"]) == on_disk | {row["file"] for row in good} | {good_rows_name(5)}
    assert set(bad_rows(found)["Metadata_File"]) == on_disk


def good_rows_name(k: int) -> str:
    return ["{}.png", "héllo 細胞 {}.png", "{}.npy"][k % 3].format(k)


def test_what_is_readable_but_no_cell_gets_the_worst_value_of_every_reward_or_is_judged(tmp_path: Path) -> None:
    for name, make in JUDGED.items():
        Image.fromarray(make(picture())).save(tmp_path / name)
    (tmp_path / "list.csv").write_text("file,moa\n" + "".join(f"{name},small\n" for name in JUDGED))
    judge = suite(small())
    found = score_folder(tmp_path, small(), judge).scores.set_index("Metadata_File")
    for name in ("black.png", "white.png", "grey.tif.png"):
        for reward in judge.rewards:
            assert found.at[name, f"Reason_{reward}"] == Reason.BLANK.name
            assert found.at[name, f"Reward_{reward}"] == judge.rewards[reward].worst  # type: ignore[attr-defined]
    assert found["Reward_total"].notna().all() and (found["Metadata_Error"] == "").all()


@pytest.mark.parametrize("name", ["bbbc021", "phantom"])
def test_with_the_bundled_assay_nothing_that_is_wrong_moves_a_good_row(
    name: str,
    tmp_path: Path,
) -> None:
    """Bad files, blank and noise crops and unknown labels among the good rows, with the real networks."""
    judged = bundled(name)
    side = judged.crop_size or 96
    folder = tmp_path / "images"
    folder.mkdir()
    good = good_rows(folder, side)
    for row in good:
        row["compound"] = judged.classes[1] if row["compound"] == "drug-a" else row["compound"]
    wrong = list(bad_files(folder))
    for label, make in JUDGED.items():
        Image.fromarray(make(picture(0, side))).save(folder / label)
    rows = list(good)
    rng = np.random.default_rng(5)
    for extra in (*wrong, *JUDGED):
        rows.insert(int(rng.integers(0, len(rows) + 1)), {"file": extra, "compound": judged.classes[1]})
    rows.insert(7, {"file": good[0]["file"], "compound": "no such compound"})
    tables = []
    for what, number in ((rows, 0), (good, 1)):
        path = folder / f"list{number}.csv"
        pd.DataFrame(what).to_csv(path, index=False)
        tables.append(score_folder(read_manifest(path), judged, suite(judged), batch_size=8).scores)
    mixed_table, alone = tables
    assert mixed_table["Metadata_File"].tolist() == [row["file"] for row in rows]
    left_out = mixed_table["Metadata_File"].isin([*wrong, *JUDGED]) | (
        mixed_table["Metadata_Compound"] == "no such compound"
    )
    pd.testing.assert_frame_equal(mixed_table[~left_out].reset_index(drop=True), alone, check_exact=True)
    judge: Suite = suite(judged)
    blank = mixed_table[mixed_table["Metadata_File"].isin(["black.png", "white.png", "grey.tif.png"])]
    for reward, one in judge.rewards.items():
        scored = ~blank[f"Reason_{reward}"].isin([reason.name for reason in UNSCORED])
        assert (blank.loc[scored, f"Reward_{reward}"] == one.worst).all()  # type: ignore[attr-defined]
