"""Best-of-N: the estimator against every subset, selection, search, and what it costs."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import generators
from biorewards.phantom import render_dataset
from biorewards.rewards import suite
from generators.cellflux import CellFlux
from generators.solvers import Solver
from rl.best_of_n import Prompts, Selected, _from, best_of_n, counted, curve, selection_weights
from rl.policy import streams
from rl.rewards import Judge
from tests.bundled import bundled
from tests.rl_toys import COMPOUNDS, CONTROL, Line, judge


def prompts(count: int = 6) -> Prompts:
    target = torch.tensor([1 + k % 2 for k in range(count)])
    return Prompts(torch.full((count, 1, 4, 4), CONTROL), [COMPOUNDS[k % 2] for k in range(count)], target)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(0)
    total, other = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    weight = selection_weights(total, n)
    subsets = list(itertools.combinations(range(5), n))
    for row in range(4):
        kept = [max(subset, key=lambda k: total[row, k]) for subset in subsets]
        assert (weight[row] * total[row]).sum() == pytest.approx(np.mean([total[row, k] for k in kept]))
        assert (weight[row] * other[row]).sum() == pytest.approx(np.mean([other[row, k] for k in kept]))


def test_ties_share_and_samples_without_a_score_are_never_chosen() -> None:
    weight = selection_weights(np.array([[1.0, 1.0, 0.0], [math.nan, 2.0, 3.0], [math.nan] * 3]), 2)
    assert weight[0].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert weight[1, 0] == 0 and weight[1].sum() == pytest.approx(1) and weight[1, 2] > weight[1, 1]
    assert np.isnan(weight[2]).all()
    with pytest.raises(ValueError, match="from 1 to the 3"):
        selection_weights(np.zeros((1, 3)), 4)


def test_estimate_is_unbiased_for_normal_samples() -> None:
    """E max of n standard normals, n = 1, 2, 4, 8 (order statistics tables)."""
    total = torch.from_numpy(np.random.default_rng(1).normal(size=(3000, 16)))
    pool = Selected(torch.zeros(0), torch.zeros(0), total[..., None], torch.zeros(0), total, 160.0)
    found = curve(pool, ["near"], sizes=[1, 2, 4, 8])
    assert found["total"].tolist() == pytest.approx([0.0, 0.56419, 1.02938, 1.42360], abs=0.02)
    assert found["passes"].tolist() == [10.0, 20.0, 40.0, 80.0]
    assert (found["near_low"] < found["near"]).all() and (found["near"] < found["near_high"]).all()
    clustered = curve(pool, ["near"], sizes=[1], unit=np.arange(3000) // 100)
    assert clustered["total"].tolist() == pytest.approx(found["total"][:1].tolist())


def test_the_best_is_kept_whatever_the_batches() -> None:
    one = best_of_n(Line(0.2), judge(), prompts(), 8, batch_size=64)
    two = best_of_n(Line(0.2), judge(), prompts(), 8, batch_size=5)
    assert torch.equal(one.image, two.image) and torch.equal(one.value, two.value)
    assert torch.equal(one.place, one.total.argmax(1))
    kept = judge()(one.image, prompts().target).value[:, 0]
    assert torch.allclose(kept, one.total.amax(1))
    more = best_of_n(Line(0.2), judge(), prompts(), 32)
    assert torch.equal(more.value[:, :8], one.value), "a larger pool begins with the smaller one"
    assert not torch.equal(best_of_n(Line(0.2), judge(), prompts(), 8, seed=1).value, one.value)


def test_prompts_without_a_score_keep_their_first_sample() -> None:
    found = best_of_n(Line(), judge(silent=(2,)), prompts(4), 4)
    assert found.place.tolist()[1::2] == [-1, -1] and min(found.place.tolist()[::2]) >= 0
    first = best_of_n(Line(), judge(), prompts(4), 1)
    assert torch.equal(found.image[1], first.image[1])


def test_search_beats_independent_samples_at_equal_cost() -> None:
    """From far away: noise 0.1 must lift controls by 0.4."""
    many = prompts(40)
    plain = best_of_n(Line(), judge(), many, 16)
    search = best_of_n(Line(), judge(), many, 16, method="search", rounds=4)
    assert search.total.amax(1).mean() > plain.total.amax(1).mean()
    assert torch.allclose(judge()(search.image, many.target).value[:, 0], search.total.amax(1))
    assert search.passes == plain.passes


def test_search_keeps_the_distribution_of_the_source() -> None:
    """Moved without selection (all totals equal) a source is still control + noise of the same size."""
    seen: list[torch.Tensor] = []

    class Seen(Line):
        def sample(self, control: Any, perturbation: Any, **options: Any) -> Any:
            seen.append(self.source(control, [torch.Generator() for _ in control]))
            return super().sample(control, perturbation, **options)

    made = Seen(noise=0.1)
    best_of_n(made, judge(sign=0.0), prompts(200), 4, method="search", rounds=2, batch_size=1000)
    for part in seen:
        assert float((part - CONTROL)[:, 0, 0, 0].std()) == pytest.approx(0.1, rel=0.12)


def flux(**options: Any) -> CellFlux:
    torch.manual_seed(0)
    made = CellFlux.create(compounds=COMPOUNDS, channels=1, width=8, mult=(1, 2), blocks=1, attention=(), **options)
    for p in made.net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return made


def test_cost_is_counted_in_network_passes() -> None:
    made = flux(solver=Solver("euler", "uniform", 3), guidance=0.0)
    assert best_of_n(made, judge(), prompts(), 4).passes == 12
    guided = flux(solver=Solver("heun2", "uniform", 3), guidance=0.2)
    assert best_of_n(guided, judge(), prompts(2), 2).passes == 2 * 3 * 2 * 2
    with counted(object()) as passes:
        assert math.isnan(passes())


def test_flow_can_be_started_at_a_given_source() -> None:
    """With its own solver and guidance: the sample of the same noise."""
    made = flux(guidance=0.3, solver=Solver("heun2", "edm", 3))
    control = torch.rand(2, 1, 8, 8)
    wanted = made.sample(control, COMPOUNDS, generator=streams([(1,), (2,)]))
    source = made.source(control * 2 - 1, streams([(1,), (2,)]))
    assert torch.equal(_from(made, source).sample(control, COMPOUNDS), wanted)
    assert torch.equal(made.sample(control, COMPOUNDS, generator=streams([(1,), (2,)])), wanted)


def test_what_makes_no_sense_is_refused() -> None:
    gan = SimpleNamespace(sample=lambda *a, **k: None, capabilities=SimpleNamespace(stochastic=True))
    with pytest.raises(ValueError, match="method=random"):
        best_of_n(gan, judge(), prompts(), 4, method="search")
    still = SimpleNamespace(sample=lambda *a, **k: None, capabilities=SimpleNamespace(stochastic=False))
    with pytest.raises(ValueError, match="would be equal"):
        best_of_n(still, judge(), prompts(), 4)
    for options, text in (({"n": 0}, "at least 1"), ({"n": 6, "method": "search"}, "multiple of 4"),
                          ({"n": 4, "method": "grid"}, "random, search"),
                          ({"n": 4, "method": "search", "reach": 2.0}, "between 0 and 1")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            best_of_n(Line(), judge(), prompts(), **options)  # type: ignore[arg-type]


def test_the_bundled_model_gains_with_every_doubling_of_n() -> None:
    """On phantoms that it has not seen; and what is kept scores what the pool says, judged again on its own."""
    crops = render_dataset(65, size=48, seed=11)
    images = torch.from_numpy(crops.images).permute(0, 3, 1, 2).float() / 255
    controls = images[(crops.rows["STATE"] == "control").to_numpy()][:4]
    assay = bundled("phantom")
    names = ["carboxen", "epotasel", "kinespar", "tasumide"]
    target = torch.tensor([assay.classes.index(assay.compounds[name]) for name in names])
    again = Judge(suite(assay), assay, scale=2.0)
    found = best_of_n(
        generators.load("cellflux", generators.MINI_CELLFLUX), again, Prompts(controls, names, target), 4, steps=3
    )
    table = curve(found, again.names)
    assert table["n"].tolist() == [1, 2, 4] and (table["total"].diff()[1:] > 0.2).all()
    rescored = again.total(again(found.image, target).value)
    assert torch.allclose(rescored, found.total.amax(1), atol=1e-3)
    assert found.passes == 4 * 3 * 2  # four samples of three guided Euler steps
