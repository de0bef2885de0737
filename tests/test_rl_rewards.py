"""Advantages, the population reward, sentinels, resampling: against figures that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from biorewards import Assay, suite
from biorewards.io.images import resize
from biorewards.resample import resample
from rl.distribution import NOTHING, Population, energy_distance, witness
from rl.pool import Real
from rl.rewards import Judge, Judged, advantages, matched
from rl.sentinels import Yardstick, class_entropy, diversity, pixel_features
from tests.rl_toys import Near, assay, data, judge

ONE = torch.ones(1)


def column(*rows: list[float]) -> Tensor:
    """Groups of a single reward: (G, K, 1)."""
    return torch.tensor(rows)[..., None]


def test_advantage_is_the_z_score_of_the_group() -> None:
    found = advantages(column([1.0, 2, 3, 4], [10.0, 10, 10, 30]), ONE)
    for k, row in enumerate([[1.0, 2, 3, 4], [10.0, 10, 10, 30]]):
        z = (np.array(row) - np.mean(row)) / (np.std(row) + 1e-4)
        assert np.allclose(found.advantage[k].numpy(), z, atol=1e-6)
        assert np.allclose(found.r[k].numpy(), z / 10 + 0.5, atol=1e-6)
    assert found.useful.all() and found.valid.all()


def test_outlier_is_clipped_and_r_stays_in_its_range() -> None:
    found = advantages(column([0.0] * 60 + [1e6]), ONE)
    assert found.advantage[0, -1] > 7 and found.r[0, -1] == 1.0
    assert advantages(column([0.0, 1.0]), ONE, limit=0.5).r.tolist() == [[0.0, 1.0]]


def test_neutral_groups_know_nothing() -> None:
    found = advantages(column([5.0, 5, 5], [1.0, 2, 3]), ONE)
    assert found.useful.tolist() == [False, True]
    assert found.r[0].tolist() == [0.5] * 3 and not found.counts[0].any()


def test_rollouts_without_a_score_are_left_out_of_their_group() -> None:
    nan = math.nan
    found = advantages(column([1.0, 2, 3, nan], [nan, nan, nan, 1.0]), ONE)
    alone = advantages(column([1.0, 2, 3]), ONE)
    assert torch.allclose(found.r[0, :3], alone.r[0]) and found.r[0, 3] == 0.5
    assert found.counts.tolist() == [[True, True, True, False], [False] * 4]
    assert torch.isfinite(found.advantage).all()
    # A part with weight 0 may be missing.
    both = torch.stack([column([1.0, 2, 3])[..., 0], torch.full((1, 3), nan)], 2)
    assert torch.allclose(advantages(both, torch.tensor([2.0, 0.0])).r, alone.r, atol=1e-4)
    assert not advantages(both, torch.tensor([2.0, 1.0])).valid.any()


def test_per_reward_advantage_gives_a_reward_of_small_spread_its_weight() -> None:
    """A probability that moves by hundredths beside a -z^2 that moves by tens."""
    g = torch.Generator().manual_seed(0)
    moa, size = 0.01 * torch.randn(200, 12, generator=g), 10 * torch.randn(200, 12, generator=g)
    value, weights = torch.stack([moa, size], 2), torch.tensor([5.0, 1.0])

    def agreement(mode: str, reward: Tensor) -> float:
        a = advantages(value, weights, mode).advantage
        return float(torch.corrcoef(torch.stack([a.flatten(), reward.flatten()]))[0, 1])

    assert abs(agreement("total", moa)) < 0.1 < agreement("total", size)
    assert agreement("per-reward", moa) > 0.9 > agreement("per-reward", size) > 0.1
    variance = advantages(value, weights).variance.mean(0)
    assert variance[1] / variance.sum() > 0.99
    with pytest.raises(ValueError, match="total, per-reward"):
        advantages(value, weights, "mean")


# ---- a population instead of a point -----------------------------------------------------------------------------


def normal(n: int, mean: float = 0.0, sd: float = 1.0, seed: int = 0) -> Tensor:
    return mean + sd * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))


def squared(x: Tensor) -> Tensor:
    """What the paper's reward says of standardised measures."""
    return -x.square()


def test_real_images_are_optimal_and_a_collapsed_set_is_not() -> None:
    real, same = normal(4000), normal(3000, seed=1)
    sets = {"real": same, "collapsed": normal(3000, sd=0.05, seed=2), "wide": normal(3000, sd=2.0, seed=3),
            "shifted": normal(3000, mean=0.5, seed=4)}  # fmt: skip
    distance = {name: float(energy_distance(x, real)) for name, x in sets.items()}
    assert abs(distance["real"]) < 0.005 and min(v for k, v in distance.items() if k != "real") > 0.05
    # The reward of the paper prefers the collapsed set to the real one.
    assert squared(sets["collapsed"]).mean() > -0.01 > -0.9 > squared(same).mean()


