"""The opinion of another MoA classifier: another architecture and seed, trained here on other plates.

It is trained on real images at the time of the audit and kept in the folder of finished work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import Assay
from biorewards.audit.bootstrap import bounded, differs
from biorewards.audit.columns import EMPTY, Yardstick
from biorewards.audit.encoder import Encoder
from biorewards.audit.models import Audit
from biorewards.audit.opinion import Draws, NoOpinion, Opinion, add_gaps, asked, held_against, means
from biorewards.audit.samples import CONTROL, REAL, Progress, Rows, Sample, Scorer, subset, thin
from biorewards.classifier import Backbone, Classifier, Recipe, calibrate, train
from biorewards.io.images import ImageError
from biorewards.io.manifest import Manifest
from biorewards.io.reading import Reader
from biorewards.io.tables import atomic
from biorewards.io.targets import assign_targets
from biorewards.reward import Suite
from biorewards.rewards.moa import MechanismOfAction

#: Images of a sample that are judged, and real images trained on.
ASKED, TRAINED = 800, 4_000
#: Other plates serve when they have this many images of every class; a class is learnt from as many anywhere.
LEAST = 20
#: Grouped convolutions (RegNet; Radosavovic et al. 2020) on crops of half the size: 500 a second in training, one core.
#: In 40 seconds it knew 56 % of phantom crops; at full size 42, a small MobileNet 48 and 44, a small ConvNeXt 42.
BACKBONE: Backbone = ("regnetx_002", {})
#: Pixels a side that crops are brought near to.
SIDE = 48
#: Crops shown in training: so many times each image, within these bounds.
TIMES, FEWEST, MOST = 12, 12_000, 24_000
SEED = 1789
FOLDER = "second-classifier"


class Coarse(Classifier):
    """A classifier that looks at means over blocks of pixels; see `coarse`."""

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D)."""
        return super().embed(coarse(images))


