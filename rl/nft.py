"""DiffusionNFT (arXiv 2509.16117) moved to source-to-target flow, as in CellFluxRL (arXiv 2603.21743).

One step: draw groups (control, compound); roll out K images a group with the lagged policy from noised sources; score
them; turn scores into r in [0, 1] within the group; then, for a pair x_t = (1 - t) x_s + t x_1 with u = x_1 - x_s,

    v+ = (1 - b) v_old + b v,    v- = (1 + b) v_old - b v,
    L  = C / b (r |v+ - u|^2 + (1 - r) |v- - u|^2) + kl |v - v_base|^2,

b `mix_beta`, C `clip_advantage`, kl `kl_weight`. At v = v_old the gradient is that of advantage-weighted flow matching,
2 C (2r - 1)(v_old - u), whatever b; away from it b is a trust region to v_old. Nothing is differentiated through the
rewards. All policies are in evaluation mode (no dropout), all rollouts without guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rl.policy import FlowPolicy, blend, check_trainable, flow, streams, to_range, to_unit, twin
from rl.rewards import MODES, Advantage, Judge, Judged, advantages
from rl.scoring import Clock, Scorer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rl.distribution import Population
    from rl.pool import Group, Pool

COUPLINGS = ("fresh", "rollout", "control")
LOSSES = ("x1", "velocity")
#: Decay of the lagged policy after s optimiser steps. "ramp" and "late" are DiffusionNFT's types 1 and 2.
LAGS: dict[str, Callable[[int], float]] = {
    "none": lambda s: 0.0,
    "ramp": lambda s: min(0.001 * s, 0.5),
    "late": lambda s: 0.0 if s < 75 else min(0.0075 * (s - 75), 0.999),
}
#: Floor of the self-normalising weight of the x1 loss.
LEAST_WEIGHT = 1e-5
#: Purposes of random streams, so that no two share one.
ROLLOUT, TRAINING, NEIGHBOUR = 1, 2, 3


@dataclass(frozen=True)
class Settings:
    """What decides a run. Lag, mix_beta, learning rate, clip and inner steps are ONE setting: tune them together."""

    steps: int = 100  #: rollout sets
    groups: int = 16  #: (control, compound) pairs a step, over all processes
    rollouts: int = 12  #: K, images a group
    rollout_steps: int = 6  #: Euler steps of a rollout
    times: int = 2  #: training times a rollout
    inner_steps: int = 1  #: optimiser steps a rollout set, each with times and noise of its own
    coupling: str = "fresh"  #: source of a pair: fresh noise, the rollout's own, another control of the plate
    loss: str = "x1"  #: x1 (self-normalised, predicted image) or velocity
    advantage: str = "total"  #: total, or per-reward: standardise each reward in its group before the weights
    clip_advantage: float = 5.0  #: C
    mix_beta: float = 0.1  #: b, how far v+ and v- lie from the lagged policy
    kl_weight: float = 0.1  #: of the pull to the frozen base
    lag: str = "0.9"  #: decay of the lagged policy after each rollout set: a number, none, ramp or late
    ema: float = 0.9  #: largest decay of the averaged weights, which are evaluated and kept
    learning_rate: float = 5e-4  #: AdamW; for a small network trained from scratch. Start lower on a large one
    weight_decay: float = 1e-4
    clip_gradient: float = 1.0
    micro_batch: int = 64  #: pairs a backward pass; gradients add up
    lora_rank: int = 0  #: train low-rank adapters (peft) instead of all weights; 0 = all weights
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "groups", "rollout_steps", "times", "inner_steps", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.rollouts < 2:
            raise ValueError(f"rollouts={self.rollouts}: a group needs at least 2 images to compare")
        for name in ("clip_advantage", "mix_beta", "learning_rate", "clip_gradient"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: a finite number above 0")
        for name in ("kl_weight", "weight_decay", "lora_rank", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: a finite number, 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: 0 or more, below 1")
        for name, allowed in (("coupling", COUPLINGS), ("loss", LOSSES), ("advantage", MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        lag_decay(self.lag, 0)

    @property
    def warnings(self) -> list[str]:
        """What is known to end in reward hacking."""
        if self.inner_steps == 1 and self.kl_weight < 0.01 and lag_decay(self.lag, 50) < 0.5:
            return [
                f"lag={self.lag} with one inner step and kl_weight={self.kl_weight:g}: the rollout policy follows the "
                "trained one and nothing holds it to the base. Rewards rise fastest here and images get worst; take "
                "lag=0.9, or kl_weight=0.1"
            ]
        return []


def lag_decay(lag: str, step: int) -> float:
    """d in old <- d old + (1 - d) trained, after `step` optimiser steps. Raises ValueError for what is no lag."""
    if lag in LAGS:
        return LAGS[lag](step)
    try:
        decay = float(lag)
    except ValueError:
        decay = -1.0
    if not 0 <= decay < 1:
        raise ValueError(f"lag={lag!r}: a number from 0 to below 1, or one of {', '.join(LAGS)}")
    return decay


# ---- the loss --------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """Sums over the pairs of a batch, scalars: what is minimised, and its parts and drifts without gradient."""

    loss: Tensor
    policy: Tensor
    kl: Tensor
    drift_old: Tensor


def nft_loss(
    v: Tensor, v_old: Tensor, v_base: Tensor, u: Tensor, t: Tensor, r: Tensor, *, mix_beta: float, kl_weight: float,
    clip_advantage: float = 5.0, form: str = "x1",
) -> Loss:  # fmt: skip
    """The loss of pairs, summed over B. v, v_old, v_base, u: (B, ...) velocities, u = x_1 - x_s; t, r: (B,).

    form x1: the predicted image x_t + (1 - t) v is compared, each term divided by its own mean absolute error
    (DiffusionNFT's stabiliser, no gradient); velocity: |v± - u|^2 as it is. Squares are means over a pair's numbers.
    """
    plus = (1 - mix_beta) * v_old + mix_beta * v - u
    minus = (1 + mix_beta) * v_old - mix_beta * v - u
    terms = []
    for error in (plus, minus):
        if form == "x1":
            # x1_hat - x_1 = (1 - t)(v± - u), because x_1 = x_t + (1 - t) u.
            error = (1 - t).view(-1, *[1] * (v.ndim - 1)) * error
            weight = error.detach().double().abs().flatten(1).mean(1).clamp(min=LEAST_WEIGHT).to(error.dtype)
        else:
            weight = torch.ones_like(r)
        terms.append(error.square().flatten(1).mean(1) / weight)
    policy = clip_advantage / mix_beta * (r * terms[0] + (1 - r) * terms[1])
    kl = (v - v_base).square().flatten(1).mean(1)
    drift = (v.detach() - v_old).square().flatten(1).mean(1)
    return Loss((policy + kl_weight * kl).sum(), policy.detach().sum(), kl.detach().sum(), drift.sum())


# ---- one step --------------------------------------------------------------------------------------------------


class Rollouts(NamedTuple):
    """N = groups * K images of one process, group by group, in the policy's range. keys: (group, k) of each."""

    control: Tensor
    source: Tensor
    image: Tensor
    compounds: list[str]
    target: Tensor
    keys: list[tuple[int, int]]
    rows: list[int]
    judged: Judged


class Learner:
    """The four policies and the optimiser. trained: gets gradients; old: lagged, rolls out; base: frozen; average: of
    the trained weights, evaluated and kept. `step` counts rollout sets, `updates` optimiser steps."""

    def __init__(
        self, policy: FlowPolicy, judge: Judge, pool: Pool, settings: Settings, accelerator: Accelerator,
        population: Population | None = None,
    ) -> None:  # fmt: skip
        check_trainable(policy)
        if settings.groups % accelerator.num_processes:
            raise ValueError(
                f"groups={settings.groups} cannot be shared by {accelerator.num_processes} processes; take a multiple"
            )
        self.judge, self.pool, self.settings, self.accelerator = judge, pool, settings, accelerator
        self.population = population
        policy.net.to(accelerator.device)
        judge.assay.to(accelerator.device)
        self.base = twin(policy)
        net = twin(policy).net.requires_grad_(True)
        if settings.lora_rank:
            from rl.lora import with_adapters

            net = with_adapters(net, settings.lora_rank, settings.seed)
        self.trained = twin(policy, net.eval())
        self.old, self.average = twin(self.trained), twin(self.trained)
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = accelerator.prepare(
            torch.optim.AdamW(self.parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        )
        self.step = self.updates = 0

    def advance(self) -> dict[str, float]:
        """One rollout set and its updates; returns what happened, equal on all processes."""
        s, a = self.settings, self.accelerator
        clock = Clock(a.device)
        groups = self.pool.groups(s.seed, self.step, s.groups)[a.process_index :: a.num_processes]
        rolled = self.rollout(groups, clock)
        value = self._values(rolled).view(len(groups), s.rollouts, -1)
        found = advantages(value, self.judge.weights, s.advantage, s.clip_advantage)
        line = self._told(rolled, found)
        r = found.r.flatten().to(a.device)
        useful = torch.nonzero(found.counts.flatten())[:, 0].to(a.device)
        for inner in range(s.inner_steps):
            line |= self.update(rolled, r, useful, inner)
        decay = lag_decay(s.lag, self.updates)
        blend(self.old.net, self.trained.net, decay)
        clock.lap("train")
        self.step += 1
        speed = {
            "samples_per_s": s.groups * s.rollouts / clock.total,
            "score_share": clock.seconds["score"] / clock.total,
        }
        seconds = {f"seconds/{name}": value for name, value in {**clock.seconds, "step": clock.total}.items()}
        return {"step": self.step, **line, "lag": decay, **speed, **seconds}

    @torch.no_grad()
    def rollout(self, groups: list[Group], clock: Clock) -> Rollouts:
        """Roll out groups with the lagged policy and score them, on a GPU while the next ones are rolled out."""
        s, policy, device = self.settings, self.old, self.accelerator.device
        keys = [(g.number, k) for g in groups for k in range(s.rollouts)]
        rows = [g.control for g in groups for _ in range(s.rollouts)]
        index = [g.compound for g in groups for _ in range(s.rollouts)]
        compounds = [self.pool.compounds[k] for k in index]
        target = torch.from_numpy(self.pool.targets[index])
        control, source, image = [], [], []
        with Scorer(self.judge, device) as scorer:
            for start in range(0, len(keys), s.micro_batch):
                part = slice(start, start + s.micro_batch)
                control.append(to_range(self.pool.controls[rows[part]].to(device), policy))
                chance = streams((s.seed, ROLLOUT, self.step, *key) for key in keys[part])
                source.append(policy.source(control[-1], chance))
                with self.accelerator.autocast():
                    image.append(flow(policy, source[-1], compounds[part], s.rollout_steps))
                scorer.submit(to_unit(image[-1], policy), target[part].to(device))
            judged = scorer.result()
        clock.lap("sample", less=0.0 if scorer.overlaps else scorer.seconds)
        clock.seconds["score"] = scorer.seconds
        joined = [torch.cat(parts) for parts in (control, source, image)]
        return Rollouts(joined[0], joined[1], joined[2], compounds, target, keys, rows, judged)

    def _values(self, rolled: Rollouts) -> Tensor:
        """(N, R) values that advantages are made of: the suite's, or credits in the population of all processes."""
        a, judged = self.accelerator, rolled.judged
        if self.population is None:
            return judged.value
        mine = [judged.value, judged.measure, judged.nothing, rolled.target]
        value, measure, nothing, target = (a.gather(x.to(a.device)).cpu() for x in mine)
        credit = self.population.credit(value, measure, nothing, target)
        return credit[a.process_index * len(judged.value) :][: len(judged.value)]

    def _told(self, rolled: Rollouts, found: Advantage) -> dict[str, float]:
        """What the rollouts of all processes are like."""
        a, judged = self.accelerator, rolled.judged
        lone = torch.stack([found.r.flatten(), found.counts.flatten().float(), found.valid.flatten().float(),
                            judged.nothing.float(), self.judge.total(judged.value)], 1)  # fmt: skip
        each = a.gather(torch.cat([lone, judged.value], 1).to(a.device)).double().cpu()
        group = a.gather(torch.cat([found.useful[:, None].float(), found.variance], 1).to(a.device)).double().cpu()
        r = each[each[:, 1] > 0, 0]
        line = {
            "total": float(each[:, 4].nanmean()),
            **{f"reward/{name}": float(each[:, 5 + k].nanmean()) for k, name in enumerate(self.judge.names)},
            "useful_groups": float(group[:, 0].mean()),
            "neutral_groups": int((group[:, 0] == 0).sum()),
            "unscored": int((each[:, 2] == 0).sum()),
            "nothing_found": float(each[:, 3].mean()),
            "r_sd": float(r.std()) if len(r) > 1 else 0.0,
            **{f"r_q{q}": float(r.quantile(q / 100)) if len(r) else 0.5 for q in (5, 95)},
        }
        share = group[:, 1:].sum(0) / group[:, 1:].sum().clamp(min=1e-30)
        return line | {f"share/{name}": float(share[k]) for k, name in enumerate(self.judge.names)}

    def update(self, rolled: Rollouts, r: Tensor, useful: Tensor, inner: int) -> dict[str, float]:
        """One optimiser step on the rollouts `useful` (indices); the others take no part and cost nothing."""
        s, a = self.settings, self.accelerator
        count = float(a.reduce(torch.tensor(float(len(useful)), device=a.device), "sum"))
        sums = torch.zeros(4, device=a.device)
        if count:
            pairs = count * s.times
            for part in torch.split(useful, s.micro_batch) if len(useful) else ():
                chosen = part.tolist()
                # One time and noise for all rollouts of a group (common random numbers): the advantages of a group add
                # up to 0, so what the noise does to all of them cancels, and the expected gradient stays what it is.
                chance = streams((s.seed, TRAINING, self.step, inner, rolled.keys[i][0]) for i in chosen)
                for _ in range(s.times):
                    found = self._loss(rolled, chosen, r[part], chance, inner)
                    a.backward(found.loss / pairs)
                    sums += torch.stack([term.detach() for term in found]) / pairs
            norm = self._apply()
            sums = a.reduce(sums, "sum")
        else:
            norm = 0.0
        loss, policy, kl, drift = (float(x) for x in sums)
        return {"loss": loss, "policy": policy, "kl": kl, "drift_old": drift, "gradient": norm}

    def _loss(self, rolled: Rollouts, chosen: list[int], r: Tensor, chance: list[torch.Generator], inner: int) -> Loss:
        s, device = self.settings, self.accelerator.device
        x1, compounds = rolled.image[chosen], [rolled.compounds[i] for i in chosen]
        t = torch.cat([torch.rand(1, generator=one) for one in chance]).to(device)
        if s.coupling == "rollout":
            source = rolled.source[chosen]
        elif s.coupling == "fresh":
            source = self.trained.source(rolled.control[chosen], chance)
        else:
            keys = [(s.seed, NEIGHBOUR, self.step, inner, rolled.keys[i][0]) for i in chosen]
            other = [self.pool.neighbour(rolled.rows[i], key) for i, key in zip(chosen, keys, strict=True)]
            source = self.trained.source(to_range(self.pool.controls[other].to(device), self.trained), chance)
        x = torch.lerp(source, x1, t.view(-1, 1, 1, 1))
        with self.accelerator.autocast():
            with torch.no_grad():
                v_old, v_base = (p.velocity(x, t, compounds).float() for p in (self.old, self.base))
            v = self.trained.velocity(x, t, compounds).float()
        return nft_loss(
            v, v_old, v_base, x1 - source, t, r, mix_beta=s.mix_beta, kl_weight=s.kl_weight,
            clip_advantage=s.clip_advantage, form=s.loss,
        )  # fmt: skip

    def _apply(self) -> float:
        """Add up the gradients of all processes, step, and average the weights; returns the norm before the clip."""
        a = self.accelerator
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if a.num_processes > 1:
            # Not DistributedDataParallel: processes differ in their useful rollouts, and so in backward passes.
            grads = [p.grad for p in self.parameters if p.grad is not None]
            flat = a.reduce(torch.cat([g.flatten() for g in grads]), "sum")
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
        norm = float(a.clip_grad_norm_(self.parameters, self.settings.clip_gradient))
        if not norm < float("inf") and a.scaler is None:
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient is {norm}; the run is kept as it was last saved. Start again with "
                "a lower learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        blend(self.average.net, self.trained.net, min(self.settings.ema, (1 + self.updates) / (10 + self.updates)))
        return norm
