"""The opinion of another segmenter: the same rewards, with statistics of reference images as that one sees them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from biorewards.assay import Assay
from biorewards.audit.columns import Yardstick
from biorewards.audit.encoder import Encoder
from biorewards.audit.models import Audit
from biorewards.audit.opinion import Draws, Opinion, add_gaps, asked, held_against, means
from biorewards.audit.samples import Sample, Scorer, subset, thin
from biorewards.fitting import reference_statistics
from biorewards.reward import Suite
from biorewards.rewards import MEASURES
from biorewards.segmentation import load_segmenter

#: Images of a sample, and of the reference, that the second segmenter is asked about: it takes them one by one.
ASKED, MEASURED = 800, 1_500


def by_segmenter(
    scorer: Scorer,
    samples: dict[str, Sample],
    reference: Sample,
    yard: Yardstick,
    first: Audit,
    name: str = "classical",
) -> Opinion:
    """Judge a part of every sample through segmenter `name`."""
    assay = _through(scorer, reference, name, yard.seed)
    suite = Suite(list(scorer.suite.rewards.values()), scorer.suite.weights, assay.fingerprint)
    second = replace(scorer, assay=assay, suite=suite, encoder=Encoder(assay))
    draws: Draws = {}
    n = {}
    for sample in samples.values():
        rows = asked(yard, sample.name, ASKED)
        judged = second(f"{name}-{sample.name}", sample.kind, subset(sample.manifest, rows))
        values = {k: judged.scores[f"Reward_{k}"].to_numpy(np.float64) for k in suite.rewards}
        draws[sample.name], n[sample.name] = means(yard, sample, rows, values), len(rows)
    add_gaps(draws, suite)
    about = [
        f"All rewards through the {name} segmenter, against statistics of its own from up to {MEASURED} reference "
        "images that it measured itself."
    ]
    pairs = [(k, k) for k in ("gap", *suite.rewards)]
    return held_against(f"{name} segmenter", about, n, draws, first, pairs)


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
