"""The loss against its closed forms, and the loop on a flow whose best weights are known."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.cellflux import CellFlux
from rl.nft import Learner, Settings, lag_decay, nft_loss
from rl.policy import check_trainable, digest_tensors, flow, streams
from tests.rl_toys import COMPOUNDS, CONTROL, WANTED, Line, data, judge, learner, settings, shifts

N, D = 5, 12


def velocities(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v_old, u (N, D), t, r (N,), float64."""
    g = torch.Generator().manual_seed(seed)
    v_old, u = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(2))
    return v_old, u, torch.rand(N, generator=g, dtype=torch.float64), torch.rand(N, generator=g, dtype=torch.float64)


def gradient(form: str, mix_beta: float, r: Tensor, **options: Any) -> Tensor:
    v_old, u, t, _ = velocities()
    v = v_old.clone().requires_grad_(True)
    base = v_old if "base" not in options else options.pop("base")
    found = nft_loss(v, v_old, base, u, t, r, mix_beta=mix_beta, form=form, **{"kl_weight": 0.0, **options})
    found.loss.backward()
    assert v.grad is not None
    return v.grad


@pytest.mark.parametrize("mix_beta", [0.05, 0.1, 1.0, 3.0])
def test_first_gradient_is_advantage_weighted_flow_matching(mix_beta: float) -> None:
    """At v = v_old: 2 C (2r - 1)(v_old - u), over the D numbers of a mean, for every mix_beta."""
    v_old, u, t, r = velocities()
    wanted = 2 * 5.0 * (2 * r - 1)[:, None] * (v_old - u) / D
    assert torch.allclose(gradient("velocity", mix_beta, r), wanted, rtol=1e-12)
    weight = ((1 - t)[:, None] * (v_old - u)).abs().mean(1, keepdim=True)
    assert torch.allclose(gradient("x1", mix_beta, r), wanted * (1 - t)[:, None] ** 2 / weight, rtol=1e-12)


@pytest.mark.parametrize("form", ["x1", "velocity"])
def test_neutral_r_gives_no_gradient_and_reversed_r_the_opposite_one(form: str) -> None:
    _, _, _, r = velocities()
    assert gradient(form, 0.1, torch.full_like(r, 0.5)).abs().max() < 1e-15
    assert torch.allclose(gradient(form, 0.1, 1 - r), -gradient(form, 0.1, r), rtol=1e-12)


@pytest.mark.parametrize("mix_beta", [0.1, 1.0])
def test_loss_is_a_quadratic_in_the_step(mix_beta: float) -> None:
    """L / b = |e|^2 / b + b |d|^2 + 2 (2r - 1) <e, d> with d = v - v_old, e = v_old - u; best d: (1 - 2r) e / b."""
    v_old, u, t, r = velocities()
    v = v_old + 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options: dict[str, Any] = {"mix_beta": mix_beta, "kl_weight": 0.0, "clip_advantage": 1.0, "form": "velocity"}
    found = nft_loss(v, v_old, v_old, u, t, r, **options).loss
    d, e = v - v_old, v_old - u
    each = (e.square() / mix_beta + mix_beta * d.square()).mean(1) + 2 * (2 * r - 1) * (e * d).mean(1)
    assert torch.allclose(found, each.sum(), rtol=1e-12)
    best = (v_old + (1 - 2 * r)[:, None] * e / mix_beta).requires_grad_(True)
    nft_loss(best, v_old, v_old, u, t, r, **options).loss.backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-12


def test_value_at_the_old_policy_does_not_depend_on_r() -> None:
    v_old, u, t, r = velocities()
    low, high = (
        nft_loss(v_old, v_old, v_old, u, t, one, mix_beta=0.1, kl_weight=0.1).loss for one in (r, torch.ones_like(r))
    )
    assert torch.allclose(low, high)


def test_kl_pulls_to_the_base_with_its_weight_alone() -> None:
    v_old, _, _, r = velocities()
    base = v_old + 1
    pulled = gradient("x1", 0.1, torch.full_like(r, 0.5), base=base, kl_weight=0.3)
    assert torch.allclose(pulled, 2 * 0.3 * (v_old - base) / D)


def test_predicted_image_error_is_the_velocity_error_times_what_is_left_of_time() -> None:
    """x_t + (1 - t) v - x_1 = (1 - t)(v - u): the source-to-target convention, which turns with the sign of time."""
    g = torch.Generator().manual_seed(1)
    source, image, v = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.rand(N, 1, generator=g, dtype=torch.float64)
    x = (1 - t) * source + t * image
    assert torch.allclose(x + (1 - t) * v - image, (1 - t) * (v - (image - source)))


# ---- the loop ---------------------------------------------------------------------------------------------------