def test_credit_is_flat_on_real_images_and_leads_back_to_them_from_elsewhere() -> None:
    real = normal(4000)
    everyone = torch.ones(1500, dtype=torch.bool)
    x = normal(1500, seed=1)
    assert witness(x, everyone, real).abs().max() < 0.12
    narrow = normal(1500, sd=0.1, seed=2)
    credit = witness(narrow, everyone, real)
    outer, inner = narrow.abs()[:, 0] > 0.2, narrow.abs()[:, 0] < 0.05
    assert credit[outer].mean() > credit[inner].mean() + 0.05, "a collapsed set is paid for leaving its middle"
    wide = normal(1500, sd=3.0, seed=3)
    assert torch.corrcoef(torch.stack([witness(wide, everyone, real)[:, 0], -wide.abs()[:, 0]]))[0, 1] > 0.9
    shifted = normal(1500, mean=2.0, seed=4)
    assert torch.corrcoef(torch.stack([witness(shifted, everyone, real)[:, 0], -shifted[:, 0]]))[0, 1] > 0.9


def test_credit_by_definition_leaves_the_image_itself_out() -> None:
    x, y = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    found = witness(x, torch.ones(3, dtype=torch.bool), y)[:, 0].tolist()
    assert found == pytest.approx([(1 + 4) / 2 - 1, (1 + 3) / 2 - 1, (4 + 3) / 2 - 3])
    # An image of nothing gets the worst there is, and vouches for nobody.
    missing = witness(torch.cat([x, torch.full((1, 1), math.nan)]), torch.tensor([True, True, True, False]), y)
    assert missing[:3, 0].tolist() == pytest.approx(found) and missing[3, 0] == NOTHING
    assert witness(torch.full((2, 1), 5.0), torch.ones(2, dtype=torch.bool), torch.full((2, 1), -5.0)).min() > NOTHING


def judged(measure: Tensor) -> Judged:
    return Judged(
        squared(measure), measure, torch.zeros(measure.shape, dtype=torch.uint8), torch.zeros(len(measure), 0)
    )


def test_credits_go_by_class_and_standard_deviation() -> None:
    measure = torch.cat([normal(30, 100, 10), normal(30, 5, 0.5, seed=1)])
    target = torch.tensor([1] * 30 + [2] * 30)
    found = Population.from_real(["nucleus_size"], judged(measure), target, ["DMSO", "a", "b"])
    shifted = torch.cat([measure[:30] + 10, measure[30:] + 0.5])
    credit = found.credit(squared(shifted), shifted, torch.zeros(60, dtype=torch.bool), target)
    order = torch.argsort(shifted[:30, 0])
    assert torch.corrcoef(torch.stack([credit[:30][order][:, 0], torch.arange(30.0)]))[0, 1] < -0.5
    # One deviation is one deviation, whatever the unit.
    assert credit[:30].mean() == pytest.approx(float(credit[30:].mean()), abs=0.15)
    with pytest.raises(ValueError, match=r"'b' has 9 real images"):
        Population.from_real(["nucleus_size"], judged(measure[:39]), target[:39], ["DMSO", "a", "b"])


def test_population_of_an_assay_has_its_moments_and_keeps_what_it_does_not_know() -> None:
    phantom = Assay.load("phantom")
    names = ["moa", "nucleus_size", "nucleus_count"]
    found = Population.from_assay(names, phantom)
    assert len(found.samples) == len(phantom.classes) - 1
    table = phantom.statistics.set_index(["class", "measure"])
    for k in (1, 5, 12):
        row = table.loc[(phantom.classes[k], "nucleus_size")]
        assert float(found.mean[k][1]) == pytest.approx(row["mean"], rel=0.03)
        assert float(found.sd[k][1]) == pytest.approx(row["sd"], rel=0.12)
    value, measure = torch.rand(4, 3), torch.tensor([[0.5, 100.0, 5]] * 4)
    credit = found.credit(value, measure, torch.zeros(4, dtype=torch.bool), torch.tensor([1, 1, 2, 2]))
    assert torch.equal(credit[:, 0], value[:, 0]) and not torch.equal(credit[:, 1], value[:, 1])


# ---- judges and sentinels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 1.5, 0.5, 1.0])
def test_resampling_a_batch_is_resampling_files(scale: float) -> None:
    images = torch.rand(3, 2, 24, 30, generator=torch.Generator().manual_seed(0))
    found = resample(images, scale)
    assert found.shape == (3, 2, round(24 * scale), round(30 * scale))
    for one, image in zip(found, images, strict=True):
        assert np.abs(one.numpy() - resize(image.numpy(), scale)).max() < 2e-6


