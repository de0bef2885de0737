"""Distances against closed forms and slow plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from biorewards.audit.distances import (
    Strata,
    frechet,
    kernel,
    likeness,
    moments,
    neighbourhood,
    radii,
    self_similarity,
)
from biorewards.audit.encoder import thumbnails

RNG = np.random.default_rng(0)


def gaussian(n: int, mean: np.ndarray, covariance: np.ndarray, rng: np.random.Generator = RNG) -> np.ndarray:
    """A sample with exactly this mean and (unbiased) covariance."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def plain_frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def test_frechet_has_its_closed_form_for_gaussians() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    s1, s2 = np.array([1.0, 2.0, 0.5, 3.0]), np.array([1.5, 1.0, 0.5, 2.0])
    mean = np.array([1.0, 0.0, -2.0, 0.5])
    x, y = gaussian(50, mean, np.diag(s1**2)), gaussian(80, np.zeros(4), np.diag(s2**2))
    assert frechet(x, moments(y)).value == pytest.approx(mean @ mean + ((s1 - s2) ** 2).sum(), rel=1e-9)
    assert frechet(x, moments(x)).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [12, 60])  # fewer and more images than features
def test_frechet_equals_the_plain_formula(n: int) -> None:
    x, y = RNG.standard_normal((n, 20)) * RNG.uniform(0.5, 2, 20), RNG.standard_normal((300, 20)) + 0.3
    y = y @ RNG.standard_normal((20, 20))
    assert frechet(x, moments(y)).value == pytest.approx(plain_frechet(x, y), rel=1e-5)


@pytest.mark.parametrize("n", [15, 200])
def test_frechet_influence_is_the_derivative(n: int) -> None:
    x, y = RNG.standard_normal((n, 8)) * RNG.uniform(0.5, 2, 8) + 0.4, RNG.standard_normal((500, 8))
    reference = moments(y)
    found = frechet(x, reference)
    assert found.influence.mean() == pytest.approx(0, abs=1e-9)
    for i in range(5):
        step = 1e-5
        weight = np.full(n, (1 - step) / n)
        weight[i] += step
        # The derivative of the plain (biased) covariance: undo the factor that the weights bring.
        moved = frechet(x, reference, weight).value - found.value
        expected = step * found.influence[i]
        assert moved == pytest.approx(expected, rel=0.1, abs=4e-5 * abs(found.influence).mean() / 5)


