"""Independent opinions: the same images judged by what shares nothing with the first verifiers.

Three are asked: the classical segmenter (`opinion_segmenter`), a MoA classifier of another architecture, seed and other
plates (`opinion_classifier`), and CellProfiler's features with retrieval among real images (`opinion_profiles`). What
matters is not that the numbers agree, but whether the order of the models does. Each judges the same part of every
sample, in equal numbers of each condition, with bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from biorewards.audit.bootstrap import bounded, differs, pooled, resample, seed_of
from biorewards.audit.columns import Yardstick
from biorewards.audit.models import Audit, Place, rank
from biorewards.audit.samples import REAL, Sample
from biorewards.reward import Suite

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
#: sample -> quantity -> (B + 1,)
Draws = dict[str, dict[str, Floats]]
#: Quantities that are distances from real images already.
DISTANCES = ("gap",)


class NoOpinion(ValueError):
    """These images do not let a judge answer; the text says what is missing."""


class Change(NamedTuple):
    """A pair of models in whose order the two opinions differ, by nearness to real images in one quantity.

    reward: the opinion's quantity ("gap": all rewards). against: the first verifiers' quantity that it is held against.
    first, second: 1 when `a` is closer to real images, -1 when `b` is, 0 when the interval does not say.
    """

    reward: str
    against: str
    a: str
    b: str
    first: int
    second: int

    @property
    def reversed(self) -> bool:
        """Both settle the order, the other way round."""
        return self.first != 0 and self.first == -self.second


@dataclass(frozen=True)
class Opinion:
    """One opinion.

    name: what gave it. about: what a reader must know of it. ranks_by: the quantity behind `places`. n: images of a
    sample. draws: sample -> quantity -> (B + 1,).
    """

    name: str
    about: list[str]
    ranks_by: str
    n: dict[str, int]
    draws: Draws
    places: dict[str, Place]
    changes: list[Change]

    def document(self) -> dict[str, Any]:
        """The opinion for JSON."""
        return {
            "name": self.name,
            "about": self.about,
            "ranks_by": self.ranks_by,
            "rows": {
                name: {
                    "n": self.n[name],
                    "rank": None if (place := self.places.get(name)) is None or place.best is None
                    else [place.best, place.worst],
                    "metrics": {k: _three(v) for k, v in draws.items()},
                }
                for name, draws in self.draws.items()
            },
            "changes": [change._asdict() | {"reversed": change.reversed} for change in self.changes],
        }  # fmt: skip


def _three(draws: Floats) -> dict[str, Any]:
    low, high = bounded(draws)
    value = [float(x) if np.isfinite(x) else None for x in (draws[0], low, high)]
    return {"value": value[0], "ci": value[1:]}


def asked(yard: Yardstick, name: str, most: int) -> Rows:
    """Rows of a sample for an opinion: about `most`, the same number of a condition in every sample, two at least."""
    share = min(1.0, most / max(1, int(yard.each.sum())))
    each = np.maximum(2, np.floor(yard.each * share)).astype(np.int64)
    return np.flatnonzero(yard.some(name, np.minimum(each, yard.each)))


def means(yard: Yardstick, sample: Sample, rows: Rows, values: dict[str, Floats]) -> dict[str, Floats]:
    """Quantities of `rows`, (n,) each, to (B + 1,) means over the conditions in the proportions of real images."""
    number = yard.conditions.number[sample.name][rows]
    files = sample.scores["Metadata_File"].iloc[rows].tolist()
    sums = resample(
        np.stack(list(values.values()), 1), number, len(yard.conditions.names), seed=seed_of(yard.seed, files)
    )
    mean = pooled(sums, yard.conditions.share)
    return {name: mean[:, place] for place, name in enumerate(values)}


def add_gaps(draws: Draws, suite: Suite) -> None:
    """Put the weighted distance of all rewards from real images into every row, as `models.gap` does."""
    for own in draws.values():
        apart = {k: np.abs(own[k] - draws[REAL][k]) for k in suite.rewards}
        length = len(next(iter(own.values())))
        own["gap"] = sum((suite.weights[k] * np.nan_to_num(v) for k, v in apart.items()), np.zeros(length))


def held_against(
    name: str, about: list[str], n: dict[str, int], draws: Draws, first: Audit, pairs: Sequence[tuple[str, str]]
) -> Opinion:
    """An opinion from its numbers. pairs: (its quantity, the first verifiers'), the one that it ranks by first."""
    ranks_by = pairs[0][0]
    distance = {k: _distance(draws, ranks_by, k) for k in draws}
    places, _ = rank({k: v for k, v in distance.items() if k in first.flags}, first.flags)
    models = [k for k, place in places.items() if place.best is not None]
    ours = {k: row.draws for k, row in first.rows.items()}
    changes = []
    for own, theirs in pairs:
        for a, b in combinations(models, 2):
            says = [_closer(ours, theirs, a, b), _closer(draws, own, a, b)]
            if says[0] != says[1]:
                changes.append(Change(own, theirs, a, b, says[0], says[1]))
    return Opinion(name, about, ranks_by, n, draws, places, changes)


def _distance(draws: Draws, name: str, row: str) -> Floats:
    own = draws[row][name]
    return own if name in DISTANCES else np.asarray(np.abs(own - draws[REAL][name]))


def _closer(draws: Draws, name: str, a: str, b: str) -> int:
    return -differs(_distance(draws, name, a) - _distance(draws, name, b))
