"""A reward for a population instead of a point: images are paid for making generated measures as spread as real ones.

-z^2 pays for collapse: real images average -1, a generator stuck on the mean gets 0. Here the reward of a set of images
is minus the energy distance (Szekely and Rizzo 2013) of each measure to that of real images of the class,

    D = 2 E|x - y| - E|x - x'| - E|y - y'|,   x, x' generated, y, y' real,

which is 0 for the real distribution and above it for every other. The credit of one image is its part in it: minus half
the first-order change of D when mass is moved to it, with x' the other images (leave-one-out, so no image vouches for
itself):

    credit(x) = mean over the others |x - x'| - mean over real |x - y|.

Where the generated distribution is the real one the credit of every image is 0 on average and nothing is left to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from biorewards.assay import COUNT_FLOOR, MIN_IMAGES, RELATIVE_FLOOR
from biorewards.rewards.reference import Z_LIMIT
from rl.policy import digest_of, digest_tensors

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from rl.rewards import Judged

#: Points that stand for a distribution of which only quantiles are known.
POINTS = 101
_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Credit of an image without an object to measure: below what any measured image can get (-2 Z_LIMIT).
NOTHING = -2.5 * Z_LIMIT


@dataclass(frozen=True)
class Population:
    """Real measures by class. names: R rewards in the suite's order. samples: class -> (n, R), NaN columns where
    nothing is known (those rewards keep their own value). mean, sd: class -> (R,), what measures are standardised by.
    origin: for the run's record."""

    names: list[str]
    samples: dict[int, Tensor]
    mean: dict[int, Tensor]
    sd: dict[int, Tensor]
    origin: str

    @property
    def fingerprint(self) -> str:
        """Hash of the real measures."""
        return digest_of(self.origin, *self.names, digest_tensors(self.samples.values()))

    @classmethod
    def from_real(cls, names: list[str], judged: Judged, target: Tensor, classes: list[str]) -> Population:
        """All rewards of the suite, from real images scored by it. Raises ValueError for a class with fewer than 20."""
        samples = {}
        for k in sorted(set(target.tolist())):
            chosen = judged.measure[(target == k) & ~judged.nothing]
            if len(chosen) < MIN_IMAGES:
                raise ValueError(
                    f"class {classes[k]!r} has {len(chosen)} real images with nucleus and cell; the distribution "
                    f"preset wants {MIN_IMAGES} of each class: add images, or take --preset paper"
                )
            samples[int(k)] = chosen
        return cls._standardised(names, samples, f"{len(target)} real images")

    @classmethod
    def from_assay(cls, names: list[str], assay: Assay) -> Population:
        """The measures of the assay's statistics, from their quantiles; other rewards (moa) keep their own value, so
        real images are optimal in the measures only."""
        table = assay.statistics.set_index(["class", "measure"])
        samples = {}
        for k, name in enumerate(assay.classes):
            columns = [_points(table, name, measure) for measure in names]
            if k and any(bool(torch.isfinite(column).any()) for column in columns):
                samples[k] = torch.stack(columns, 1)
        return cls._standardised(names, samples, f"quantiles of assay {assay.name}")

    @classmethod
    def _standardised(cls, names: list[str], samples: dict[int, Tensor], origin: str) -> Population:
        mean = {k: x.mean(0) for k, x in samples.items()}
        sd = {k: torch.maximum(x.std(0), _floor(names, mean[k])) for k, x in samples.items()}
        return cls(names, {k: _z(x, mean[k], sd[k]) for k, x in samples.items()}, mean, sd, origin)

    def credit(self, value: Tensor, measure: Tensor, nothing: Tensor, target: Tensor) -> Tensor:
        """(N, R) credit in standard deviations of the real images; higher is better.

        value, measure: (N, R) of the images of one step; nothing: (N,) bool, no object; target: (N,) class.
        Images of a class are set against the others of that class, whatever group they are from. Columns without real
        measures keep `value`; an image alone in its class is judged against real ones only.
        """
        out = value.clone()
        for k in sorted(set(target.tolist())):
            if k not in self.samples:
                continue
            rows = torch.nonzero(target == k)[:, 0]
            x, here = _z(measure[rows], self.mean[k], self.sd[k]), ~nothing[rows]
            found = witness(x, here, self.samples[k])
            known = torch.isfinite(self.samples[k]).all(0)
            out[rows] = torch.where(known & torch.isfinite(value[rows]), found, value[rows])
        return out


def witness(x: Tensor, here: Tensor, y: Tensor) -> Tensor:
    """Credit (N, R) of standardised measures x (N, R), `here` (N,) where there is one, against real ones y (M, R)."""
    to_real = (x[:, None] - y[None]).abs().mean(1)
    weight = here.to(x.dtype)
    others = (here.sum() - weight).clamp(min=1)[:, None]
    clean = torch.where(here[:, None], x, 0.0)
    # Each to itself is at distance 0: leaving it out of the count is leaving it out.
    to_others = ((clean[:, None] - clean[None]).abs() * weight[None, :, None]).sum(1) / others
    return torch.where(here[:, None], to_others - to_real, torch.full_like(x, NOTHING))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """(R,) unbiased estimate of D for each measure, from (N, R) and (M, R); N, M > 1. Below 0 by chance where equal."""
    n, m = len(x), len(y)
    within = (x[:, None] - x[None]).abs().sum((0, 1)) / (n * (n - 1))
    real = (y[:, None] - y[None]).abs().sum((0, 1)) / (m * (m - 1))
    return 2 * (x[:, None] - y[None]).abs().mean((0, 1)) - within - real


def _z(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    return ((x - mean) / sd).clamp(-Z_LIMIT, Z_LIMIT)


def _floor(names: list[str], mean: Tensor) -> Tensor:
    """The assay's floors of a standard deviation; two hundredths for shares and probabilities, whose mean may be 0."""
    floors = []
    for name, m in zip(names, mean.tolist(), strict=True):
        share = name in ("moa", "nucleus_in_cytoplasm")
        floors.append(COUNT_FLOOR if name.endswith("_count") else RELATIVE_FLOOR * (1.0 if share else abs(m)))
    return torch.tensor(floors)


def _points(table: object, name: str, measure: str) -> Tensor:
    """(POINTS,) of equal weight with the quantiles of a class's measure; NaN where there are no statistics."""
    if (name, measure) not in table.index:  # type: ignore[attr-defined]
        return torch.full((POINTS,), torch.nan)
    row = table.loc[(name, measure)]  # type: ignore[attr-defined]
    q = [float(row[f"q{round(100 * level):02d}"]) for level in _LEVELS]
    levels = [0.0, *_LEVELS, 1.0]
    # The tails are as steep as the outer quarters; the worst twentieth on either side is not known better.
    values = [q[0] - (q[1] - q[0]) / 4, *q, q[-1] + (q[-1] - q[-2]) / 4]
    points = np.interp((np.arange(POINTS) + 0.5) / POINTS, levels, values)
    if measure.endswith("_count"):
        points = np.round(points)
    return torch.from_numpy(points).float()
