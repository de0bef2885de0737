"""Independent opinions: what they are trained on, what they find, and that they agree where they must."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundled import bundled

from biorewards.assay import Assay
from biorewards.audit import Audited, audit_folders, opinion_classifier, opinion_profiles
from biorewards.audit.models import Place
from biorewards.audit.opinion import Change, NoOpinion, held_against
from biorewards.audit.opinion_classifier import learnt, training_rows
from biorewards.audit.opinion_profiles import MISSING, Space, available, profile, retrieval
from biorewards.audit.page import render
from biorewards.audit.wording import quantity, sentences
from biorewards.io.manifest import Manifest, read_manifest
from biorewards.io.reading import plan_reading
from biorewards.phantom import write_dataset
from biorewards.rewards import suite

needs_profiles = pytest.mark.skipif(not available(), reason="cp-measure and copairs are not installed")


def draws(mean: float, seed: int) -> np.ndarray:
    return mean + np.concatenate([[0.0], 0.05 * np.random.default_rng(seed).standard_normal(400)])


def test_an_order_that_turns_round_is_found() -> None:
    """a is nearer to real by the first, b by the second; c is far in both, d is not ranked."""
    first = {"real": 1.0, "a": 0.9, "b": 0.4, "c": -2.0, "d": 1.0}
    second = {"real": 0.5, "a": 0.9, "b": 0.5, "c": -3.0, "d": 0.5}
    rows = {
        k: type("Row", (), {"draws": {"map": draws(v, 1), "gap": draws(abs(v - 1.0), 2)}})() for k, v in first.items()
    }
    flags: dict[str, list] = {k: [] for k in "abc"} | {"d": [type("Flag", (), {"kind": "memorised"})()]}
    audit = type("Audit", (), {"rows": rows, "flags": flags})()
    own = {k: {"map": draws(v, 3 + i)} for i, (k, v) in enumerate(second.items())}
    opinion = held_against("other", ["about"], dict.fromkeys(own, 10), own, audit, [("map", "map"), ("map", "gap")])
    assert opinion.places["b"] == Place(1, 1) and opinion.places["c"] == Place(3, 3)
    assert opinion.places["d"] == Place(None, None)
    assert {(c.against, c.a, c.b) for c in opinion.changes if c.reversed} == {("map", "a", "b"), ("gap", "a", "b")}
    assert quantity(opinion.changes[0]) == "mean average precision"
    assert quantity(opinion.changes[-1]) == "mean average precision (against gap to real)"
    text = json.loads(json.dumps(opinion.document(), allow_nan=False))
    assert text["rows"]["b"]["rank"] == [1, 1] and text["changes"][0]["reversed"] is True
    assert not Change("gap", "gap", "a", "b", 1, 0).reversed


def manifest_of(folder: Path, plates: list[str], classes: list[str]) -> Manifest:
    folder.mkdir()
    rows = [{"file": f"{k}.npy", "moa": c, "plate": p} for k, (c, p) in enumerate(zip(classes, plates, strict=True))]
    for k in range(len(rows)):
        np.save(folder / f"{k}.npy", np.full((3, 8, 8), k % 250, np.uint8))
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return read_manifest(folder)


def test_the_second_classifier_is_trained_on_other_plates_where_there_are_any(tmp_path: Path) -> None:
    assay = replace(bundled("phantom"), classes=["DMSO", "x"], compounds={}, card={"plates": {"train": ["P0"]}})
    plates = [f"P{k % 4}" for k in range(200)]
    real = manifest_of(tmp_path / "real", plates, [("DMSO", "x")[(k // 4) % 2] for k in range(200)])
    plate = np.array(plates)
    held, reference = np.flatnonzero(plate == "P3"), np.flatnonzero(plate == "P0")
    rows, which = training_rows(real, assay, reference, held)
    # P1 and P2 are neither held out nor the assay's own, though they are no part of the reference.
    assert set(plate[rows]) == {"P1", "P2"} and which.startswith("2 plates, none of them")
    known = replace(assay, card={"plates": {"train": ["P0", "P1", "P2"]}})
    rows, which = training_rows(real, known, reference, held)
    assert set(plate[rows]) == {"P0"} and "none of them of the held-out images" in which and "by name" in which
    unknown = replace(assay, card={})
    rows, which = training_rows(real, unknown, np.flatnonzero(plate != "P0"), held)
    assert "which the held-out images share" in which and "may be" in which


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opinion") / "real"
    write_dataset(folder, 300, 48, 1)
    return folder


def test_the_second_classifier_is_kept_and_trained_again_for_other_images(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opinion_classifier, "FEWEST", 256)
    monkeypatch.setattr(opinion_classifier, "TIMES", 1)
    monkeypatch.setattr(opinion_classifier, "LEAST", 10)
    assay, found = bundled("phantom"), read_manifest(real)
    told: list[tuple[int, int]] = []

    def plan(manifest: Manifest):  # type: ignore[no-untyped-def]
        return plan_reading(manifest, assay)

    def tell(what: str, done: int, total: int) -> None:
        assert what == "training a second classifier"
        told.append((done, total))

    first = learnt(found, assay, plan, tmp_path / "kept", tell)
    assert told[-1][0] == told[-1][1] and first.settings["backbone"] != assay.classifier.settings["backbone"]  # type: ignore[union-attr]
    told.clear()
    again = learnt(found, assay, plan, tmp_path / "kept", tell)
    assert not told and again.fingerprint == first.fingerprint
    learnt(found, replace(assay, fingerprint="other"), plan, tmp_path / "kept", tell)
    assert told
    monkeypatch.setattr(opinion_classifier, "LEAST", 10_000)
    with pytest.raises(NoOpinion, match="two classes or more"):
        learnt(found, assay, plan, tmp_path / "none", tell)


def test_features_are_standardised_by_controls_and_limited() -> None:
    rng = np.random.default_rng(0)
    library = pd.DataFrame({"a": rng.normal(5, 2, 200), "b": np.ones(200), "c": rng.random(200)})
    library.loc[:60, "c"] = np.nan  # missing too often
    controls = np.arange(200) < 100
    space = Space.of(library, controls)
    assert space.columns == ["a"] and space.by_controls
    scaled = space(pd.DataFrame({"a": [5.0, 7.0, 1e9, np.nan]}))
    assert abs(scaled[0, 0]) < 0.3 and scaled[1, 0] == pytest.approx(1, abs=0.4) and scaled[2, 0] == 10
    assert np.isnan(scaled[3, 0])
    assert not Space.of(library, np.arange(200) < 5).by_controls


@needs_profiles
def test_retrieval_takes_pairs_of_other_plates_only() -> None:
    """Profiles that show the plate, not the class, retrieve nothing; those that show the class everything."""
    rng = np.random.default_rng(1)
    among = pd.DataFrame({"moa": np.repeat(["x", "y"], 40), "plate": np.tile(["P1", "P2"], 40)})
    queries = pd.DataFrame({"moa": ["x", "y"] * 15, "plate": ["P1"] * 30})
    by_class = {"x": [1.0, 0.2, 0.0], "y": [0.0, 0.2, 1.0]}
    noise = 0.05 * rng.standard_normal((200, 3))
    library = np.array([by_class[c] for c in among["moa"]]) + noise[:80]
    asks = np.array([by_class[c] for c in queries["moa"]]) + noise[80:110]
    precision, hit, of = retrieval(queries, asks, among, library)
    assert precision.min() == pytest.approx(1) and (hit, of) == (2, 2)
    by_plate = {"P1": [1.0, 0, 0], "P2": [0.0, 1, 0]}
    library = np.array([by_plate[p] for p in among["plate"]]) + noise[:80]
    asks = np.array([by_plate[p] for p in queries["plate"]]) + noise[80:110]
    precision, hit, _ = retrieval(queries, asks, among, library)
    assert 0.4 < precision.mean() < 0.65 and hit == 0
    with pytest.raises(NoOpinion, match="other plates"):
        retrieval(queries, asks, among.assign(plate="P1"), library)
    asks[3] = np.nan
    precision, _, _ = retrieval(queries, asks, among, library)
    assert precision[3] == 0 and len(precision) == 30


@needs_profiles
def test_a_profile_is_cellprofilers_and_empty_for_an_empty_image() -> None:
    from biorewards.phantom import render_dataset
    from biorewards.segmentation import load_segmenter

    assay = bundled("phantom").with_segmenter(load_segmenter("classical"))
    crop = render_dataset(1, 96, 3).images[0].transpose(2, 0, 1).astype(np.float32) / 255
    found = profile(crop, assay)
    masks = assay.segment(torch.from_numpy(crop)[None])
    areas = np.bincount(masks.nuclei[0].numpy().ravel())[1:]
    assert found["Nuclei_Area"] == pytest.approx(np.median(areas[areas > 0]))
    assert found["Image_Count_Nuclei"] == (areas > 0).sum()
    assert any("Texture" in name or "Contrast" in name for name in found)
    assert np.isnan(list(profile(np.zeros_like(crop), assay).values())).all()


def audited(root: Path, real: Path, assay: Assay) -> Audited:
    for name, seed in (("good", 2), ("other", 3)):
        if not (root / name).exists():
            write_dataset(root / name, 80, 48, seed)
    return audit_folders(
        assay, suite(assay), read_manifest(real), {name: read_manifest(root / name) for name in ("good", "other")},
        folder=root / "finished", plan=lambda manifest: plan_reading(manifest, assay), ask_second=True,
    )  # fmt: skip


@pytest.mark.slow
def test_three_opinions_end_to_end(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opinion_classifier, "LEAST", 10)
    monkeypatch.setattr(opinion_classifier, "FEWEST", 2_000)
    monkeypatch.setattr(opinion_profiles, "ASKED", 30)
    monkeypatch.setattr(opinion_profiles, "LIBRARY", 60)
    assay = bundled("phantom")
    found = audited(tmp_path, real, assay)
    names = [opinion.name for opinion in found.opinions]
    assert names[:2] == ["classical segmenter", "second classifier"]
    assert names[2:] == (["CellProfiler features"] if available() else [])
    assert found.about["notes"].get("second opinion") == (None if available() else [MISSING])
    second = found.opinions[1]
    assert "by name" in second.about[0] and set(second.draws) == {"real", "copy-control", "good", "other"}
    assert second.draws["real"]["gap"][0] == 0 and np.isfinite(second.draws["good"]["moa"]).all()
    # Both models are fresh drawings: no judge may settle an order that another turns round.
    assert not any(change.reversed for opinion in found.opinions for change in opinion.changes)
    html = render(found, assay, {})
    for opinion in found.opinions:
        assert f"<h3>{opinion.name}</h3>" in html
    assert sum("Second opinion (" in text for _, text in sentences(found.audit, found.opinions)) == len(names)
    again = audited(tmp_path, real, assay)
    for a, b in zip(found.opinions, again.opinions, strict=True):
        assert a.document() == b.document()


def test_missing_packages_are_named() -> None:
    assert available() == all(importlib.util.find_spec(name) for name in ("cp_measure", "copairs"))
    assert "biorewards[profiles]" in MISSING
