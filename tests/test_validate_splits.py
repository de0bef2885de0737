"""Checks of noise, plates, splits and redundancy, on values whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from validate_toys import Counting, bench, write_folder

from biorewards.rewards import MechanismOfAction, NucleusInCytoplasm, ReferenceReward
from biorewards.validate.bench import Bench
from biorewards.validate.statistics import rank_correlations
from biorewards.validate.variance import centred, explained

# The package binds the functions of these names.
noise_floor, plates, redundancy, splits = (
    import_module(f"biorewards.validate.{name}") for name in ("noise_floor", "plates", "redundancy", "splits")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("validate") / "real", 80)


def with_card(made: Bench, card: dict[str, Any]) -> Bench:
    return replace(made, assay=replace(made.assay, card=card), _known={}, _made={})


def test_explained_variance_is_zero_by_chance_and_one_between_constant_groups() -> None:
    rng = np.random.default_rng(0)
    group = np.arange(300) % 10
    assert np.mean([explained(rng.normal(size=(300, 3)), group) for _ in range(50)]) == pytest.approx(0, abs=0.01)
    assert explained(group[:, None].astype(float), group) == pytest.approx(1)
    # Groups with variance 1 about means with variance 1: half.
    means = rng.normal(size=200)
    many = np.repeat(np.arange(200), 20)
    assert explained(rng.normal(size=(4000, 1)) + means[many, None], many) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(explained(np.ones((5, 1)), np.zeros(5, int)))
    assert np.abs(centred(means[many, None], many)).max() < 1e-12


def test_noise_of_the_camera_is_measured() -> None:
    rng = np.random.default_rng(0)
    smooth = np.sin(np.arange(96) / 15)[None, None, None] * 0.2 + np.zeros((4, 2, 96, 1)) + 0.5
    for sd in (0.01, 0.03):
        noisy = torch.from_numpy(smooth + rng.normal(0, sd, smooth.shape))
        assert noise_floor.grain(noisy) == pytest.approx(sd, rel=0.05)
    assert noise_floor.grain(torch.zeros(1, 1, 32, 32)) == pytest.approx(1 / 255 / 12**0.5)


def test_noise_floor(folder: Path) -> None:
    rewards = {"moa": MechanismOfAction(), "nucleus_in_cytoplasm": NucleusInCytoplasm()}
    rewards |= {name: ReferenceReward(name) for name in ("nucleus_count", "nucleus_size")}
    made = bench(folder, rewards)
    found = noise_floor.noise_floor(made)
    moa = [one for one in found if one.reward == "moa"]
    assert [one.passed for one in moa] == [True, True] and moa[0].details["unit"] == "plate"
    size = next(one for one in found if one.reward == "nucleus_size")
    floor, n = size.details["floor"], size.details["n"]
    # Four times the images, half the floor; and the figure follows from the details.
    assert floor[n.index(50)] / floor[n.index(200)] == pytest.approx(2)
    if size.details["gap"] > 0:
        assert size.value == pytest.approx(floor[n.index(100)] / 1.96 / size.details["gap"], rel=0.02)
    # Counts do not differ between the two classes: right and wrong labels earn the same.
    assert next(one for one in found if one.reward == "nucleus_count").passed is False


def test_plates_without_plates_or_controls_are_not_judged(folder: Path) -> None:
    made = bench(folder, {"nucleus_count": Counting()})
    bare = replace(made, rows=made.rows.assign(plate=""), _known={}, _made={})
    found = plates.plates(bare)
    assert [one.passed for one in found] == [None] and "two plates" in found[0].reason


def test_a_lay_out_that_gives_the_treatment_away_is_found(folder: Path) -> None:
    made = bench(folder, {"moa": MechanismOfAction()})
    rng = np.random.default_rng(0)
    treated = made.target != 0
    # Treated cells lie on one plate only, controls on both.
    plate = np.where(treated, "a", np.where(np.arange(len(made)) % 4 < 2, "a", "b"))
    confounded = replace(made, rows=made.rows.assign(plate=plate))
    rows = confounded.controls
    here = (plate[rows] == "a").astype(float)
    for leak, passed in ((0.0, True), (0.5, False)):
        values = rng.normal(0, 0.1, (len(rows), len(made.assay.classes))) + leak * here[:, None]
        (found,) = plates._lay_out(confounded, rows, {"moa": values})
        assert found.passed is passed, found
    (open_,) = plates._lay_out(made, made.controls, {"moa": values})
    assert open_.passed is None and "not confounded" in open_.reason


@pytest.mark.parametrize(
    ("value", "low", "share", "passed"),
    [(0.01, -0.02, 0.5, True), (0.5, 0.3, 0.9, False), (0.2, 0.05, 0.9, None), (0.1, 0.06, 0.02, False)],
)
def test_plates_fail_beyond_the_interval_only(value: float, low: float, share: float, passed: bool | None) -> None:
    said, reason = plates._verdict(value, low, share, 40)
    assert said is passed and bool(reason) is (passed is not True)


def test_splits_of_an_honest_classifier(folder: Path) -> None:
    figure = {"balanced_accuracy": 0.98, "interval_95": [0.95, 1.0], "n": 50}
    card = {"plates": {"train": ["p0"]}, "classifier": {
        "random": figure, "plate": figure, "compound": figure | {"balanced_accuracy": 0.7},
        "shipped_on_held_out_plates": figure,
    }}  # fmt: skip
    rewards = {"moa": MechanismOfAction(), "nucleus_count": ReferenceReward("nucleus_count")}
    drop, plate, compound, both, claim, lead = splits.splits(with_card(bench(folder, rewards), card))
    assert drop.passed and drop.details["n_seen"] == drop.details["n_unseen"] == 40 and drop.value == 0
    assert plate.passed and compound.passed is False and both.passed is None
    assert claim.passed and claim.details["only_unseen_plates"]
    assert lead.passed and lead.details["classifier"]["balanced_accuracy"] == 1


def test_a_card_that_claims_too_much_fails(folder: Path) -> None:
    made = bench(folder, {"moa": MechanismOfAction()})
    wrong = replace(made, target=1 - made.target)  # the classifier is always wrong now
    card = {"classifier": {"plate": {"balanced_accuracy": 0.9, "interval_95": [0.8, 1.0], "n": 9}}}
    found = splits.splits(with_card(wrong, card))
    claim = next(one for one in found if "claims" in one.what)
    assert claim.passed is False and claim.details["measured"] == pytest.approx(0) and claim.details["split"] == "plate"
    assert found[0].passed is None and "does not say which plates" in found[0].reason


def test_splits_without_a_classifier_say_so(folder: Path) -> None:
    made = bench(folder, {"moa": MechanismOfAction()})
    bare = replace(made, assay=replace(made.assay, classifier=None), _known={}, _made={})
    (found,) = splits.splits(bare)
    assert found.passed is None and "no MoA classifier" in found.reason
    (other,) = splits.splits(bench(folder, {"nucleus_count": Counting()}))
    assert other.passed is None


class Twin(Counting):
    """Nucleus count once more, under another name."""

    name = "twin"

    def __repr__(self) -> str:
        return "Twin()"


def real_only(found: list[Any]) -> list[Any]:
    return [one for one in found if one.details["sample"] == "real images"]


def test_two_rewards_that_ask_one_question_are_found(folder: Path) -> None:
    one = ReferenceReward("nucleus_count")
    share, pair = real_only(redundancy.redundancy(bench(folder, {"nucleus_count": one, "twin": Twin()})))
    assert pair.passed is False and pair.value == pytest.approx(1) and pair.details["closest"] == [
        "nucleus_count", "twin"
    ]  # fmt: skip
    assert share.details["effective_number"] == pytest.approx(1) and share.value == pytest.approx(0.5)
    other = {"nucleus_count": one, "nucleus_size": ReferenceReward("nucleus_size")}
    share, pair = real_only(redundancy.redundancy(bench(folder, other)))
    assert share.passed and pair.passed and share.details["effective_number"] > 1.4


def test_effective_number() -> None:
    assert redundancy.participation(np.eye(5)) == pytest.approx(5)
    assert redundancy.participation(np.ones((5, 5))) == pytest.approx(1)
    values = np.random.default_rng(0).normal(size=(200, 2))
    found = rank_correlations(np.c_[values, np.exp(values[:, :1]), np.zeros(200)])
    assert found[0, 2] == pytest.approx(1) and found[0, 3] == 0 and found[3, 3] == 1
