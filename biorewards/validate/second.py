"""Second judges, which share nothing with the verifiers on trial: another segmenter, another classifier, other images.

The classical segmenter has no weights; the second classifier is a linear one of pixel statistics. Both learn what is
normal from one part of the real images, whole plates where there are several, and judge the other part.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from biorewards.assay import Assay
from biorewards.fitting import measure_images, reference_statistics
from biorewards.segmentation import load_segmenter
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.plain import PlainClassifier, appearance, discriminant

#: Real images of a class that the second classifier wants at least.
LEAST = 4


def halves(bench: Bench) -> tuple[Rows, Rows]:
    """Row numbers of two parts of the real images: by plate, else by well, else by image, classes on both sides.

    The first is what second judges and positive controls are fitted to, the second what is judged. The coarsest unit
    is taken at which both parts hold two images of every class; alternate images of each class at last.
    """
    rng = bench.rng("halves")
    table = bench.rows
    known = len(table) > 0 and table.plate.nunique() > 1, table.well.nunique() > 1
    for unit, there in zip((table.plate, table.plate + "\0" + table.well), known, strict=True):
        if not there:
            continue
        odd = {name: place % 2 for place, name in enumerate(rng.permutation(sorted(unit.unique())))}
        side = unit.map(odd).to_numpy()
        counts = [np.bincount(bench.target[side == k], minlength=len(bench.assay.classes)) for k in (0, 1)]
        present = np.unique(bench.target)
        if min(count[present].min() for count in counts) >= 2:
            return np.flatnonzero(side == 0), np.flatnonzero(side == 1)
    order = np.lexsort((rng.random(len(bench)), bench.target))
    return np.sort(order[::2]), np.sort(order[1::2])


def second_judge(bench: Bench) -> Bench:
    """The same real images before the second judges; made once a bench.

    Its assay holds the classical segmenter, statistics of the first half as that one sees them, and a linear
    classifier of pixel statistics fitted to the first half. Its rewards are the seven. Without a classifier in the
    bench's assay there is none here either: then the two answer the same questions.
    """
    made: Bench = bench.once("second judge", lambda: bench.judged_by(_second_assay(bench, halves(bench)[0])))
    return made


def _second_assay(bench: Bench, rows: Rows) -> Assay:
    assay = bench.assay.with_segmenter(load_segmenter("classical"))
    images, labels = bench.images(rows), np.array(assay.classes)[bench.target[rows]]
    statistics = reference_statistics(measure_images(assay, images, lambda *_: None), labels, assay.classes)
    classifier = None if assay.classifier is None else fit_plain(bench, rows, bench.target[rows])
    digest = hashlib.sha256(
        f"{assay.fingerprint} {statistics.to_csv()} {getattr(classifier, 'fingerprint', '')}".encode()
    )
    return replace(assay, statistics=statistics, classifier=classifier, fingerprint=digest.hexdigest()[:16])


def fit_plain(bench: Bench, rows: Rows, target: npt.NDArray[np.int64]) -> PlainClassifier | None:
    """A linear classifier of pixel statistics for the classes with enough images; None for fewer than two."""
    there, counts = np.unique(target, return_counts=True)
    kept = there[counts >= LEAST]
    if len(kept) < 2:
        return None
    inside = np.isin(target, kept)
    images = torch.cat([bench.assay.normalised(bench.images(part)) for part in np.array_split(rows[inside], 8)])
    place = np.searchsorted(kept, target[inside])
    return PlainClassifier(appearance, discriminant(), images, place, [bench.assay.classes[k] for k in kept])