def plain_kernel(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def one_stratum(n: int) -> Strata:
    return Strata(np.zeros(n, np.intp), np.ones(1))


def kernel_of(x: np.ndarray, y: np.ndarray) -> float:
    a, b = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    strata = one_stratum(len(y))
    y_self = float(strata.weight @ self_similarity(b, strata))
    return kernel(a, one_stratum(len(x)), b, strata.weight, y_self).value


def test_kernel_distance_equals_the_double_loop() -> None:
    x, y = RNG.standard_normal((25, 6)), RNG.standard_normal((31, 6)) * 1.3 + 0.2
    assert kernel_of(x, y) == pytest.approx(plain_kernel(x, y), rel=1e-4)


def test_kernel_distance_is_unbiased_at_any_size() -> None:
    rng = np.random.default_rng(1)
    for n in (5, 50):
        values = [kernel_of(rng.standard_normal((n, 4)), rng.standard_normal((80, 4))) for _ in range(300)]
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kernel_distance_weighs_strata_by_their_share() -> None:
    """A stratum that is drawn three times as often, weighted down, is the same set; to sampling error exactly so."""
    rng = np.random.default_rng(2)
    number = np.repeat([0, 1], [6, 30])
    x = rng.standard_normal((36, 5)) + number[:, None]
    strata = Strata(number, np.array([0.5, 0.5]))
    k = (x @ x.T / 5 + 1) ** 3
    np.fill_diagonal(k, np.nan)
    blocks = np.array([[np.nanmean(k[np.ix_(number == a, number == b)]) for b in (0, 1)] for a in (0, 1)])
    mean = float(strata.weight @ self_similarity(torch.from_numpy(x).float(), strata))
    assert mean == pytest.approx(blocks.mean(), rel=1e-5)


def test_influences_of_the_kernel_distance_give_its_standard_error() -> None:
    rng = np.random.default_rng(3)
    y = torch.from_numpy(rng.standard_normal((400, 5))).float()
    strata = one_stratum(400)
    y_self = float(strata.weight @ self_similarity(y, strata))
    found, claimed = [], []
    for _ in range(300):
        x = torch.from_numpy(rng.standard_normal((120, 5)) * 1.2 + 0.3).float()
        distance = kernel(x, one_stratum(120), y, strata.weight, y_self)
        found.append(distance.value)
        claimed.append(distance.influence.std(ddof=1) / np.sqrt(120))
    assert np.mean(claimed) == pytest.approx(np.std(found), rel=0.15)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhood_equals_plain_loops(k: int) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((40, 3)) * 0.8, rng.standard_normal((55, 3)) + 0.4

    def ball(points: np.ndarray) -> np.ndarray:
        return np.array([np.sort(np.linalg.norm(points - p, axis=1))[k] for p in points])

    d = np.linalg.norm(x[:, None] - y[None], axis=2)
    in_y, in_x = d <= ball(y)[None], d <= ball(x)[:, None]
    found = neighbourhood(torch.from_numpy(x), torch.from_numpy(y), k)
    np.testing.assert_array_equal(found.precision, in_y.any(1))
    np.testing.assert_allclose(found.density, in_y.sum(1) / k, rtol=1e-6)
    np.testing.assert_allclose(found.nearest, d.min(1), rtol=1e-5)
    assert found.coverage.value == pytest.approx(in_y.any(0).mean())
    assert found.recall.value == pytest.approx(in_x.any(0).mean())
    # What an image covers alone is lost without it.
    lost = np.array([in_y.any(0).mean() - np.delete(in_y, i, 0).any(0).mean() for i in range(len(x))])
    np.testing.assert_allclose(found.coverage.influence, len(x) * (lost - lost.mean()), atol=1e-6)
    np.testing.assert_allclose(radii(torch.from_numpy(x), k).numpy(), ball(x), rtol=1e-5)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_copy_is_found_and_another_image_is_not(turns: int, mirrored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(30, 3, 64, 64, generator=generator)
    pool = torch.nn.functional.avg_pool2d(pool, 9, 1, 4)
    asked = torch.rot90(pool[[7, 21]].flip(3) if mirrored else pool[[7, 21]], turns, (2, 3))
    asked = asked + 0.001 * torch.randn(asked.shape, generator=generator)
    alike, which = likeness(thumbnails(asked), thumbnails(pool))
    assert which.tolist() == [7, 21] and (alike > 0.97).all()
    same, _ = likeness(thumbnails(pool), thumbnails(pool), np.arange(30))
    assert (same < 0.9).all()
    assert likeness(thumbnails(asked), torch.empty(0, 3, 8, 8))[0].tolist() == [-1.0, -1.0]


def test_blank_images_have_no_thumbnail() -> None:
    assert not thumbnails(torch.full((1, 3, 32, 32), 0.4)).any()


def test_frechet_and_kernel_agree_with_torchmetrics() -> None:
    """The same numbers as the field's own code, with features instead of Inception; where it is installed."""
    metrics = pytest.importorskip("torchmetrics.image.fid")

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    x, y = torch.randn(90, 16) * 1.2 + 0.2, torch.randn(120, 16)
    fid = metrics.FrechetInceptionDistance(feature=Identity(), normalize=True)
    fid.set_dtype(torch.float64)
    for part, real in ((y, True), (x, False)):
        fid.update(part.view(-1, 1, 4, 4), real=real)
    ours = frechet(x.numpy(), moments(y.numpy())).value
    assert ours == pytest.approx(float(fid.compute()), rel=1e-3)
