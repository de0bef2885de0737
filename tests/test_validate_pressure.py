"""Checks of selection and search: hacking is seen where there is some, and only there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from bundled import bundled
from validate_phantom import honest, manifest

from biorewards.batch import Batch
from biorewards.reward import Score
from biorewards.rewards import MechanismOfAction, ReferenceReward
from biorewards.validate import Bench
from biorewards.validate.controls import plant
from biorewards.validate.labels import under_every_label
from biorewards.validate.pools import CANDIDATES, SHARES, candidates
from biorewards.validate.second import second_judge

# The package binds the functions of these names.
attack, pressure = (import_module(f"biorewards.validate.{name}") for name in ("attack", "pressure"))


def judged(hack: float) -> list[object]:
    """Findings on pools in which the judge that selects can be deceived: of 96 images 5 look `hack` better than any."""
    rng = np.random.default_rng(3)
    true = rng.normal(size=(10, 96))
    other = true + 0.3 * rng.normal(size=true.shape)
    first = true.copy()
    if hack:
        first[:, :5], other[:, :5] = hack + 0.1 * rng.normal(size=(10, 5)), -2
    goal = np.repeat(np.arange(10), 96)
    draws = pressure.curves(first.ravel(), other.ravel(), goal, list(pressure.SIZES), 0, resamples=60)
    return pressure._judge("x", "x", "gain", draws, list(pressure.SIZES), 960, 10, ["x"])


def test_selection_by_an_honest_judge_pleases_the_second() -> None:
    gain, fall = judged(0)
    assert gain.passed and fall.passed and gain.details["hacking_starts_at"] is None
    # E max of 1, 2, 4 standard normals; the second judge sees the same up to its own noise.
    assert gain.details["selecting"][:3] == pytest.approx([0, 0.564, 1.029], abs=0.15)
    assert gain.value == pytest.approx(gain.details["claimed_gain"], abs=0.3)


def test_hacking_is_found_and_its_n_named() -> None:
    gain, fall = judged(4)
    assert fall.passed is False and gain.details["hacking_starts_at"] in (4, 8, 16, 32)
    assert f"N = {gain.details['hacking_starts_at']}" in fall.reason
    assert gain.details["selecting"] == sorted(gain.details["selecting"])
    assert gain.details["best_n"] < gain.details["hacking_starts_at"]


def test_values_that_are_missing_are_never_kept() -> None:
    first, other = np.array([1.0, 2.0, np.nan, 5.0]), np.array([1.0, 2.0, 9.0, np.nan])
    draws = pressure.curves(first, other, np.zeros(4, int), [1, 4], 0, resamples=2)
    assert draws[0].tolist() == [[1.5, 1.5], [2.0, 2.0]]


def test_the_pool_holds_every_kind_for_every_goal() -> None:
    pool = candidates(honest())
    goals, counts = np.unique(pool.goal, return_counts=True)
    assert set(counts) == {CANDIDATES} and 0 not in goals and len(goals) == 2
    assert {kind for kind, goal in zip(pool.kind, pool.goal, strict=True) if goal == goals[0]} == set(SHARES)
    assert pool.images.min() >= 0 and pool.images.max() <= 1
    again = candidates(Bench.build(bundled("phantom"), manifest(), n=8))
    assert torch.equal(pool.images, again.images)  # by the seed alone


def test_pressure_on_the_bundled_verifiers() -> None:
    found = {one.reward: one for one in pressure.pressure(honest()) if "claimed_gain" in one.details}
    assert set(found) == {*honest().suite.rewards, None}
    whole = found[None]
    assert whole.value is not None and whole.value > 0.5
    assert whole.details["n"] == [1, 2, 4, 8, 16, 32, 64]
    assert whole.details["selecting"] == sorted(whole.details["selecting"])


def test_values_under_every_label_are_those_of_the_label() -> None:
    bench = honest()
    images = bench.images([0, 5, 9])
    every = under_every_label(bench, images)
    for label in (0, 4):
        one = bench.score(images, label).value
        for name in bench.suite.rewards:
            assert np.allclose(every[name][:, label], one[name], atol=1e-5, equal_nan=True)


def test_the_second_judges_share_nothing_with_the_first() -> None:
    second = second_judge(honest())
    assert second.assay.segmenter_name == "classical" and second.assay.fingerprint != honest().assay.fingerprint
    assert second.assay.statistics["mean"].tolist() != honest().assay.statistics["mean"].tolist()
    own = second.real().value["moa"]
    assert own.between(0, 1).all() and own.mean() > 3 / len(second.assay.classes)
    assert second_judge(honest()) is second


class Paid(ReferenceReward):
    """Fault: under the name of a size it pays for the mean of a channel, which no cell has to change for."""

    def __call__(self, batch: Batch) -> Score:
        score = super().__call__(batch)
        return Score(200 * batch.images[:, 0].mean((1, 2)), score.measure, score.reason * 0)

    def __repr__(self) -> str:
        return "Paid()"


@pytest.mark.parametrize(("make", "passes"), [(ReferenceReward, True), (Paid, False)])
def test_a_search_finds_what_can_be_raised_without_biology(
    make: Callable[[str], ReferenceReward], passes: bool
) -> None:
    bench = Bench.build(bundled("phantom"), manifest(), {"nucleus_size": make("nucleus_size")}, n=8, pool=80)
    worse, unseen = attack.attack(bench)
    assert (unseen.passed is not False) is passes and worse.n == 8
    assert worse.details["attacked"] == sorted(worse.details["attacked"]) and worse.details["steps"][-1] == 40


def test_what_has_no_second_judge_is_not_judged() -> None:
    class Own(MechanismOfAction):
        name = "own"

    bench = Bench.build(bundled("phantom"), manifest(), {"own": Own()}, n=8, pool=39)
    assert [(one.reward, one.passed) for one in attack.attack(bench)] == [("own", None)]


@pytest.mark.slow
def test_a_reward_that_pays_failure_is_hacked_at_once() -> None:
    bad = plant("zero_on_failure", honest())
    gain, fall = (one for one in pressure.pressure(bad) if one.reward == "nucleus_size")
    assert gain.passed is False and fall.passed is False and gain.details["hacking_starts_at"] in (2, 4, 8)
    assert gain.details["selecting"] == sorted(gain.details["selecting"])