def coarse(images: Tensor) -> Tensor:
    """(B, C, H, W) as means over blocks, so that the shorter side comes near to `SIDE` and not below it."""
    size = max(1, min(images.shape[2:]) // SIDE)
    return images if size == 1 else F.avg_pool2d(images, size)


def by_classifier(
    scorer: Scorer,
    samples: dict[str, Sample],
    real: Manifest,
    parts: tuple[Rows, Rows],
    yard: Yardstick,
    first: Audit,
) -> Opinion:
    """Judge a part of every sample by the second classifier, and rank by the first's rewards with its `moa` for theirs.

    real, parts: all real images, and which of them are the reference and held out.
    """
    assay = scorer.assay
    rows, which = training_rows(real, assay, *parts)
    classifier = learnt(subset(real, rows), assay, scorer.plan, scorer.folder / FOLDER, scorer.progress)
    digest = hashlib.sha256((assay.fingerprint + classifier.fingerprint).encode()).hexdigest()[:16]
    changed = replace(assay, classifier=classifier, fingerprint=digest)
    changed.to(scorer.device)
    judge = Suite([MechanismOfAction()], None, digest)
    second = replace(scorer, assay=changed, suite=judge, encoder=Encoder(changed))
    draws: Draws = {}
    n = {}
    for sample in samples.values():
        chosen = asked(yard, sample.name, ASKED)
        judged = second(f"{FOLDER}-{sample.name}", sample.kind, subset(sample.manifest, chosen))
        theirs = sample.scores.iloc[chosen]
        values = {k: theirs[f"Reward_{k}"].to_numpy(np.float64) for k in scorer.suite.rewards}
        values |= {
            "moa": judged.scores["Reward_moa"].to_numpy(np.float64),
            "moa_accuracy": _correct(judged, classifier),
        }
        draws[sample.name], n[sample.name] = means(yard, sample, chosen, values), len(chosen)
    add_gaps(draws, scorer.suite)
    about = [
        f"A MoA classifier of its own ({classifier.settings['backbone']}, seed {SEED}), trained on "
        f"{classifier.settings['trained_on']} real images of {which}. The rank is by all rewards, with its probability "
        "in place of the first classifier's.",
        _known(draws, classifier.classes),
    ]
    pairs = [("gap", "gap"), ("moa", "moa"), ("moa_accuracy", "moa_accuracy")]
    return held_against("second classifier", about, n, draws, first, pairs)


def _known(draws: Draws, classes: list[str]) -> str:
    """How much its word is worth: what it knows of real images that it was not trained on."""
    real, copies = draws[REAL]["moa_accuracy"], draws[CONTROL]["moa_accuracy"]
    low, high = bounded(real)
    text = f"Of held-out real images it knows {real[0]:.0%} ({low:.0%} to {high:.0%}; {len(classes)} classes)"
    if differs(real - copies) > 0:
        return f"{text}, of copied controls {copies[0]:.0%}."
    return f"{text}, no more than of copied controls: it has learnt too little to have an opinion on MoA."


def _correct(judged: Sample, classifier: Classifier) -> npt.NDArray[np.float64]:
    place = {name: k for k, name in enumerate(classifier.classes)}
    truth = judged.scores["Metadata_MoA"].map(place).to_numpy(np.float64)
    top = np.nan_to_num(judged.encoded.probabilities).argmax(1)
    empty = judged.scores["Reason_moa"].isin(EMPTY).to_numpy()
    return np.where(np.isnan(truth), np.nan, (top == truth) & ~empty)


def training_rows(real: Manifest, assay: Assay, reference: Rows, held: Rows) -> tuple[Rows, str]:
    """Rows of real images to train on, and which plates they are of, in words.

    Plates that neither the held-out row nor, by their names, the assay's own training has, where those hold `LEAST`
    images of every class; else the reference.
    """
    label = assign_targets(real.table, assay.classes, assay.compounds).target
    plate = real.table["Metadata_Plate"].str.strip().to_numpy(str)
    theirs = [str(name) for name in assay.card.get("plates", {}).get("train", [])]
    free = (label >= 0) & (plate != "") & ~np.isin(plate, plate[held])
    wanted = np.unique(label[held][label[held] >= 0])
    other = free & ~np.isin(plate, theirs)
    if theirs and _enough(label[other], wanted):
        return np.flatnonzero(other), f"{len(set(plate[other]))} plates, none of them (by name) the assay's own"
    rows = reference[label[reference] >= 0]
    shared = set(plate[rows]) & set(plate[held])
    apart = "which the held-out images share" if shared else "none of them of the held-out images"
    known = "as the assay's own may be" if not theirs else "some of them (by name) the assay's own"
    return rows, f"the reference plates, {apart}, {known}: there are no others with {LEAST} images of every class"


def _enough(label: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> bool:
    return len(wanted) > 0 and min(int((label == k).sum()) for k in wanted) >= LEAST


def learnt(
    manifest: Manifest, assay: Assay, plan: Callable[[Manifest], Reader], folder: Path, progress: Progress | None
) -> Coarse:
    """The classifier of these images: trained, or as an earlier run with the same images and settings left it.

    Raises NoOpinion where fewer than two classes have `LEAST` images.
    """
    label = assign_targets(manifest.table, assay.classes, assay.compounds).target
    classes = [name for k, name in enumerate(assay.classes) if (label == k).sum() >= LEAST]
    if len(classes) < 2:
        raise NoOpinion(f"no second classifier: it needs {LEAST} real images of two classes or more to train on")
    kept = np.flatnonzero(np.isin(label, [assay.classes.index(name) for name in classes]))
    rows = thin(label, kept, TRAINED, SEED)
    recipe = Recipe(images_seen=int(np.clip(TIMES * len(rows), FEWEST, MOST)), seed=SEED)
    chosen = subset(manifest, rows)
    reader = plan(chosen)
    about = [str(chosen.files), str(label[rows].tolist()), str(reader.settings()), str(asdict(recipe)), str(BACKBONE),
             assay.fingerprint]  # fmt: skip
    key = hashlib.sha256("\0".join(about).encode("utf-8", "replace")).hexdigest()
    path = folder / "classifier.safetensors"
    if path.is_file() and (found := Coarse.load(path)).settings.get("key") == key:
        return found
    images, place = _read(reader, len(chosen), assay)
    names = [assay.classes[k] for k in label[rows][place]]
    target = torch.tensor([classes.index(name) for name in names])
    plate = chosen.table["Metadata_Plate"].to_numpy(str)[place]
    aside = torch.from_numpy(_aside(plate, target.numpy()))
    tell = None if progress is None else lambda step, steps, loss: progress("training a second classifier", step, steps)
    classifier = train(images[~aside], target[~aside], classes, recipe, tell, BACKBONE)
    calibrate(classifier, images[aside], target[aside])
    classifier.settings |= {"key": key, "trained_on": int((~aside).sum())}
    with atomic(path) as (temporary,):
        classifier.save(temporary)
    # Weights are kept in 16 bits: the first run judges by what a second one will find.
    return Coarse.load(path)


def _read(reader: Reader, n: int, assay: Assay) -> tuple[Tensor, Rows]:
    """(n, C, H, W) float16 normalised `coarse` images of the commonest size, and their rows. Others are left out."""
    found: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for row in range(n):
        try:
            pixels = torch.from_numpy(reader(row).pixels)
        except ImageError:
            continue
        found.setdefault(tuple(pixels.shape), []).append((row, coarse(assay.normalised(pixels[None]))[0].half()))
    most = max(found.values(), key=len)
    return torch.stack([image for _, image in most]), np.array([row for row, _ in most], np.intp)


def _aside(plate: npt.NDArray[np.str_], label: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Images for the calibration: whole plates, about a sixth of them, where every class stays on both sides."""
    rng = np.random.default_rng(SEED)
    names = rng.permutation(np.unique(plate))
    aside = np.isin(plate, names[: max(1, len(names) // 6)])
    if len(names) > 2 and set(label[aside]) == set(label[~aside]) == set(label):
        return aside
    order = np.lexsort((rng.random(len(label)), label))
    found = np.zeros(len(label), bool)
    found[order[::6]] = True
    return found
