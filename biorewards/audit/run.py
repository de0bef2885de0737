"""From folders to an audit: part the real images, score and encode every sample once, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biorewards import __version__
from biorewards.assay import Assay
from biorewards.audit.columns import Yardstick
from biorewards.audit.conditions import match
from biorewards.audit.encoder import Encoder
from biorewards.audit.models import Audit, audit
from biorewards.audit.opinion import NoOpinion, Opinion
from biorewards.audit.opinion_classifier import by_classifier
from biorewards.audit.opinion_profiles import MISSING, available, by_profiles
from biorewards.audit.opinion_segmenter import by_segmenter
from biorewards.audit.samples import (
    CONTROL,
    MOST_REAL,
    REAL,
    REFERENCE,
    Progress,
    Sample,
    Scorer,
    controls_of,
    copy_controls,
    split_real,
    subset,
    thin,
)
from biorewards.io.manifest import Manifest, ManifestError
from biorewards.io.reading import Reader
from biorewards.io.targets import assign_targets
from biorewards.reward import Suite

#: Names that models cannot have.
RESERVED = (REAL, CONTROL, REFERENCE)


@dataclass(frozen=True)
class Audited:
    """audit: the numbers. samples: real, copy-control and models, by name. about: what was done, for the JSON.

    opinions: what independent judges say, where they were asked.
    """

    audit: Audit
    samples: dict[str, Sample]
    about: dict[str, Any]
    opinions: tuple[Opinion, ...] = ()


def audit_folders(
    assay: Assay,
    suite: Suite,
    real: Manifest,
    models: dict[str, Manifest],
    *,
    controls: Manifest | None = None,
    folder: Path,
    plan: Callable[[Manifest], Reader],
    ask_second: bool = False,
    batch_size: int = 16,
    workers: int = 4,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Audited:
    """Audit models against real images.

    real: labelled real images, treated and (unless `controls`) untreated. models: name -> its images, labelled with
    what they were asked to show. folder: for finished work; a second run with it goes on where the first stopped.
    plan: manifest -> how its files are read. ask_second: also ask independent judges (`biorewards.audit.opinion`).

    Raises ManifestError or ValueError where there is nothing to compare: no controls, too few real images, no labels
    in common.
    """
    if taken := sorted(set(models) & set(RESERVED)):
        raise ValueError(f"a model cannot be called {taken[0]}: that row is always there")
    score = Scorer(assay, suite, Encoder(assay), folder, plan, batch_size, workers, device, progress)
    reference_rows, held_rows, how = split_real(real, assay, seed)
    label = assign_targets(real.table, assay.classes, assay.compounds).target
    held = subset(real, thin(label, held_rows, MOST_REAL, seed))
    pool = real if controls is None else controls
    untreated = np.arange(len(pool)) if controls is not None else controls_of(real, assay)
    if controls is None:
        # Of the held-out plates where they have any: copies of training images are another question.
        untreated = own if len(own := np.intersect1d(untreated, held_rows)) > 1 else untreated
    if len(untreated) < 2:
        raise ManifestError(
            f"{real.root}: no control images (STATE control, or labelled {assay.classes[0]}); name their folder with "
            "--control"
        )
    samples = {
        REAL: score(REAL, "real", held),
        CONTROL: score(CONTROL, "control", copy_controls(held, pool, untreated, assay, seed)),
        **{name: score(name, "model", manifest) for name, manifest in models.items()},
    }
    reference = score(REFERENCE, "reference", subset(real, reference_rows))
    everything = {**samples, REFERENCE: reference}
    conditions = match(everything, weigh_by=REAL)
    yard = Yardstick.build(assay, suite, conditions, everything, reference, score.encoder.standardise, seed)
    if progress is not None:
        progress("comparing", 0, 1)
    found = audit(samples, yard, seed=seed)
    if progress is not None:
        progress("comparing", 1, 1)
    opinions: list[Opinion] = []
    silent = [] if available() or not ask_second else [MISSING]
    if ask_second:
        judges: list[Callable[[], Opinion]] = [
            lambda: by_segmenter(score, samples, reference, yard, found),
            lambda: by_classifier(score, samples, real, (reference_rows, held_rows), yard, found),
        ]
        if available():
            judges.append(lambda: by_profiles(score, samples, reference, yard, found))
        for judge in judges:
            try:
                opinions.append(judge())
            except NoOpinion as why:
                silent.append(str(why))
    notes = {name: list(sample.notes) for name, sample in everything.items()}
    for name, number in conditions.number.items():
        if alone := int((number[everything[name].readable] < 0).sum()):
            notes[name].append(f"{alone} of {len(number)} images have no counterpart in every other row: not compared")
    notes["second opinion"] = silent
    about = {
        "biorewards": __version__,
        "assay": assay.name,
        "suite": suite.fingerprint,
        "features": score.encoder.what,
        "real": {"parted": how, "reference": len(reference_rows), "held_out": len(held)},
        "weights": suite.weights,
        "seed": seed,
        "notes": {name: texts for name, texts in notes.items() if texts},
    }
    return Audited(found, samples, about, tuple(opinions))
