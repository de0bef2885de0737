"""Auditing models whose rank is known: better ones come first, for the right reasons, and cheats are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from bundled import bundled
from exact import CLASSES, image, random_crop
from exact import assay as exact_assay
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import Assay
from biorewards.audit import Audited, audit_folders
from biorewards.audit.bootstrap import interval
from biorewards.audit.columns import Yardstick
from biorewards.audit.conditions import match
from biorewards.audit.encoder import Encoder
from biorewards.audit.lesions import apply
from biorewards.audit.models import CONTROL, macro_f1, rank
from biorewards.audit.page import render
from biorewards.audit.results import document, table
from biorewards.audit.samples import REAL, controls_of, copy_controls, split_real
from biorewards.batch import Batch
from biorewards.fitting import measure_images, reference_statistics
from biorewards.io.manifest import ManifestError, read_manifest
from biorewards.io.reading import plan_reading
from biorewards.phantom import write_dataset
from biorewards.phantom.dataset import sample_path
from biorewards.rewards import suite
from biorewards.segmentation.segmenter import Masks


class Seen:
    """A classifier of the mean brightness, whose features are a small picture of the third channel."""

    classes: ClassVar = ["DMSO", "small", "rare"]
    fingerprint = "seen"
    net = SimpleNamespace(num_features=16)

    def to(self, device: object) -> Seen:
        return self

    def embed(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images[:, 2:], 4).flatten(1) * 4

    def judge(self, embedding: Tensor) -> Tensor:
        level = embedding.mean(1, keepdim=True) / 4
        return torch.softmax(-40 * (level - torch.tensor([[0.2, 0.45, 0.7]])).abs(), 1)

    def __call__(self, images: Tensor) -> Tensor:
        return self.judge(self.embed(images))


@lru_cache
def world_assay(classifier: bool = True) -> Assay:
    """The exact assay, with statistics of these crops: all classes have the same cells."""
    plain = exact_assay(classifier=False)
    images = torch.stack([image(*random_crop(9000 + k)) for k in range(200)])
    measures = measure_images(plain, images, lambda what, done, total: None)
    tables = [reference_statistics(measures, np.full(200, name), CLASSES) for name in CLASSES[:3]]
    known = pd.concat([part[part["class"] == name] for part, name in zip(tables, CLASSES[:3], strict=True)])
    seen = Seen() if classifier else None
    return replace(plain, statistics=known, classifier=seen)  # type: ignore[arg-type]


LEVEL = {"dmso": 0.2, "drug-a": 0.45, "drug-b": 0.7}
CLASS = {"dmso": "DMSO", "drug-a": "small", "drug-b": "rare"}


def draw(seed: int, compound: str) -> np.ndarray:
    """(3, 96, 96): exact labels in two channels, a texture of the class's brightness in the third."""
    rng = np.random.default_rng(seed)
    picture = image(*random_crop(seed)).numpy()
    texture = ndimage.gaussian_filter(rng.standard_normal((96, 96)), 9)
    picture[2] = np.clip(LEVEL[compound] + rng.normal(0, 0.02) + 0.06 * texture / texture.std(), 0, 1)
    return picture


def without_nuclei(picture: np.ndarray, share: float) -> np.ndarray:
    harmed = picture.copy()
    labels = np.unique(np.round(harmed[0] * 255))[1:]
    harmed[0][np.isin(np.round(harmed[0] * 255), labels[: round(share * len(labels))])] = 0
    return harmed


def write(folder: Path, pictures: list[np.ndarray], rows: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True)
    for k, picture in enumerate(pictures):
        np.save(folder / f"{k}.npy", picture.astype(np.float32))
    pd.DataFrame([{"file": f"{k}.npy", **row} for k, row in enumerate(rows)]).to_csv(folder / "index.csv", index=False)
    return folder


def labels(n: int) -> list[str]:
    return [("dmso", "drug-a", "drug-b")[k % 3] for k in range(n)]


