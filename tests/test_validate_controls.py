"""Positive controls of `validate`: each known fault fails its check, and the honest counterpart passes the same."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from exact import disc
from skimage.measure import perimeter
from validate_phantom import honest

from biorewards.batch import Batch
from biorewards.reward import Reason
from biorewards.rewards import ReferenceReward
from biorewards.segmentation.segmenter import Masks
from biorewards.validate import CHECKS, Finding
from biorewards.validate.controls import CONTROLS, PlainRoundness, ZeroOnFailure, plant
from biorewards.validate.second import halves


@lru_cache
def findings(check: str, control: str = "") -> tuple[Finding, ...]:
    bench = plant(control, honest()) if control else honest()
    return tuple(one for one in CHECKS[check](bench) if one.reward in ("", *(c.reward for c in CONTROLS.values())))


@pytest.mark.parametrize("name", CONTROLS)
def test_the_fault_fails_and_the_honest_verifier_passes(name: str) -> None:
    control = CONTROLS[name]
    bad = [one for one in findings(control.check, name) if one.reward == control.reward and one.passed is False]
    assert bad and all(one.reason for one in bad)
    good = [one for one in findings(control.check) if one.reward == control.reward and one.passed is not None]
    assert good and all(one.passed for one in good), [one.document() for one in good if not one.passed]


def test_roundness_reads_size_only_with_the_plain_perimeter() -> None:
    bad, good = (findings("shape_and_size", name)[0] for name in ("plain_roundness", ""))
    assert bad.value is not None and good.value is not None and bad.value > 2 * good.value
    assert bad.details["measure"][1] > bad.details["measure"][-1]  # small ones look rounder


def test_the_leaky_classifier_knows_its_training_images_by_heart() -> None:
    drop, *_, claim, _ = findings("splits", "leaky_split")
    assert drop.details["seen"] > 0.95 and drop.details["unseen"] < 0.8
    assert claim.passed is False and claim.details["claimed"] > 0.95 and claim.details["split"] == "random"


def test_the_shortcut_tells_plates_of_untreated_cells_apart() -> None:
    bad, good = (
        next(one for one in findings("plates", name) if one.reward == "moa" and one.value is not None)
        for name in ("batch_style", "")
    )
    assert bad.interval is not None and bad.interval[0] > 0.14 and good.value < 0.5 * bad.value
    assert bad.value > bad.details["treatment_share"]


def test_plain_perimeter_is_that_of_scikit_image() -> None:
    labels = np.zeros((1, 64, 64), int)
    disc(labels[0], 1, 30, 30, 14)
    bench = honest()
    batch = Batch(torch.rand(1, 3, 64, 64), torch.tensor([1]), bench.assay)
    batch.masks = Masks(torch.from_numpy(labels).int(), torch.from_numpy(labels).int())
    k = len(bench.assay.classes)
    score = PlainRoundness(np.full(k, 0.9), np.full(k, 0.1))(batch)
    form = 4 * np.pi * labels.sum() / perimeter(labels[0]) ** 2
    assert float(score.measure) == pytest.approx(form, rel=1e-5)
    assert float(score.value) == pytest.approx(-(((form - 0.9) / 0.1) ** 2), rel=1e-4)


def test_zero_on_failure_differs_only_where_nothing_was_found() -> None:
    bench = honest()
    images = torch.cat([bench.images([0, 1]), torch.zeros(1, 3, 96, 96)])
    batch = Batch(images, torch.tensor([1, -1, 1]), bench.assay)
    good, bad = ReferenceReward("nucleus_size")(batch), ZeroOnFailure(ReferenceReward("nucleus_size"))(batch)
    assert good.value[2] == -25 and bad.value[2] == 0 and bad.reason[2] == Reason.BLANK
    assert good.value[0] == bad.value[0] and good.value[1].isnan() and bad.value[1].isnan()


def test_halves_part_plates_and_keep_every_class() -> None:
    bench = honest()
    first, second = halves(bench)
    assert sorted([*first, *second]) == list(range(len(bench)))
    assert not set(bench.rows.plate.iloc[first]) & set(bench.rows.plate.iloc[second])
    assert set(bench.target[first]) == set(bench.target[second]) == set(bench.target)


def test_an_unknown_control_is_named() -> None:
    with pytest.raises(ValueError, match="no positive control 'x'; there are plain_roundness"):
        plant("x", honest())
