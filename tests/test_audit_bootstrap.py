"""Intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundled import bundled

from biorewards.audit.bootstrap import Sums, differs, interval, pooled, resample, seed_of
from biorewards.audit.distances import Strata, frechet, kernel, moments, self_similarity
from biorewards.batch import Batch
from biorewards.phantom import render_dataset
from biorewards.regions import counts, image_max, measure_regions
from biorewards.rewards import suite


def covered(truth: np.ndarray, draws: np.ndarray) -> float:
    """Share of K columns (B + 1, K) whose interval holds its truth (K,)."""
    ends = [interval(draws[:, k]) for k in range(draws.shape[1])]
    return float(np.mean([low <= t <= high for t, (low, high) in zip(truth, ends, strict=True)]))


def test_row_zero_is_the_sample_and_absent_values_are_left_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 3))
    x[rng.random((50, 3)) < 0.2] = np.nan
    stratum = rng.integers(3, size=50)
    sums = resample(x, stratum, 4, seed=1, resamples=20)
    assert isinstance(sums, Sums) and sums.total.shape == (21, 4, 3)
    for s in range(3):
        np.testing.assert_allclose(sums.mean[0, s], np.nanmean(x[stratum == s], 0))
    assert np.isnan(sums.mean[:, 3]).all()
    share = np.array([0.2, 0.5, 0.3, 0.0])
    np.testing.assert_allclose(pooled(sums, share)[0], share[:3] @ sums.mean[0, :3])


@pytest.mark.parametrize("n", [2, 3, 10, 200])
def test_the_variance_is_right_at_any_size(n: int) -> None:
    """Rao and Wu: the resampled variance of a mean is s^2 / n with s^2 unbiased, even of two images."""
    x = np.random.default_rng(n).standard_normal((n, 1))
    means = pooled(resample(x, np.zeros(n, int), 1, seed=3, resamples=20_000), np.ones(1))[1:, 0]
    assert means.var() == pytest.approx(x.var(ddof=1) / n, rel=0.05)


def test_equal_files_are_resampled_together_and_others_apart() -> None:
    rng = np.random.default_rng(5)
    a = rng.standard_normal((300, 1))
    b = a + 0.1 * rng.standard_normal((300, 1))
    one = np.zeros(300, int)

    def draws(x: np.ndarray, files: list[str]) -> np.ndarray:
        return pooled(resample(x, one, 1, seed=seed_of(0, files), resamples=500), np.ones(1))[:, 0]

    paired = draws(a, ["x"]) - draws(b, ["x"])
    apart = draws(a, ["x"]) - draws(b, ["y"])
    assert paired[1:].std() < 0.2 * apart[1:].std()


def test_sign_of_a_difference() -> None:
    draws = np.random.default_rng(0).standard_normal(2001)
    assert [differs(draws + shift) for shift in (0, 5, -5)] == [0, 1, -1]
    assert differs(np.full(100, np.nan)) == 0


@pytest.mark.parametrize("n", [100, 300])
def test_intervals_cover_means_of_rewards(n: int) -> None:
    """2,000 samples each of a probability and of -z^2 (limited to -25): 93 to 97 of 100 intervals hold the truth."""
    rng = np.random.default_rng(n)
    z = np.clip(rng.standard_normal((n, 2000)) * 1.1 + 0.3, -5, 5)
    p = rng.beta(4, 1, (n, 2000))
    reach = np.linspace(-5, 5, 200_001)
    density = np.exp(-(((reach - 0.3) / 1.1) ** 2) / 2)
    for values, truth in ((-(z**2), -(reach**2 @ density) / density.sum()), (p, 0.8)):
        draws = pooled(resample(values, np.zeros(n, int), 1, seed=n, resamples=1000), np.ones(1))
        assert 0.93 <= covered(np.full(2000, truth), draws) <= 0.97


def test_intervals_cover_stratified_means() -> None:
    """Conditions of 4 to 40 images with levels and spreads of their own."""
    rng = np.random.default_rng(8)
    sizes = np.array([4, 8, 12, 20, 40, 5, 9, 30])
    stratum = np.repeat(np.arange(len(sizes)), sizes)
    level, spread = rng.normal(0, 3, len(sizes)), rng.uniform(0.5, 2, len(sizes))
    share = rng.dirichlet(np.ones(len(sizes)))
    x = level[stratum, None] + spread[stratum, None] * rng.standard_normal((len(stratum), 2000))
    draws = pooled(resample(x, stratum, len(sizes), seed=2, resamples=1000), share)
    assert 0.92 <= covered(np.full(2000, share @ level), draws) <= 0.97


def resampled_coverage(population: np.ndarray, n: int, times: int) -> np.ndarray:
    """Coverage of the mean of each column over `times` samples of n rows from a population (N, K)."""
    rng = np.random.default_rng(n)
    hits = np.zeros(population.shape[1])
    truth = population.mean(0)
    for t in range(times):
        sample = population[rng.integers(len(population), size=n)]
        draws = pooled(resample(sample, np.zeros(n, int), 1, seed=t, resamples=400), np.ones(1))
        ends = np.array([interval(draws[:, k]) for k in range(draws.shape[1])])
        hits += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    return hits / times


@pytest.mark.slow
def test_intervals_cover_on_phantom_resamples_with_exact_masks() -> None:
    """-z^2 of sizes and counts of 2,000 drawn crops, each against its own class: 93 to 97 of 100."""
    drawn = render_dataset(2000, size=48, seed=3)
    nuclei, cells = (measure_regions(torch.from_numpy(m)) for m in (drawn.nuclei, drawn.cells))
    parts = [image_max(nuclei, nuclei.area), image_max(cells, cells.area), counts(nuclei), counts(cells)]
    measures = torch.stack([part.float() for part in parts], 1).double().numpy()
    values = np.full_like(measures, np.nan)
    for name in set(drawn.rows["ANNOT"]):
        own = (drawn.rows["ANNOT"] == name).to_numpy()
        z = (measures[own] - np.nanmean(measures[own], 0)) / np.nanstd(measures[own], 0)
        values[own] = -(np.clip(z, -5, 5) ** 2)
    found = resampled_coverage(np.nan_to_num(values, nan=-25.0), 600, 2000)
    assert ((found >= 0.93) & (found <= 0.97)).all(), found


@pytest.mark.slow
def test_intervals_cover_on_phantom_resamples_as_judged() -> None:
    """The seven rewards and the total of 1,300 crops judged by the bundled assay, and both distances in its features.

    Distances: the truth is the mean distance of samples of that size from the reference. Their intervals may be wide
    (they are, where the sets hardly differ), never narrow.
    """
    assay = bundled("phantom")
    drawn = render_dataset(1300, size=96, seed=4)
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255
    target = torch.tensor([assay.classes.index(name) for name in drawn.rows["ANNOT"]])
    assert assay.classifier is not None
    judge, rewards, features = suite(assay), [], []
    with torch.inference_mode():
        for part in range(0, len(images), 50):
            here = slice(part, part + 50)
            result = judge(Batch(images[here], target[here], assay))
            rewards.append(torch.stack([*(s.value for s in result.scores.values()), result.total], 1))
            features.append(assay.classifier.embed(assay.normalised(images[here])))
    found = resampled_coverage(torch.cat(rewards).double().numpy(), 600, 1000)
    # 1,000 samples tell a coverage to within 1.4 percent points.
    assert ((found >= 0.925) & (found <= 0.975)).all(), found
    print("coverage of rewards and total", found)

    everything = torch.cat(features)
    reference, rest = everything[:600], everything[600:]
    known = moments(reference.numpy())
    strata = Strata(np.zeros(len(reference), np.intp), np.ones(1))
    alike = float(strata.weight @ self_similarity(reference, strata))
    rng, n = np.random.default_rng(0), 150
    spans = []
    for t in range(200):
        x = rest[torch.from_numpy(rng.integers(len(rest), size=n))]
        ours = Strata(np.zeros(n, np.intp), np.ones(1))
        both = [frechet(x.numpy(), known), kernel(x, ours, reference, strata.weight, alike)]
        columns = np.stack([d.value + d.influence for d in both], 1)
        draws = pooled(resample(columns, np.zeros(n, int), 1, seed=t, resamples=400), np.ones(1))
        spans.append([[d.value, *interval(draws[:, k])] for k, d in enumerate(both)])
    value, low, high = np.moveaxis(np.array(spans), 2, 0)
    truth = value.mean(0)
    print("coverage of distances", ((low <= truth) & (truth <= high)).mean(0))
    assert (((low <= truth) & (truth <= high)).mean(0) >= 0.93).all()