def asked(n: int) -> list[dict[str, str]]:
    return [{"compound": "" if name == "dmso" else name, "moa": CLASS[name]} for name in labels(n)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images, and seven models of known merit."""
    root = tmp_path_factory.mktemp("world")
    real = [draw(k, name) for k, name in enumerate(labels(360))]
    rows = asked(360)
    for k, row in enumerate(rows):
        row |= {"plate": str(k % 4), "split": "train" if k < 240 else "test"}
    write(root / "real", real, rows)
    good = [draw(1000 + k, name) for k, name in enumerate(labels(120))]
    write(root / "good", good, asked(120))
    write(root / "mild", [without_nuclei(p, 0.6) for p in good], asked(120))
    write(root / "severe", [without_nuclei(p, 1.0) for p in good], asked(120))
    controls = [real[k] for k in range(240, 360) if labels(360)[k] == "dmso"]
    write(root / "copies", [controls[k % len(controls)] for k in range(120)], asked(120))
    write(root / "memory", [real[k][:, ::-1] for k in range(120)], asked(120))
    write(root / "thief", [real[240 + k] for k in range(120)], asked(120))
    first = {name: next(p for p, n in zip(good, labels(120), strict=True) if n == name) for name in LEVEL}
    write(root / "collapsed", [first[name] for name in labels(120)], asked(120))
    return root


MODELS = ("good", "mild", "severe", "copies", "memory", "thief", "collapsed")


def run(
    root: Path, folder: Path, names: tuple[str, ...] = MODELS, ours: Assay | None = None, **more: object
) -> Audited:
    assay = ours or world_assay()
    return audit_folders(
        assay, suite(assay), read_manifest(root / "real"), {name: read_manifest(root / name) for name in names},
        folder=folder, plan=lambda manifest: plan_reading(manifest, assay), **more,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def audited(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    return run(world, tmp_path_factory.mktemp("finished") / "all")


def kinds(audited: Audited, name: str) -> set[str]:
    return {flag.kind for flag in audited.audit.flags[name]}


def test_models_come_out_in_the_order_of_their_merit(audited: Audited) -> None:
    gaps = {row.name: float(row.draws["gap"][0]) for row in audited.audit.models}
    assert gaps["good"] < gaps["mild"] < gaps["severe"]
    settled = audited.audit.better_than
    assert {("good", "mild"), ("good", "severe"), ("good", "copies"), ("mild", "severe")} <= set(settled)
    assert audited.audit.places["good"].best == audited.audit.places["good"].worst == 1
    assert gaps["good"] <= audited.audit.floor < gaps["severe"]


def test_the_reward_that_was_harmed_is_the_one_that_answers(audited: Audited) -> None:
    rows = audited.audit.rows
    lost = {k: float(rows["good"].draws[k][0] - rows["mild"].draws[k][0]) for k in suite(world_assay()).rewards}
    assert max(lost, key=lost.__getitem__) in ("nucleus_count", "nucleus_size") and lost["nucleus_count"] > 0.5
    assert abs(lost["cytoplasm_count"]) < 1e-6 and abs(lost["cytoplasm_size"]) < 1e-6


def test_cheats_are_named_and_have_no_place(audited: Audited) -> None:
    assert "memorised" in kinds(audited, "memory") and "leaked" not in kinds(audited, "memory")
    assert "leaked" in kinds(audited, "thief") and "memorised" not in kinds(audited, "thief")
    assert {"collapsed", "too alike"} <= kinds(audited, "collapsed")
    assert kinds(audited, "copies") - {"better than real"} == {"copies controls"}
    for name in ("memory", "thief", "collapsed"):
        assert audited.audit.places[name].best is None
    for name in ("good", "mild", "severe"):
        assert not kinds(audited, name) & {"memorised", "leaked", "collapsed", "copies controls"}
    for name in ("near_copies", "duplicates", "leaked", "control_copies"):
        assert float(audited.audit.rows["good"].draws[name][0]) == 0.0


def test_a_collapsed_model_that_beats_real_images_is_warned_of(audited: Audited) -> None:
    """Copies of one image whose z are near zero: better than real by construction, and so said."""
    real, row = audited.audit.rows[REAL], audited.audit.rows["collapsed"]
    better = [k for k in suite(world_assay()).rewards if row.draws[k][0] > real.draws[k][0] + 0.5]
    said = {name for flag in audited.audit.flags["collapsed"] for name in flag.metrics}
    assert better and set(better) <= said


def test_anchors_are_zero_and_one(audited: Audited) -> None:
    found = audited.audit
    moa = next(m for m in found.metrics if m.name == "moa")
    for name, expected in ((REAL, 1.0), (CONTROL, 0.0)):
        score = found.anchored(found.rows[name], moa)
        assert score is not None and np.allclose(score, expected)
    good, copies = (found.anchored(found.rows[name], moa) for name in ("good", "copies"))
    assert good is not None and abs(good[0] - 1) < 0.1
    assert copies is not None and abs(copies[0]) < 0.1
    # Nuclei lie in cells of controls as often as in real ones: no scale.
    inside = next(m for m in found.metrics if m.name == "nucleus_in_cytoplasm")
    low, _ = interval(found.rows[REAL].draws[inside.name] - found.rows[CONTROL].draws[inside.name])
    assert (found.anchored(found.rows["good"], inside) is None) == (low <= 0)


def test_distances_and_neighbourhoods_see_what_the_rewards_do_not(audited: Audited) -> None:
    def value(name: str, metric: str) -> float:
        return float(audited.audit.rows[name].draws[metric][0])

    assert value("good", "frechet") < value("collapsed", "frechet") < value("copies", "frechet")
    assert value("copies", "kernel") > 10 * abs(value("good", "kernel"))
    assert value("collapsed", "coverage") < 0.2 < value("good", "coverage")
    assert value("collapsed", "diversity") < 0.05 and value("good", "diversity") == pytest.approx(1, abs=0.1)
    assert value("good", "train_distance") == pytest.approx(1, abs=0.1)


def test_all_rows_have_the_same_conditions_in_the_same_proportions(audited: Audited) -> None:
    conditions = audited.audit.conditions
    assert conditions.level == ("MoA", "Compound", "Dose") and len(conditions.names) == 3
    np.testing.assert_allclose(conditions.share, 1 / 3)
    assert {row.n_equal for row in audited.audit.rows.values()} == {120}


def test_tables_agree_with_the_audit(audited: Audited) -> None:
    frame = table(audited.audit)
    line = frame.query("row == 'mild' and metric == 'nucleus_count' and scope == 'all'").iloc[0]
    scores = audited.samples["mild"].scores
    assert line["value"] == pytest.approx(scores["Reward_nucleus_count"].mean(), rel=1e-5)
    assert line["ci_low"] < line["value"] < line["ci_high"] and line["n"] == 120
    classes = frame.query("row == 'mild' and metric == 'nucleus_count' and scope == 'class'")
    for _, one in classes.iterrows():
        own = scores["Metadata_MoA"] == one["group"]
        assert one["value"] == pytest.approx(scores.loc[own, "Reward_nucleus_count"].mean(), rel=1e-5)
    distances = frame.query("row == 'good' and metric == 'frechet' and scope == 'class'")
    assert set(distances["group"]) == {"DMSO", "small", "rare"} and distances["value"].notna().all()
    text = json.dumps(document(audited.audit, audited.about), allow_nan=False)
    assert json.loads(text)["rows"]["good"]["rank"] == [1, 1]


def test_a_second_run_takes_what_is_finished_and_gives_the_same_numbers(world: Path, tmp_path: Path) -> None:
    first = run(world, tmp_path / "finished", ("good", "mild"))
    reads: list[str] = []

    def told(what: str, done: int, total: int) -> None:
        reads.append(what)

    again = run(world, tmp_path / "finished", ("good", "mild"), progress=told)
    assert set(reads) == {"comparing"}  # no image was scored again
    pd.testing.assert_frame_equal(table(first.audit), table(again.audit))
    third = run(world, tmp_path / "finished", ("good", "mild", "severe"), progress=told)
    assert "severe" in reads and "good" not in reads
    assert third.audit.places["good"].best == 1
    other = replace(world_assay(), fingerprint="changed")
    renewed = run(world, tmp_path / "finished", ("good", "mild"), ours=other)
    assert any("other settings" in note for note in renewed.about["notes"]["good"])


def test_bad_files_and_unknown_labels_are_left_out_and_said(world: Path, tmp_path: Path) -> None:
    pictures = [draw(3000 + k, name) for k, name in enumerate(labels(60))]
    folder = write(tmp_path / "model", pictures, asked(60))
    (folder / "5.npy").write_bytes(b"no picture")
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
    index.loc[7, ["compound", "moa"]] = "nonsense"
    index.to_csv(folder / "index.csv", index=False)
    (tmp_path / "real").symlink_to(world / "real")
    found = run(tmp_path, tmp_path / "finished", ("model",))
    assert found.audit.rows["model"].n == 58
    assert np.isfinite(found.audit.rows["model"].draws["total"]).all()
    notes = " ".join(found.about["notes"]["model"])
    assert "1 of 60 files cannot be read" in notes and "nonsense" in notes


def test_models_without_labels_are_compared_as_a_whole(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "model", [draw(4000 + k, n) for k, n in enumerate(labels(60))], [{"well": "A01"}] * 60)
    (tmp_path / "real").symlink_to(world / "real")
    found = run(tmp_path, tmp_path / "finished", ("model",))
    assert found.audit.conditions.level == () and found.audit.rows["model"].n == 60
    row = found.audit.rows["model"]
    assert np.isnan(row.draws["moa"]).all() and np.isfinite(row.draws["frechet"]).all()
    assert np.isfinite(row.draws["nucleus_in_cytoplasm"]).all()
    assert "<html" in render(found, world_assay(), {})


def test_without_a_classifier_measures_are_the_features(world: Path, tmp_path: Path) -> None:
    plain = world_assay(classifier=False)
    found = run(world, tmp_path / "finished", ("good", "severe"), ours=plain)
    assert "measures of the crop" in found.about["features"]
    rows = found.audit.rows
    assert rows["good"].draws["frechet"][0] < rows["severe"].draws["frechet"][0]
    assert "moa_accuracy" not in rows["good"].draws and np.isnan(rows["good"].draws["moa"]).all()
    assert found.audit.places["good"].best == 1
    json.dumps(document(found.audit, found.about), allow_nan=False)


def test_the_page_says_what_was_found(audited: Audited) -> None:
    html = render(audited, world_assay(), {"command": "biorewards audit <x>"})
    for text in ("near-copies of reference images", "Not ranked", "cannot be told from real", "&lt;x&gt;", "<svg"):
        assert text in html
    assert "<script" not in html and "http://" not in html.replace("http://www.w3.org", "")
    assert html.count('class="strip"') == 8 * len(MODELS)


@pytest.mark.parametrize(("columns", "how"), [(("plate", "well"), "plate"), (("well",), "well"), ((), "image")])
def test_real_images_are_halved_by_the_coarsest_unit_that_can(
    columns: tuple[str, ...], how: str, tmp_path: Path
) -> None:
    units = {"plate": lambda k: str(k // 12), "well": lambda k: f"W{k // 6}"}
    names = ["dmso", "drug-a"] * 24
    rows = [{"moa": CLASS[name], **{c: units[c](k) for c in columns}} for k, name in enumerate(names)]
    folder = write(tmp_path / "real", [np.zeros((3, 8, 8))] * 48, rows)
    reference, held, said = split_real(read_manifest(folder), world_assay(), 0)
    assert said.startswith(f"halves by {how}") and not set(reference) & set(held)
    assert len(reference) + len(held) == 48 and abs(len(reference) - len(held)) <= 12
    if columns:
        unit = [row[columns[0]] for row in rows]
        assert not {unit[k] for k in reference} & {unit[k] for k in held}


def test_copies_of_controls_come_from_the_same_plate_and_never_stand_for_themselves(world: Path) -> None:
    real, assay = read_manifest(world / "real"), world_assay()
    controls = controls_of(real, assay)
    assert len(controls) == 120
    found = copy_controls(real, real, controls, assay, seed=0)
    plate = dict(zip(real.table["Metadata_File"], real.table["Metadata_Plate"], strict=True))
    assert found.table["Metadata_MoA"].tolist() == real.table["Metadata_MoA"].tolist()
    assert [plate[file] for file in found.table["Metadata_File"]] == real.table["Metadata_Plate"].tolist()
    assert all(a != b for a, b in zip(found.files, real.files, strict=True))
    used = found.table["Metadata_File"].value_counts()
    assert used.max() <= 5 and len(used) == 120  # taken in turn


def test_what_cannot_be_audited_is_an_error(world: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    index = pd.read_csv(world / "real" / "index.csv", dtype=str, keep_default_na=False)
    index = index[index["moa"] != "DMSO"]
    index.to_csv(tmp_path / "real" / "index.csv", index=False)
    for name in index["file"]:
        (tmp_path / "real" / name).symlink_to(world / "real" / name)
    (tmp_path / "good").symlink_to(world / "good")
    with pytest.raises(ManifestError, match="no control images"):
        run(tmp_path, tmp_path / "finished", ("good",))
    with pytest.raises(ValueError, match="cannot be called real"):
        run(world, tmp_path / "finished", ("real",))


def test_ranking_needs_intervals_and_leaves_cheats_out() -> None:
    rng = np.random.default_rng(0)
    gaps = {name: mean + 0.3 * rng.standard_normal(2001) for name, mean in (("a", 1), ("b", 1.1), ("c", 5), ("d", 0))}
    flags: dict[str, list] = {name: [] for name in "abc"} | {"d": [SimpleNamespace(kind="memorised")]}
    places, settled = rank(gaps, flags)
    assert (places["a"].best, places["a"].worst) == (places["b"].best, places["b"].worst) == (1, 2)
    assert (places["c"].best, places["c"].worst) == (3, 3) and places["d"].best is None
    assert set(settled) == {("a", "c"), ("b", "c")}


def test_macro_f1_equals_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(1)
    truth, said = rng.integers(3, size=400), rng.integers(3, size=400)
    said = np.where(rng.random(400) < 0.6, truth, said)
    votes = np.stack([[np.mean(said[truth == c] == k) for k in range(3)] for c in range(3)])[None]
    share = np.bincount(truth) / 400
    found = macro_f1(votes, np.array(["a", "b", "c"]), share, ["a", "b", "c"])
    assert found[0] == pytest.approx(f1_score(truth, said, average="macro"))


def test_features_cost_no_second_pass_and_change_no_score(world: Path) -> None:
    assay = world_assay()
    images = torch.stack([torch.from_numpy(draw(k, "drug-a")).float() for k in range(4)])
    calls = []

    class Counting(Seen):
        def embed(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return super().embed(images)

    counted = replace(assay, classifier=Counting())  # type: ignore[arg-type]
    batch = Batch(images, torch.ones(4, dtype=torch.int64), counted)
    kept = Encoder(counted)(batch)
    result = suite(counted)(batch)
    assert calls == [4] and kept.shape == (4, 16 + 3 + 3 * 64)
    alone = suite(assay)(Batch(images, torch.ones(4, dtype=torch.int64), assay))
    assert torch.equal(result.total, alone.total)


def test_equal_numbers_are_drawn_alike_for_all(audited: Audited, world: Path) -> None:
    reference = replace(audited.samples[REAL], name="reference", kind="reference")
    everything = audited.samples | {"reference": reference}
    conditions = match(everything, REAL)
    yard = Yardstick.build(world_assay(), suite(world_assay()), conditions, everything, reference, False, seed=0)
    assert (yard.equal("good") == yard.equal("mild")).all() and yard.each.tolist() == [40, 40, 40]


CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}


@pytest.mark.slow
def test_phantom_models_of_known_rank(tmp_path: Path) -> None:
    """Fresh phantoms, the same with stretched nuclei at two doses, copied controls, a memoriser, a collapsed model."""
    assay = bundled("phantom")
    write_dataset(tmp_path / "real", 1500, 96, 1)
    write_dataset(tmp_path / "good", 400, 96, 2)
    index = pd.read_csv(tmp_path / "good" / "index.csv", index_col=0, dtype=str)
    files = [sample_path(key) for key in index["SAMPLE_KEY"]]
    pixels = np.stack([np.load(tmp_path / "good" / file) for file in files])
    labels = [np.load((tmp_path / "good" / "masks" / file).with_suffix(".npz")) for file in files]
    masks = Masks(*(torch.from_numpy(np.stack([one[k] for one in labels])) for k in ("nuclei", "cells")))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255

    def model(name: str, made: np.ndarray) -> None:
        folder = tmp_path / name
        for file, crop in zip(files, made, strict=True):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / file, crop)
        index.to_csv(folder / "index.csv")
        (folder / "biorewards.json").write_bytes((tmp_path / "good" / "biorewards.json").read_bytes())

    def harmed(name: str, dose: float) -> np.ndarray:
        done = apply(name, images, masks, dose, channels=CHANNELS).images
        return (done.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)

    model("mild", harmed("erase_nuclei", 0.12))
    model("severe", harmed("erase_nuclei", 0.3))
    real = pd.read_csv(tmp_path / "real" / "index.csv", index_col=0, dtype=str)
    rng = np.random.default_rng(0)

    def picked(choose: Callable[[str], pd.Series]) -> np.ndarray:
        keys = [rng.choice(choose(name)) for name in index["ANNOT"]]
        return np.stack([np.load(tmp_path / "real" / sample_path(key)) for key in keys])

    held, trained = real[real["SPLIT"] == "test"], real[real["SPLIT"] == "train"]
    model("copies", picked(lambda name: held.loc[held["STATE"] == "control", "SAMPLE_KEY"]))
    model("memory", picked(lambda name: trained.loc[trained["ANNOT"] == name, "SAMPLE_KEY"]))
    best: dict[str, int] = {}
    judge = suite(assay)
    target = torch.tensor([assay.classes.index(name) for name in index["ANNOT"]])
    with torch.inference_mode():
        total = torch.cat([judge(Batch(i, t, assay)).total for i, t in
                           zip(images.split(50), target.split(50), strict=True)])  # fmt: skip
    for name in index["ANNOT"].unique():
        own = np.flatnonzero(index["ANNOT"] == name)
        best[name] = int(own[total[torch.from_numpy(own)].argmax()])
    model("collapsed", pixels[[best[name] for name in index["ANNOT"]]])

    found = run(
        tmp_path, tmp_path / "finished", ("good", "mild", "severe", "copies", "memory", "collapsed"), ours=assay
    )
    audit = found.audit
    gaps = {row.name: float(row.draws["gap"][0]) for row in audit.models}
    assert gaps["good"] < gaps["mild"] < gaps["severe"] and gaps["good"] < gaps["copies"]
    assert {("good", "severe"), ("good", "copies"), ("mild", "severe")} <= set(audit.better_than)
    lost = {k: float(audit.rows["good"].draws[k][0] - audit.rows["severe"].draws[k][0]) for k in judge.rewards}
    assert lost["nucleus_count"] > 3 * max(abs(lost["cytoplasm_count"]), abs(lost["cytoplasm_size"]))
    assert "memorised" in kinds(found, "memory") and "collapsed" in kinds(found, "collapsed")
    assert "copies controls" in kinds(found, "copies") and not kinds(found, "good") & {"memorised", "collapsed"}
    # By the mean of the rewards the collapsed model would win, also over real images.
    totals = {name: float(row.draws["total"][0]) for name, row in audit.rows.items()}
    assert max(totals, key=totals.__getitem__) == "collapsed" and audit.places["collapsed"].best is None
    assert "better than real" in kinds(found, "collapsed")
    for name in ("memory", "collapsed"):
        assert audit.places[name].best is None
