"""A folder to a table: order, independence from neighbours and batches, resuming, objects, and the summary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundled import bundled
from exact import assay, disc, image, random_crop
from pictures import WRITERS
from skimage.measure import perimeter_crofton, regionprops

from biorewards import scoring
from biorewards.batch import Batch
from biorewards.io.images import Decoded, ImageError
from biorewards.io.manifest import read_manifest
from biorewards.io.reading import Reader, plan_reading
from biorewards.phantom import render_dataset
from biorewards.phantom.dataset import Crops
from biorewards.reward import Reason, Score, Suite
from biorewards.rewards import suite
from biorewards.scoring import bad_rows, score_folder, summarise
from biorewards.scoring_summary import bootstrap, spread_ratio


def write_crops(folder: Path, n: int, label: Callable[[int], str] = lambda k: "drug-a") -> Path:
    """n crops with exact masks, each a file, and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(n):
        np.save(folder / f"{k}.npy", image(*random_crop(k), brightness=0.2 + 0.6 * (k % 7) / 7).numpy())
        rows.append({"file": f"{k}.npy", "compound": label(k)})
    pd.DataFrame(rows).to_csv(folder / "list.csv", index=False)
    return folder


def plain_loop(folder: Path, compound: str = "drug-a") -> pd.DataFrame:
    """The slow reference: every image alone, one after the other."""
    judge = suite(assay())
    name = assay().compounds.get(compound, compound)
    target = torch.tensor([assay().classes.index(name)])
    rows = []
    for k in range(len(list(folder.glob("*.npy")))):
        result = judge(Batch(torch.from_numpy(np.load(folder / f"{k}.npy"))[None], target, assay()))
        values = {f"Reward_{name}": float(score.value) for name, score in result.scores.items()}
        rows.append(values | {"Reward_total": float(result.total)})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_table_equals_a_plain_loop_in_input_order(batch_size: int, workers: int, tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", 21)
    found = score_folder(folder, assay(), suite(assay()), batch_size=batch_size, workers=workers).scores
    expected = plain_loop(folder)
    assert found["Metadata_File"].tolist() == [f"{k}.npy" for k in range(21)]
    np.testing.assert_allclose(found[list(expected)], expected, atol=1e-5)
    assert (found["Metadata_MoA"] == "small").all() and (found["Reason_moa"] == "OK").all()
    names = list(suite(assay()).rewards)
    assert list(found)[8:] == [
        *(f"Reward_{name}" for name in (*names, "total", "total_label_free")),
        *(f"Reason_{name}" for name in names),
        *(f"Measure_{name}" for name in names),
    ]
    assert all(found[name].dtype == np.float32 for name in found if name.startswith(("Reward_", "Measure_")))
    assert list(found)[5:8] == ["Metadata_Error", "Metadata_Assay", "Metadata_Suite"]


def test_labels_decide_reasons_not_rows(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", 4, lambda k: ["drug-a", "", "nonsense", "drug-b"][k])
    result = score_folder(folder, assay(), suite(assay()))
    assert result.scores["Reason_moa"].tolist() == ["OK", "NO_TARGET", "UNKNOWN_TARGET", "OK"]
    assert result.scores["Reason_nucleus_size"].tolist() == ["OK", "NO_TARGET", "UNKNOWN_TARGET", "POOLED_REFERENCE"]
    assert result.scores["Reward_total"].isna().tolist() == [False, True, True, False]
    assert result.scores["Reward_total_label_free"].notna().all()
    assert [note.split(" (")[0] for note in result.notes] == ["unknown label 'nonsense'"]
    assert bad_rows(result.scores)["problem"].to_dict() == {2: "unknown label nonsense"}


class Arithmetic:
    """A reward with real floating point in it: a convolution and a matrix product over the whole crop."""

    name = "arithmetic"
    worst = -1.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(8, 3, 5, 5, generator=generator)
        self.matrix = torch.randn(8 * 92 * 92, 4, generator=generator)

    def __call__(self, batch: Batch) -> Score:
        hidden = torch.nn.functional.conv2d(batch.images, self.kernel).tanh().flatten(1)
        value = (hidden @ self.matrix).softmax(1)[:, 0]
        return Score(value, hidden.mean(1), torch.zeros(len(batch), dtype=torch.uint8))

    def __repr__(self) -> str:
        return "Arithmetic()"


def test_good_rows_have_the_same_bits_with_and_without_bad_ones(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", 37)
    judge = Suite([Arithmetic()])
    alone = score_folder(folder, assay(), judge, batch_size=8).scores
    names = [f"{k}.npy" for k in range(37)]
    for place in (0, 5, 6, 7, 20, 42):
        names.insert(place, f"gone{place}.npy")
    (folder / "list.csv").write_text("file,compound\n" + "".join(f"{name},drug-a\n" for name in names))
    mixed = score_folder(folder, assay(), judge, batch_size=8).scores
    assert mixed["Metadata_File"].tolist() == names
    good = ~mixed["Metadata_File"].str.startswith("gone")
    assert (mixed.loc[~good, "Reason_arithmetic"] == "BAD_IMAGE").all()
    assert mixed.loc[~good, ["Reward_arithmetic", "Reward_total", "Measure_arithmetic"]].isna().all(axis=None)
    assert mixed.loc[~good, "Metadata_Error"].tolist() == ["does not exist"] * 6
    pd.testing.assert_frame_equal(mixed[good].reset_index(drop=True), alone, check_exact=True)


def test_images_of_several_sizes_are_batched_by_size(tmp_path: Path) -> None:
    sizes = [96, 64, 96, 80, 64, 96, 80, 64]
    for k, size in enumerate(sizes):
        np.save(tmp_path / f"{k}.npy", image(*random_crop(k, size)).numpy())
    shapes: list[tuple[int, ...]] = []

    class Spy(Arithmetic):
        def __call__(self, batch: Batch) -> Score:
            shapes.append(tuple(batch.images.shape))
            mean = batch.images.mean((1, 2, 3))
            return Score(mean, mean, torch.zeros(len(batch), dtype=torch.uint8))

    found = score_folder(tmp_path, assay(), Suite([Spy()]), batch_size=3).scores
    expected = [float(image(*random_crop(k, size)).mean()) for k, size in enumerate(sizes)]
    np.testing.assert_allclose(found["Reward_arithmetic"], expected, rtol=1e-5)
    assert sorted(shapes) == [(3, 3, 64, 64), (3, 3, 80, 80), (3, 3, 96, 96)]


def test_memory_is_bounded_by_what_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three images ahead and four pending, no more than these are ever alive at once."""
    one = 3 * 96 * 96 * 4
    monkeypatch.setattr(scoring, "WINDOW_BYTES", 3 * one)
    monkeypatch.setattr(scoring, "PENDING_BYTES", 4 * one)
    folder = write_crops(tmp_path / "crops", 40)
    manifest = read_manifest(folder)
    started: list[int] = []
    judged: list[int] = []
    ahead: list[int] = []
    lock = threading.Lock()

    class Counting(Reader):
        def __call__(self, row: int) -> Decoded:
            with lock:
                started.append(row)
                ahead.append(len(started) - len(judged))
            return super().__call__(row)

    class Spy(Arithmetic):
        def __call__(self, batch: Batch) -> Score:
            judged.extend(range(len(batch)))
            mean = batch.images.mean((1, 2, 3))
            return Score(mean, mean, torch.zeros(len(batch), dtype=torch.uint8))

    plan = plan_reading(manifest, assay())
    reader = Counting(manifest, plan.assay_name, plan.n_channels, plan.crop_size)
    score_folder(manifest, assay(), Suite([Spy()]), reader=reader, batch_size=4, workers=2)
    assert len(started) == 40 and max(ahead) <= 3 + 4 + 1


def test_decoding_goes_on_while_a_batch_is_judged(tmp_path: Path) -> None:
    """The judge of batch 1 waits until an image of batch 2 has been read: without overlap this would never end."""
    folder = write_crops(tmp_path / "crops", 8)
    manifest = read_manifest(folder)
    second = threading.Event()

    class Signalling(Reader):
        def __call__(self, row: int) -> Decoded:
            if row == 5:
                second.set()
            return super().__call__(row)

    class Waiting(Arithmetic):
        def __call__(self, batch: Batch) -> Score:
            assert second.wait(20), "nothing was read while the judge worked"
            return super().__call__(batch)

    plan = plan_reading(manifest, assay())
    reader = Signalling(manifest, plan.assay_name, plan.n_channels, plan.crop_size)
    found = score_folder(manifest, assay(), Suite([Waiting()]), reader=reader, batch_size=4, workers=2)
    assert len(found.scores) == 8


class Stopping(Arithmetic):
    """Stops the run, as Ctrl-C does, when batch `at` comes."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __call__(self, batch: Batch) -> Score:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__call__(batch)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("judges", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_stopped_run_goes_on_and_gives_the_same_bits(
    at: int, judges: int, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(judges)
    folder = write_crops(tmp_path / "crops", 30)
    names = [f"{k}.npy" for k in range(30)]
    names.insert(3, "gone.npy")
    (folder / "list.csv").write_text("file,compound\n" + "".join(f"{name},drug-a\n" for name in names))
    whole = score_folder(folder, assay(), Suite([Arithmetic()]), batch_size=4, objects=True)
    journal = tmp_path / "scores.csv.partial"
    with pytest.raises(KeyboardInterrupt):
        score_folder(folder, assay(), Suite([Stopping(at)]), batch_size=4, objects=True, resume_dir=journal)
    seen: list[int] = []

    class Counting(Arithmetic):
        def __call__(self, batch: Batch) -> Score:
            seen.append(1)
            return super().__call__(batch)

    again = score_folder(
        folder, assay(), Suite([Counting()]), batch_size=4, objects=True, resume_dir=journal, resume=True
    )
    pd.testing.assert_frame_equal(again.scores, whole.scores, check_exact=True)
    assert again.objects is not None and whole.objects is not None
    pd.testing.assert_frame_equal(again.objects, whole.objects, check_exact=True)
    at_work = judges if judges > 1 else 0
    assert 8 - at <= len(seen) <= 8 - at + at_work, "finished batches are not judged again"


def test_batches_judged_side_by_side_come_out_as_from_one_judge(tmp_path: Path, threads: Callable[[int], None]) -> None:
    folder = write_crops(tmp_path / "crops", 30)
    found = []
    for judges in (1, 2, 4):
        threads(judges)
        found.append(score_folder(folder, bundled("phantom"), suite(bundled("phantom")), batch_size=4, objects=True))
        assert torch.get_num_threads() == judges
    for other in found[1:]:
        pd.testing.assert_frame_equal(other.scores, found[0].scores, check_exact=True)
        assert other.objects is not None and found[0].objects is not None
        pd.testing.assert_frame_equal(other.objects, found[0].objects, check_exact=True)


def test_an_interrupted_run_of_other_settings_is_refused_and_named(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", 6)
    journal = tmp_path / "scores.csv.partial"
    with pytest.raises(KeyboardInterrupt):
        score_folder(folder, assay(), Suite([Stopping(1)]), batch_size=2, resume_dir=journal)
    go_on = {"batch_size": 2, "resume_dir": journal, "resume": True}
    with pytest.raises(ValueError, match=r"made with other settings .batch_size was 2, is 3"):
        score_folder(folder, assay(), Suite([Arithmetic()]), **{**go_on, "batch_size": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="suite was"):
        score_folder(folder, assay(), Suite([Arithmetic()], {"arithmetic": 2.0}), **go_on)  # type: ignore[arg-type]
    np.save(folder / "5.npy", image(*random_crop(99)).double().numpy())
    with pytest.raises(ValueError, match="files was"):
        score_folder(folder, assay(), Suite([Arithmetic()]), **go_on)  # type: ignore[arg-type]
    assert len(score_folder(folder, assay(), Suite([Arithmetic()]), batch_size=2, resume_dir=journal).scores) == 6
    other = tmp_path / "other.partial"
    other.mkdir()
    with pytest.raises(ValueError, match="is no unfinished run"):
        score_folder(folder, assay(), Suite([Arithmetic()]), resume_dir=other)
    assert other.exists()


def test_a_run_that_is_killed_loses_at_most_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `finally` runs when a process is killed: what was written before must be enough."""
    monkeypatch.setattr("biorewards.scoring_journal.PART_ROWS", 4)
    folder = write_crops(tmp_path / "crops", 12)
    journal = tmp_path / "j"
    monkeypatch.setattr("biorewards.scoring_journal.Journal.flush", _flush_until_killed)
    with pytest.raises(_KilledError):
        score_folder(folder, assay(), Suite([Arithmetic()]), batch_size=2, resume_dir=journal)
    monkeypatch.undo()
    monkeypatch.setattr("biorewards.scoring_journal.PART_ROWS", 4)
    again = score_folder(folder, assay(), Suite([Arithmetic()]), batch_size=2, resume_dir=journal, resume=True)
    whole = score_folder(folder, assay(), Suite([Arithmetic()]), batch_size=2)
    pd.testing.assert_frame_equal(again.scores, whole.scores, check_exact=True)


class _KilledError(BaseException):
    pass


def _flush_until_killed(journal: object, _flush: Callable[[object], None] = scoring.Journal.flush) -> None:  # type: ignore[assignment]
    if len(journal.parts) == 1:  # type: ignore[attr-defined]
        raise _KilledError
    _flush(journal)


# Objects


def test_the_object_table_holds_every_object_once_with_its_measures(tmp_path: Path) -> None:
    nuclei, cells = np.zeros((96, 96), int), np.zeros((96, 96), int)
    disc(cells, 1, 40, 40, 30)
    disc(nuclei, 1, 40, 40, 12)
    disc(nuclei, 3, 90, 10, 9)
    np.save(tmp_path / "0.npy", image(np.zeros_like(nuclei), np.zeros_like(cells)).numpy())
    np.save(tmp_path / "1.npy", image(nuclei, cells).numpy())
    (tmp_path / "list.csv").write_text("file\n0.npy\ngone.npy\n1.npy\n")
    found = score_folder(tmp_path, assay(), suite(assay()), objects=True).objects
    assert found is not None
    assert found["ImageNumber"].tolist() == [3, 3, 3] and found["Metadata_File"].tolist() == ["1.npy"] * 3
    assert found["Metadata_Object"].tolist() == ["Nuclei", "Nuclei", "Cells"]
    assert found["ObjectNumber"].tolist() == [1, 3, 1]
    assert found["Nuclei_AreaShape_Area"].tolist()[:2] == [(nuclei == 1).sum(), (nuclei == 3).sum()]
    assert found["Cells_AreaShape_Area"].isna().tolist() == [True, True, False]
    assert found["Cells_AreaShape_Area"].iat[2] == (cells == 1).sum()
    assert found["Metadata_TouchesBorder"].tolist() == [False, True, False]
    assert found[["Nuclei_Location_Center_X", "Nuclei_Location_Center_Y"]].iloc[0].tolist() == [40, 40]
    whole = regionprops((nuclei == 1).astype(int))[0]
    assert found["Nuclei_AreaShape_Perimeter"].iat[0] == pytest.approx(perimeter_crofton(nuclei == 1, 4), rel=1e-5)
    assert found["Nuclei_AreaShape_Eccentricity"].iat[0] == pytest.approx(whole.eccentricity, abs=1e-4)
    assert score_folder(tmp_path, assay(), suite(assay())).objects is None


# Summary


def test_the_summary_of_a_table_by_hand(tmp_path: Path) -> None:
    judged = assay()
    judged.card["real_scores"] = {
        "nucleus_count": {"mean": -0.9, "n": 120},
        "nucleus_in_cytoplasm": {"mean": 0.98, "n": 120},
    }
    judge = suite(judged)
    label = ["drug-a"] * 6 + ["DMSO"] * 6 + ["", "what"]
    folder = write_crops(tmp_path / "crops", 14, lambda k: label[k])
    np.save(folder / "2.npy", np.zeros((3, 96, 96), np.float32))
    (folder / "7.npy").write_bytes(b"broken")
    scores = score_folder(folder, judged, judge).scores
    found = summarise(scores, judged, judge)
    assert {name: found[name] for name in ("images", "unreadable", "unlabelled", "unknown_label")} == {
        "images": 14, "unreadable": 1, "unlabelled": 1, "unknown_label": 1,
    }  # fmt: skip
    one = found["rewards"]["nucleus_count"]
    value = scores["Reward_nucleus_count"]
    assert one["n"] == 11 and one["missing"] == 3
    assert one["mean"] == pytest.approx(value.mean()) and one["real_mean"] == -0.9 and one["real_n"] == 120
    assert one["ci_low"] < one["mean"] < one["ci_high"]
    assert one["worst_share"] == pytest.approx((value == -25).sum() / 11) and one["worst_share"] > 0
    assert one["reasons"] == {"OK": 10, "BLANK": 1, "BAD_IMAGE": 1, "NO_TARGET": 1, "UNKNOWN_TARGET": 1}
    assert one["classes"]["small"] == {"n": 6, "mean": pytest.approx(value[:6].mean())}
    assert one["worst_class"] == "small"
    assert found["furthest"]["class"] == "small" and 0 < found["furthest"]["shortfall"] <= 1
    assert found["rewards"]["moa"]["real_mean"] is None and found["rewards"]["total"]["reasons"] == {}


def test_bootstrap_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(150):
        low, high = bootstrap(rng.exponential(size=(60, 1)), seed)
        hits += bool(low[0] <= 1 <= high[0])
    assert 0.88 <= hits / 150 <= 0.99
    values = np.full((10, 3), np.nan)
    values[:, 0] = 2.0
    values[0, 1] = 5.0
    low, high = bootstrap(values, 0)
    assert low[0] == high[0] == 2 and np.isnan([low[1], high[1], low[2], high[2]]).all()
    np.testing.assert_array_equal(bootstrap(values, 7), bootstrap(values, 7))


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_the_spread_ratio_finds_a_generator_that_draws_the_mean(factor: float) -> None:
    judged = assay()
    rng = np.random.default_rng(0)
    labels = ["DMSO", "small"] * 500
    centre = np.where(np.array(labels) == "small", 720, 900)
    scores = pd.DataFrame({
        "Metadata_MoA": labels,
        "Measure_nucleus_size": (centre + 40 + factor * 150 * rng.normal(size=1000)).astype(np.float32),
    })  # fmt: skip
    target = torch.tensor([judged.classes.index(one) for one in labels])
    assert spread_ratio(scores, "nucleus_size", judged, target) == pytest.approx(factor, rel=0.06)
    assert spread_ratio(scores.head(1), "nucleus_size", judged, target[:1]) is None


def test_a_reader_error_in_a_thread_is_that_rows_error(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", 5)
    manifest = read_manifest(folder)

    class Failing(Reader):
        def __call__(self, row: int) -> Decoded:
            if row == 3:
                raise ImageError("3.npy", "made up")
            return super().__call__(row)

    plan = plan_reading(manifest, assay())
    reader = Failing(manifest, plan.assay_name, plan.n_channels, plan.crop_size)
    found = score_folder(manifest, assay(), suite(assay()), reader=reader, batch_size=2).scores
    assert found["Metadata_Error"].tolist() == ["", "", "", "made up", ""]
    assert found["Reason_moa"].tolist()[3] == Reason.BAD_IMAGE.name


# With the networks that ship


@pytest.fixture(scope="module")
def phantom_crops() -> Crops:
    return render_dataset(26, seed=11)


def write_pictures(folder: Path, crops: Crops, save: Callable[[Path, np.ndarray], Path], side: int) -> Path:
    """Every crop in a folder of its own (the writers choose the file's name), by class."""
    start = (96 - side) // 2
    for k, (pixels, label) in enumerate(zip(crops.images, crops.rows["ANNOT"], strict=True)):
        place = folder / str(label) / f"{k:02d}"
        place.mkdir(parents=True)
        save(place, np.ascontiguousarray(pixels[start : start + side, start : start + side]))
    return folder


def numbers(scores: pd.DataFrame) -> np.ndarray:
    """Rewards and measures, rows by crop number."""
    number = scores["Metadata_File"].str.split("/").str[-2].astype(int)
    table = scores.assign(number=number).sort_values("number")
    return table[[name for name in table if str(name).startswith(("Reward_", "Measure_"))]].to_numpy(np.float64)


@pytest.mark.parametrize("name", ["phantom", "bbbc021"])
def test_scores_do_not_depend_on_batch_size_or_order(
    name: str,
    phantom_crops: Crops,
    tmp_path: Path,
) -> None:
    judged = bundled(name)
    folder = write_pictures(tmp_path / "a", phantom_crops, WRITERS["png"], judged.crop_size or 96)
    manifest = read_manifest(folder)
    reference = numbers(score_folder(manifest, judged, suite(judged), batch_size=16).scores)
    assert np.isfinite(reference).mean() > 0.3
    for size in (1, 7):
        found = numbers(score_folder(manifest, judged, suite(judged), batch_size=size).scores)
        np.testing.assert_allclose(found, reference, atol=1e-5, rtol=1e-5)
    order = np.random.default_rng(0).permutation(len(manifest))
    shuffled = replace(
        manifest,
        table=manifest.table.iloc[order].reset_index(drop=True),
        files=[manifest.files[k] for k in order],
    )
    np.testing.assert_array_equal(numbers(score_folder(shuffled, judged, suite(judged)).scores), reference)


@pytest.mark.parametrize("name", ["phantom", "bbbc021"])
def test_scores_do_not_depend_on_file_format_or_integer_width(
    name: str,
    phantom_crops: Crops,
    tmp_path: Path,
) -> None:
    judged = bundled(name)
    tables = [
        numbers(score_folder(write_pictures(tmp_path / kind, phantom_crops, WRITERS[kind], judged.crop_size or 96),
                             judged, suite(judged)).scores)
        for kind in ("png", "ome-tiff", "npy 16 bit", "npy float32")
    ]  # fmt: skip
    for other in tables[1:]:
        np.testing.assert_allclose(other, tables[0], atol=1e-5, rtol=1e-5)


def test_two_batches_are_judged_at_the_same_time(tmp_path: Path, threads: Callable[[int], None]) -> None:
    """Each of two batches waits, inside the segmenter, for the other: a lock anywhere around it would never let go."""
    meeting = threading.Barrier(2, timeout=30)
    plain = assay()

    class Meeting:
        name = fingerprint = "meeting"

        def to(self, device: object) -> Meeting:
            return self

        def __call__(self, nucleus: torch.Tensor, cytoplasm: torch.Tensor, diameter: float) -> object:
            meeting.wait()
            assert plain.segmenter is not None
            return plain.segmenter(nucleus, cytoplasm, diameter)

    threads(2)
    folder = write_crops(tmp_path / "crops", 8)
    both = replace(plain, segmenter=Meeting())  # type: ignore[arg-type]
    found = score_folder(folder, both, suite(both), batch_size=4).scores
    alone = score_folder(folder, plain, suite(plain), batch_size=4).scores
    columns = [name for name in alone if name.startswith("Reward_")]
    pd.testing.assert_frame_equal(found[columns], alone[columns], check_exact=True)