def test_judge_scores_at_the_pixel_size_of_the_assay() -> None:
    phantom = Assay.load("phantom")
    with pytest.raises(ValueError, match=r"48 x 48 px, 48 x 48 .* wants 96 x 96"):
        Judge(suite(phantom), phantom)(torch.zeros(1, 3, 48, 48), torch.tensor([1]))
    one = Judge(suite(phantom), phantom, scale=2.0)
    assert one.fingerprint != Judge(suite(phantom), phantom).fingerprint
    found = one(torch.zeros(2, 3, 48, 48), torch.tensor([1, 2]))
    assert found.value.shape == (2, 7) and found.nothing.all()
    assert one.total(found.value).tolist() == [-125.0, -125.0]


def test_any_reward_or_list_of_them_makes_a_judge() -> None:
    both = Judge([Near(), Other()], assay())
    found = both(torch.full((2, 1, 4, 4), 0.7), torch.tensor([1, 2]))
    assert both.names == ["near", "other"] and found.value.shape == (2, 2)
    assert both.total(found.value).tolist() == pytest.approx([-1.0, -1.0])


class Other(Near):
    name = "other"

    def __call__(self, batch: Any) -> Any:
        score = super().__call__(batch)
        return type(score)(score.value - 1, score.measure, score.reason)


def test_statistics_can_be_measured_at_the_generator_s_pixel_size() -> None:
    from biorewards.phantom import render_dataset

    phantom = Assay.load("phantom")
    crops = render_dataset(60, size=48, seed=5)
    images = torch.from_numpy(crops.images).permute(0, 3, 1, 2).float() / 255
    target = torch.tensor([phantom.classes.index(name) for name in crops.rows["ANNOT"]])
    target = torch.where(target > 6, 1, 0)  # enough of one class; what it is does not matter here
    changed, short = matched(phantom, Real(images[target == 1], target[target == 1]), 2.0)
    assert changed.fingerprint != phantom.fingerprint and len(short) == 11 and "actin_collapse" not in short
    ours, theirs = (a.statistics.set_index(["class", "measure"]) for a in (changed, phantom))
    pd.testing.assert_series_equal(
        ours.loc[("tight_colony", "nucleus_size")], theirs.loc[("tight_colony", "nucleus_size")], check_dtype=False
    )
    assert ours.loc[("actin_collapse", "nucleus_size"), "n"] <= int((target == 1).sum())
    assert len(changed.statistics) == len(phantom.statistics)


def test_sentinels_know_collapse_blur_and_lock_in() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 32, 32, generator=g)
    assert pixel_features(images).shape == (60, 3 * 11 + 3)
    blurred = resample(resample(images, 0.5), 2.0)
    real = Real(images, torch.tensor([1, 2] * 30))
    measure = torch.randn(60, 2, generator=g)
    mark = Yardstick.of(Assay.load("phantom"), ["moa", "nucleus_size"], real, judged(measure))
    more = torch.rand(60, 3, 32, 32, generator=g)
    assert mark.distance(images) < 1e-6 < mark.distance(more) < 0.2 * mark.distance(blurred)
    assert mark.spread_ratios(judged(measure), real.target) == {"nucleus_size": pytest.approx(1.0)}
    narrow = mark.spread_ratios(judged(0.3 * measure), real.target)
    assert narrow == {"nucleus_size": pytest.approx(0.3)}
    group = np.repeat(np.arange(30), 2)
    alike = images.clone()
    alike[1::2] = images[::2]
    assert diversity(alike, group) == 0.0
    assert diversity(images, group) == pytest.approx(math.sqrt(1 / 6), rel=0.02)
    one = torch.zeros(8, 4)
    one[:, 2] = 1.0
    assert class_entropy(one) == pytest.approx(0.0, abs=1e-9)
    assert class_entropy(torch.full((8, 4), 0.25)) == pytest.approx(math.log(4))


def test_without_real_images_spreads_are_the_assay_s_and_distance_is_unknown() -> None:
    phantom = Assay.load("phantom")
    mark = Yardstick.of(phantom, ["nucleus_size"], Real(torch.zeros(0, 3, 8, 8), torch.zeros(0)), None)
    sd = float(phantom.reference("nucleus_size", torch.tensor([1]))[1])
    measure = sd * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    found = mark.spread_ratios(judged(measure), torch.ones(4, dtype=torch.int64))
    assert found["nucleus_size"] == pytest.approx(math.sqrt(4 / 3)) and math.isnan(
        mark.distance(torch.rand(4, 3, 8, 8))
    )


def test_toy_data_is_what_the_other_tests_think() -> None:
    assert judge()(data().real.images, data().real.target).value.mean() > -0.01
