"""What a policy is worth on held-out controls: the rewards, and what was never rewarded."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.scoring_summary import bootstrap
from rl.policy import FlowPolicy, Sampler, flow, streams, to_range, to_unit
from rl.sentinels import Yardstick, class_entropy, dark, diversity

if TYPE_CHECKING:
    from rl.pool import Data, Pool
    from rl.rewards import Judge, Judged

#: Images of one control and compound, which is what diversity within a group takes.
TWINS = 2
EVALUATION = 4

Line = dict[str, Any]
Rows = npt.NDArray[np.int64]


class Drawn(NamedTuple):
    """Images (N, C, H, W) in [0, 1], CPU, with their control, compound index, class and group. scores: (N, K) of
    `Evaluation.columns`, once judged."""

    images: Tensor
    control: Rows
    compound: Rows
    target: Tensor
    group: Rows
    scores: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """Draws and judges the same images (controls, compounds, noise) at every call.

    held_out: further judges that nothing is trained on, by name. count: images, at least two a compound. autocast: what
    images are drawn in; they are judged as always.
    """

    data: Data
    judge: Judge
    seed: int
    steps: int
    count: int = 96
    batch: int = 64
    held_out: dict[str, Judge] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @cached_property
    def yardstick(self) -> Yardstick:
        """What real images of the training plates are like."""
        real = self.data.real
        judged = self.judge(real.images, real.target) if len(real.images) else None
        return Yardstick.of(self.judge.assay, self.judge.names, real, judged)

    def _plan(self) -> tuple[Rows, Rows, Rows]:
        """Compound, group and control of every image."""
        pool = self.data.test
        each = max(1, math.ceil(self.count / TWINS / len(pool.compounds)))
        compound = np.repeat(np.arange(len(pool.compounds)), each * TWINS)
        group = np.arange(len(compound)) // TWINS
        return compound, group, group % len(pool.controls)

    @torch.no_grad()
    def draw(self, policy: FlowPolicy, device: torch.device) -> Drawn:
        """The evaluation images of a policy."""
        pool: Pool = self.data.test
        compound, group, control = self._plan()
        images = []
        for start in range(0, len(compound), self.batch):
            part = np.arange(start, min(start + self.batch, len(compound)))
            x = to_range(pool.controls[control[part]].to(device), policy)
            source = policy.source(x, streams((self.seed, EVALUATION, int(i)) for i in part))
            names = [pool.compounds[k] for k in compound[part]]
            with self.autocast():
                images.append(to_unit(flow(policy, source, names, self.steps), policy).cpu())
        return Drawn(torch.cat(images), control, compound, torch.from_numpy(pool.targets[compound]), group)

    def __call__(self, policy: FlowPolicy, device: torch.device) -> tuple[Line, Drawn]:
        """Means over the images, sentinels, and the images themselves."""
        drawn = self.draw(policy, device)
        judged = self.judge(drawn.images.to(device), drawn.target)
        line, others = self._judged(drawn.images, drawn.target, judged, device)
        drawn = drawn._replace(scores=torch.cat([judged.value, self.judge.total(judged.value)[:, None], others], 1))
        line["diversity"] = diversity(drawn.images, drawn.group)
        if self.data.unseen:
            unseen = torch.tensor([self.data.test.compounds[k] in self.data.unseen for k in drawn.compound])
            total = self.judge.total(judged.value)
            line |= {"total_trained": _mean(total[~unseen]), "total_unseen": _mean(total[unseen])}
        return line, drawn

    def own(self, sampler: Sampler, device: torch.device) -> Line:
        """The base as it samples by itself, with its own solver and guidance, on the same controls and compounds."""
        pool, parts = self.data.test, []
        compound, group, control = self._plan()
        for start in range(0, len(compound), self.batch):
            part = np.arange(start, min(start + self.batch, len(compound)))
            names = [pool.compounds[k] for k in compound[part]]
            chance = streams((self.seed, EVALUATION, int(i)) for i in part)
            with self.autocast():
                parts.append(sampler.sample(pool.controls[control[part]].to(device), names, generator=chance).cpu())
        images, target = torch.cat(parts), torch.from_numpy(pool.targets[compound])
        line, _ = self._judged(images, target, self.judge(images.to(device), target), device)
        return line | {"diversity": diversity(images, group)}

    def real(self, device: torch.device) -> Line:
        """The same figures for real images of the held-out plates, {} without any: what "as good as real" means."""
        images, target = self.data.real_test
        if not len(images):
            return {}
        # As many as are drawn, since the distance depends on the number.
        chosen = np.random.default_rng(self.seed).permutation(len(images))[: self.count]
        images, target = images[chosen], target[chosen]
        return self._judged(images, target, self.judge(images.to(device), target), device)[0]

    @property
    def columns(self) -> list[str]:
        """Names of `Drawn.scores`, as in a line."""
        return [*(f"reward/{name}" for name in self.judge.names), "total", *(f"held_out/{n}" for n in self.held_out)]

    def gains(self, now: Drawn, base: Drawn) -> Line:
        """What the same sources score more than they did with the base: gain/NAME, gain_low/NAME, gain_high/NAME, the
        mean and its 95 % bootstrap interval over controls. Images are paired, so what they have in common cancels."""
        if now.scores is None or base.scores is None:
            return {}
        paired = (now.scores - base.scores).double().numpy()
        each = np.stack([np.nanmean(paired[now.control == c], 0) for c in np.unique(now.control)])
        low, high = bootstrap(each, self.seed)
        return {
            f"{kind}/{name}": float(value[k])
            for kind, value in (("gain", np.nanmean(each, 0)), ("gain_low", low), ("gain_high", high))
            for k, name in enumerate(self.columns)
        }

    def _judged(self, images: Tensor, target: Tensor, judged: Judged, device: torch.device) -> tuple[Line, Tensor]:
        """The figures, and the totals (N, judges) of the judges held out."""
        names, mark = self.judge.names, self.yardstick
        line: Line = {
            "images": len(images),
            "total": _mean(self.judge.total(judged.value)),
            **{f"reward/{name}": _mean(judged.value[:, k]) for k, name in enumerate(names)},
            **{f"spread/{name}": value for name, value in mark.spread_ratios(judged, target).items()},
            "distance": mark.distance(images),
            "dark": dark(self.judge.assay, images),
            "nothing_found": float(judged.nothing.float().mean()),
            "class_entropy": class_entropy(judged.probabilities),
        }
        others = [other.total(other(images.to(device), target).value) for other in self.held_out.values()]
        line |= {f"held_out/{name}": _mean(total) for name, total in zip(self.held_out, others, strict=True)}
        return line, torch.stack(others, 1) if others else torch.zeros(len(images), 0)


def gained(line: Line, key: str) -> str:
    """The paired gain of a figure and its interval in words, "" where it has none."""
    if f"gain/{key}" not in line:
        return ""
    return f"{line[f'gain/{key}']:+.2f} [{line[f'gain_low/{key}']:+.2f}, {line[f'gain_high/{key}']:+.2f}]"


def _mean(value: Tensor) -> float:
    """Mean of the scored ones; NaN where there is none."""
    return float(value.double().nanmean())


def alarms(line: Line, first: Line, real: Line) -> list[str]:
    """What got worse since `first` (the base) among the figures that are not rewarded, one sentence each."""
    found = []
    for name, value in line.items():
        if name.startswith("spread/") and value < 0.5 and value < 0.8 * first.get(name, math.nan):
            found.append(f"{name.removeprefix('spread/')} has {value:.2f} of the spread of real images: it collapses")
    limit = 1.5 * max(first["distance"], real.get("distance", 0.0))
    if line["distance"] > limit:
        found.append(f"the distance to real images rose from {first['distance']:.3g} to {line['distance']:.3g}")
    if line["class_entropy"] < 0.5 * first["class_entropy"]:
        found.append(f"the classes that are seen grow fewer (entropy {line['class_entropy']:.2f} nats): lock-in")
    if line["diversity"] < 0.5 * first["diversity"]:
        found.append(
            f"images of one group grow alike (diversity {line['diversity']:.3g}, base {first['diversity']:.3g})"
        )
    if line["nothing_found"] > first["nothing_found"] + 0.1:
        found.append(f"{100 * line['nothing_found']:.0f} % of the images hold no nucleus or cell")
    fell = [k for k in line if k.startswith("held_out/") and line[k] < first[k] - 0.25 * abs(first[k])]
    found += [f"{k.removeprefix('held_out/')} fell from {first[k]:.3g} to {line[k]:.3g}" for k in fell]
    return found