def run(steps: int, **options: Any) -> Any:
    made = learner(**options)
    lines = [made.advance() for _ in range(steps)]
    return made, lines


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "velocity", "clip_gradient": 10.0},
        {"coupling": "control"},
        {"advantage": "per-reward"},
        {"lag": "ramp", "mix_beta": 1.0},
        {"inner_steps": 3, "learning_rate": 0.007},
    ],
)
def test_flow_moves_to_the_known_optimum(options: dict[str, Any]) -> None:
    """Rollouts are source + shift; the reward is best where controls are lifted to WANTED."""
    made, lines = run(60, **options)
    assert lines[-1]["total"] > lines[0]["total"] / 4
    for shift in shifts(made.average):
        assert shift == pytest.approx(WANTED - CONTROL - 0.01, abs=0.08)


def test_reusing_the_noise_of_the_rollout_compares_nothing_here() -> None:
    """With its own source the image is source + shift for certain, so u = v_old and the gradient is zero."""
    made, lines = run(2, coupling="rollout")
    assert lines[0]["useful_groups"] == 1 and abs(shifts(made.trained)[0]) < 1e-3 < abs(shifts(run(2)[0].trained)[0])


def test_reversed_reward_makes_it_worse() -> None:
    made, _ = run(15, sign=-1.0)
    assert all(shift < -0.05 for shift in shifts(made.trained))
    controls = data().test.controls
    total = [
        judge()(flow(policy, controls, ["one"] * 6, 1), torch.ones(6, dtype=torch.int64)).value.mean()
        for policy in (made.base, made.trained)
    ]
    assert total[1] < 1.2 * total[0] < 0


def test_groups_without_spread_change_nothing_and_are_counted() -> None:
    made = learner(sign=0.0, kl_weight=0.1, weight_decay=0.1)
    before = digest_tensors(made.trained.net.state_dict().values())
    line = made.advance()
    assert line["neutral_groups"] == 4 and line["useful_groups"] == 0
    assert line["loss"] == line["kl"] == line["gradient"] == 0 and made.updates == 0
    assert digest_tensors(made.trained.net.state_dict().values()) == before


def test_unscored_rollouts_carry_no_gradient() -> None:
    made, lines = run(5, silent=(2,))
    one, two = shifts(made.trained)
    assert one > 0.05 and two == 0.0
    assert lines[0]["unscored"] == 12 and lines[0]["useful_groups"] == 0.5


def test_policies_start_equal_even_with_dropout() -> None:
    """Dropout would make v differ from v_old at equal weights: a divergence where there is none."""
    torch.manual_seed(0)
    flux = CellFlux.create(compounds=COMPOUNDS, channels=1, width=8, mult=(1, 2), blocks=1, attention=(), dropout=0.5)
    for p in flux.net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    flux.net.train()
    made = learner(flux, kl_weight=0.1, rollouts=3, learning_rate=1e-3)
    assert not any(module.training for module in made.trained.net.modules())
    first, second = made.advance(), made.advance()
    assert first["kl"] == first["drift_old"] == 0.0
    assert second["kl"] > 0 and second["drift_old"] > 0
    assert all(module.training for module in flux.net.modules()), "the caller's network is left as it was"


def test_adapters_start_at_the_base_and_merge_into_a_plain_network() -> None:
    pytest.importorskip("peft", reason="adapters need the extra `lora`")
    from rl.lora import merged_state

    torch.manual_seed(0)
    flux = CellFlux.create(compounds=COMPOUNDS, channels=1, width=8, mult=(1, 2), blocks=1, attention=())
    for p in flux.net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    made = learner(flux, kl_weight=0.1, rollouts=3, learning_rate=1e-2, lora_rank=2)
    assert sum(p.numel() for p in made.parameters) < sum(p.numel() for p in flux.net.parameters())
    first, second = made.advance(), made.advance()
    assert first["kl"] == first["drift_old"] == 0.0 and second["kl"] > 0
    plain = copy.deepcopy(flux.net)
    plain.load_state_dict(merged_state(made.trained.net))
    x, t, c = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.6]), made.trained.embed(COMPOUNDS)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x, t, c), made.trained.net(x, t, c), atol=1e-5)
        assert not torch.allclose(plain(x, t, c), flux.net.eval()(x, t, c), atol=1e-5)


def test_base_is_frozen_and_the_lagged_policy_lags() -> None:
    made = learner(lag="0.75")
    made.advance()
    one = made.trained.net.by.detach()
    assert torch.allclose(made.old.net.by, 0.25 * one)
    assert torch.equal(made.base.net.by, torch.zeros(2))
    assert all(not p.requires_grad for p in (*made.old.net.parameters(), *made.base.net.parameters()))


