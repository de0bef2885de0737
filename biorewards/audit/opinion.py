"""A second opinion: the same images judged through a segmenter that shares nothing with the first.

The classical segmenter has no weights. It measures reference images first, so that its z compare like with like, then a
part of every sample. What matters is not that the numbers agree, but whether the order of the models does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from biorewards.assay import Assay
from biorewards.audit.bootstrap import bounded, differs, pooled, resample, seed_of
from biorewards.audit.columns import Yardstick
from biorewards.audit.encoder import Encoder
from biorewards.audit.models import Audit, Flag, Place, rank
from biorewards.audit.samples import REAL, Sample, Scorer, subset, thin
from biorewards.fitting import reference_statistics
from biorewards.reward import Suite
from biorewards.rewards import MEASURES
from biorewards.segmentation import load_segmenter

Floats = npt.NDArray[np.float64]
#: Images of a sample, and of the reference, that the second segmenter is asked about: it takes them one by one.
ASKED, MEASURED = 800, 1_500


class Change(NamedTuple):
    """A pair of models in whose order the two opinions differ, by the gap of one reward or of all ("gap").

    first, second: 1 when `a` is closer to real images, -1 when `b` is, 0 when the interval does not say.
    """

    reward: str
    a: str
    b: str
    first: int
    second: int


@dataclass(frozen=True)
class Opinion:
    """What another segmenter says. n: images a sample. draws: sample -> reward and "gap" -> (B + 1,)."""

    name: str
    n: dict[str, int]
    draws: dict[str, dict[str, Floats]]
    places: dict[str, Place]
    changes: list[Change]

    def document(self) -> dict[str, Any]:
        """The opinion for JSON."""
        return {
            "segmenter": self.name,
            "rows": {
                name: {
                    "n": self.n[name],
                    "rank": None if self.places.get(name) is None or self.places[name].best is None
                    else [self.places[name].best, self.places[name].worst],
                    "metrics": {k: {"value": float(v[0]), "ci": list(bounded(v))} for k, v in draws.items()},
                }
                for name, draws in self.draws.items()
            },
            "changes": [change._asdict() for change in self.changes],
        }  # fmt: skip


def second_opinion(
    scorer: Scorer,
    samples: dict[str, Sample],
    reference: Sample,
    yard: Yardstick,
    first: Audit,
    name: str = "classical",
) -> Opinion:
    """Judge a part of every sample through segmenter `name` and compare the order of the models with the first's."""
    assay = _through(scorer, reference, name, yard.seed)
    suite = Suite(list(scorer.suite.rewards.values()), scorer.suite.weights, assay.fingerprint)
    second = replace(scorer, assay=assay, suite=suite, encoder=Encoder(assay))
    size = int(yard.each.sum())
    most = np.maximum(2, np.floor(yard.each * min(1.0, ASKED / max(1, size)))).astype(np.int64)
    draws: dict[str, dict[str, Floats]] = {}
    asked: dict[str, int] = {}
    for sample in samples.values():
        rows = np.flatnonzero(yard.some(sample.name, np.minimum(most, yard.each)))
        judged = second(f"{name}-{sample.name}", sample.kind, subset(sample.manifest, rows))
        number = yard.conditions.number[sample.name][rows]
        values = judged.scores[[f"Reward_{k}" for k in suite.rewards]].to_numpy(np.float64)
        files = judged.scores["Metadata_File"].tolist()
        sums = resample(values, number, len(yard.conditions.names), seed=seed_of(yard.seed, files))
        mean = pooled(sums, yard.conditions.share)
        draws[sample.name] = {k: mean[:, place] for place, k in enumerate(suite.rewards)}
        asked[sample.name] = len(rows)
    for own in draws.values():
        apart = {k: np.abs(own[k] - draws[REAL][k]) for k in suite.rewards}
        own["gap"] = sum((suite.weights[k] * np.nan_to_num(v) for k, v in apart.items()), np.zeros(len(own["moa"])))
    flags: dict[str, list[Flag]] = first.flags
    places, _ = rank({k: v["gap"] for k, v in draws.items()}, flags)
    models = [k for k, place in places.items() if place.best is not None]
    changes = []
    for reward in ["gap", *suite.rewards]:
        for a, b in combinations(models, 2):
            says = [_closer(first_draws, reward, a, b) for first_draws in (_first(first), draws)]
            if says[0] != says[1]:
                changes.append(Change(reward, a, b, says[0], says[1]))
    return Opinion(name, asked, draws, places, changes)


def _first(first: Audit) -> dict[str, dict[str, Floats]]:
    return {name: row.draws for name, row in first.rows.items()}


def _closer(draws: dict[str, dict[str, Floats]], reward: str, a: str, b: str) -> int:
    real = 0.0 if reward == "gap" else draws[REAL][reward]
    return -differs(np.abs(draws[a][reward] - real) - np.abs(draws[b][reward] - real))


def _through(scorer: Scorer, reference: Sample, name: str, seed: int) -> Assay:
    """The assay with another segmenter, and statistics of reference images as that one sees them."""
    assay = scorer.assay.with_segmenter(load_segmenter(name))
    place = {label: k for k, label in enumerate(assay.classes)}
    label = np.array(reference.scores["Metadata_MoA"].map(place).fillna(-1), np.int64)
    rows = thin(label, np.arange(len(label))[label >= 0], MEASURED, seed)
    # The class of a row moves the values, not the measures that are wanted here.
    judge = Suite([r for k, r in scorer.suite.rewards.items() if k in MEASURES], None, assay.fingerprint)
    measured = replace(scorer, assay=assay, suite=judge, encoder=Encoder(assay))(
        f"{name}-measured", "measured", subset(reference.manifest, rows)
    )
    measures = measured.scores[[f"Measure_{k}" for k in judge.rewards]].astype(float)
    measures.columns = list(judge.rewards)
    statistics = reference_statistics(measures, measured.scores["Metadata_MoA"].to_numpy(), assay.classes)
    digest = hashlib.sha256((assay.fingerprint + statistics.to_csv()).encode()).hexdigest()[:16]
    return replace(assay, statistics=statistics, fingerprint=digest)
