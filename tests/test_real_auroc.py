"""Verifiers on real crops: the statistic of benchmarks/real_auroc.py, and a small run of it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from bundled import bundled
from sklearn.metrics import roc_auc_score


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_module("benchmarks.real_auroc")


def test_auroc_is_scikit_learns_and_its_interval_holds_it(bench: ModuleType) -> None:
    rng = np.random.default_rng(0)
    real, harmed = rng.normal(1, 1, 90).round(1), rng.normal(0, 1, 90).round(1)  # with ties
    value, low, high = bench.auroc(real, harmed)
    truth = roc_auc_score(np.repeat([1, 0], 90), np.concatenate([real, harmed]))
    assert value == pytest.approx(truth) and low < value < high and high - low < 0.2
    assert bench.auroc(real, real.copy())[0] == 0.5


def test_every_lesion_that_a_verifier_owns_is_judged_at_six_doses(bench: ModuleType) -> None:
    assert {lesion.owner for lesion in bench.OWNED.values()} >= {
        "nucleus_in_cytoplasm", "nucleus_count", "nucleus_size", "cytoplasm_size", "nucleus_roundness",
    }  # fmt: skip
    assert all(len(lesion.doses) >= 6 for lesion in bench.OWNED.values())


def test_a_crop_is_judged_by_statistics_that_it_is_no_part_of(bench: ModuleType, shared: Path) -> None:
    bundled("bbbc021")
    images, labels, fold = bench.pairs96(shared / "data")
    chosen = np.flatnonzero(np.array(labels) == "DMSO")[:40]
    few, names, parts = images[torch.from_numpy(chosen)], ["DMSO"] * 40, np.repeat(["a", "b"], 20)
    assay = bench.assay_of(few, ["DMSO", "Microtubule destabilizers"])
    judge = bench.judges(assay, few, names, parts)
    own = bench.measure_images(assay, few, lambda *about: None)
    table = judge["a"].statistics.set_index(["measure", "class"])["mean"]
    assert table["nucleus_count", "DMSO"] == pytest.approx(own["nucleus_count"][20:].mean())
    assert len(fold) == len(images) > 100 and set(fold) == set("01234")


def test_bare_and_shrunken_nuclei_of_real_crops_are_told(
    bench: ModuleType, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the highest dose, 16 crops: what the full run says of hundreds."""
    bundled("bbbc021")
    monkeypatch.setattr(
        bench, "ASKED", [("erase_cytoplasm", "nucleus_in_cytoplasm"), ("shrink_nuclei", "nucleus_size")]
    )
    with torch.inference_mode():
        found = bench.judge_set("pairs96", shared / "data", 16, "assay")
    assert found["crops"] == 16 and found["statistics_from"] > 100
    for name, lesion in found["lesions"].items():
        top, first = lesion["doses"][-1], lesion["doses"][0]
        assert top["auroc"] > 0.75 and top["of_20"] > 0.9 and top["harmed"] > 0.75, (name, top)
        assert len(lesion["doses"]) == 6 and top["auroc"] > first["auroc"]
    assert set(bench.best({"pairs96": found})) == {"nucleus_in_cytoplasm", "nucleus_size"}
    assert bench.of_means(np.zeros(9), np.zeros(9)) == 0.5