def test_rollouts_come_from_the_lagged_policy_and_do_not_depend_on_the_batch() -> None:
    made = learner()
    made.old.net.by.data += 0.2
    one = made.rollout(made.pool.groups(0, 0, 4), _Clock())
    assert torch.allclose(one.image - one.source, torch.tensor(0.2))
    small = learner(micro_batch=5)
    small.old.net.by.data += 0.2
    assert torch.equal(small.rollout(small.pool.groups(0, 0, 4), _Clock()).image, one.image)


def test_rollouts_of_a_group_are_trained_with_one_time_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = learner(groups=2, rollouts=3), []

    def spy(*given: Any, **options: Any) -> Any:
        seen.append((given[3], given[4]))
        return nft_loss(*given, **options)

    monkeypatch.setattr("rl.nft.nft_loss", spy)
    rolled = made.rollout(made.pool.groups(0, 0, 2), _Clock())
    made.update(rolled, torch.full((6,), 0.7), torch.arange(6), 0)
    for u, t in seen:
        sources = (rolled.image - u).view(2, 3, -1)
        assert torch.allclose(sources, sources[:, :1].expand_as(sources), atol=1e-6)
        assert torch.equal(t.view(2, 3), t.view(2, 3)[:, :1].expand(2, 3)) and t[0] != t[3]
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1]), "another time each"
    own = rolled.source.view(2, 3, -1)
    assert not torch.allclose(own[:, 0], own[:, 1]), "rollouts themselves differ"


class _Clock:
    seconds: dict[str, float] = {}  # noqa: RUF012

    def lap(self, name: str, less: float = 0.0) -> None:
        """Nothing is measured."""


def test_micro_batches_add_up_to_one_batch() -> None:
    (one, a), (many, b) = run(3, micro_batch=64), run(3, micro_batch=5)
    assert torch.allclose(one.trained.net.by, many.trained.net.by, atol=1e-6)
    assert a[-1]["loss"] == pytest.approx(b[-1]["loss"], rel=1e-5)


def test_flow_is_euler() -> None:
    policy = Line(0.5)
    source = torch.rand(2, 1, 4, 4)
    assert torch.allclose(flow(policy, source, COMPOUNDS, 7), source + 0.5)


def test_streams_are_functions_of_their_key() -> None:
    a, b, c = (torch.randn(3, generator=g) for g in streams([(0, 1, 2), (0, 1, 2), (0, 2, 1)]))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_lags() -> None:
    assert [lag_decay("0.9", s) for s in (0, 500)] == [0.9, 0.9]
    assert [lag_decay("ramp", s) for s in (0, 100, 900)] == [0.0, pytest.approx(0.1), 0.5]
    assert [lag_decay("late", s) for s in (74, 75, 100, 400)] == [0.0, 0.0, pytest.approx(0.1875), 0.999]
    assert lag_decay("none", 9) == 0.0


def test_hacking_corner_warns() -> None:
    assert not Settings().warnings
    for lag in ("none", "ramp", "0.1"):
        assert "kl_weight" in Settings(lag=lag, kl_weight=1e-4).warnings[0]
    assert not Settings(lag="none", kl_weight=0.1).warnings
    assert not Settings(lag="none", kl_weight=0.0, inner_steps=4).warnings


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rollouts": 1}, "at least 2 images"),
        ({"lag": "1.0"}, "none, ramp, late"),
        ({"coupling": "x"}, "fresh, rollout, control"),
        ({"loss": "x0"}, "x1, velocity"),
        ({"advantage": "z"}, "total, per-reward"),
        ({"mix_beta": 0.0}, "above 0"),
        ({"kl_weight": -1.0}, "0 or more"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        settings(**options)


def test_what_cannot_be_trained_is_refused_and_best_of_is_named() -> None:
    class Gan:
        name = "impa"

        def sample(self, control: Tensor, perturbation: Any, **options: Any) -> Tensor:
            return control

    with pytest.raises(ValueError, match=r"impa has no velocity .*best-of"):
        check_trainable(Gan())
    still = copy.copy(Line())
    still.capabilities = copy.copy(still.capabilities)
    still.capabilities.stochastic = False
    with pytest.raises(ValueError, match="one image"):
        check_trainable(still)
    three: Any = SimpleNamespace(num_processes=3)
    with pytest.raises(ValueError, match="take a multiple"):
        Learner(Line(), judge(), data().train, settings(groups=4), three)


def test_every_compound_and_control_comes_equally_often() -> None:
    pool = data().train
    groups = [g for step in range(9) for g in pool.groups(0, step, 4)]
    assert [sum(g.compound == k for g in groups) for k in range(2)] == [18, 18]
    assert [sum(g.control == k for g in groups) for k in range(6)] == [6] * 6
    assert pool.groups(0, 3, 4) == pool.groups(0, 3, 4) != pool.groups(1, 3, 4)
    assert {pool.neighbour(1, (0, k)) for k in range(40)} == {1, 3, 5}
