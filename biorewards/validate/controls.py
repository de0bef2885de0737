"""Positive controls of the audit itself: four verifiers with known faults. `validate` must fail every one.

    bad = plant("plain_roundness", bench)      # the same images, one judge replaced by a faulty one
    findings = CHECKS[CONTROLS["plain_roundness"].check](bad)

None of these is for use: they show that the checks can say no.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from skimage.measure import regionprops
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from biorewards.audit.pixels import pixel_features
from biorewards.batch import Batch
from biorewards.classifier import Classifier
from biorewards.fitting import accuracy
from biorewards.reward import Reason, Reward, Score
from biorewards.rewards import ReferenceReward
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.plain import PlainClassifier, discriminant
from biorewards.validate.second import halves

#: Images that the reference of a faulty reward is taken from.
MEASURED = 400


@dataclass(frozen=True)
class Control:
    """A verifier with a known fault. check, reward: the check that must fail, and for which reward."""

    what: str
    check: str
    reward: str
    plant: Callable[[Bench], Bench]


def plant(name: str, bench: Bench) -> Bench:
    """The bench with control `name` in the place of the honest verifier.

    Raises ValueError for an unknown name, and where the real images do not allow it (one plate, no labels).
    """
    if name not in CONTROLS:
        raise ValueError(f"no positive control {name!r}; there are {', '.join(CONTROLS)}")
    return CONTROLS[name].plant(bench)


class PlainRoundness:
    """Fault: the perimeter is that of `skimage.measure.perimeter`, whose error depends on size.

    With it 4 pi A / P^2 of perfect discs falls from 1.09 at 5 px radius to 0.92 at 50 px: a generator is paid for
    smaller nuclei. Otherwise as the honest reward: -z^2 against real images, measured the same way.
    """

    name = "nucleus_roundness"
    label_free = False
    worst = ReferenceReward.worst

    def __init__(self, mean: npt.NDArray[np.float64], sd: npt.NDArray[np.float64]) -> None:
        """mean, sd: (n_classes,) of real images; see `of`."""
        self.mean, self.sd = torch.from_numpy(mean).float(), torch.from_numpy(sd).float()

    @classmethod
    def of(cls, bench: Bench) -> PlainRoundness:
        """With the reference of the bench's real images; classes without any get that of all."""
        rows = bench.some(MEASURED)
        found = np.concatenate([
            _plain_form(Batch(bench.images(part), None, bench.assay)).numpy()
            for part in np.array_split(rows, max(1, len(rows) // 64))
        ])  # fmt: skip
        own = [found[bench.target[rows] == k] for k in range(len(bench.assay.classes))]
        own = [one if np.isfinite(one).sum() > 1 else found for one in own]
        sd = np.array([max(np.nanstd(one, ddof=1), 0.02 * np.nanmean(one)) for one in own], np.float64)
        return cls(np.array([np.nanmean(one) for one in own], np.float64), sd)

    def __call__(self, batch: Batch) -> Score:
        measure = _plain_form(batch).to(batch.target.device)
        known = batch.target >= 0
        at = batch.target.clamp_min(0)
        z = ((measure - self.mean.to(at.device)[at]) / self.sd.to(at.device)[at]).clamp(-5, 5)
        reason = torch.zeros_like(batch.target, dtype=torch.uint8)
        reason[measure.isnan()] = Reason.NO_NUCLEUS
        reason[batch.blank] = Reason.BLANK
        reason[~known] = Reason.NO_TARGET
        value = torch.where(reason > 0, torch.full_like(z, self.worst), -z.square())
        return Score(torch.where(known, value, torch.nan), measure, reason)

    def __repr__(self) -> str:
        return f"PlainRoundness({self.mean.tolist()}, {self.sd.tolist()})"


def _plain_form(batch: Batch) -> Tensor:
    """(B,) mean 4 pi A / P^2 of the nuclei not cut by the border, of all where every one is cut; NaN where none."""
    means = []
    for labels in batch.nuclei.cpu().numpy():
        objects = regionprops(labels)
        height, width = labels.shape
        inner = [o for o in objects if o.bbox[0] > 0 and o.bbox[1] > 0 and o.bbox[2] < height and o.bbox[3] < width]
        forms = [4 * np.pi * o.area / max(o.perimeter, 1.0) ** 2 for o in inner or objects]
        means.append(float(np.mean(forms)) if forms else np.nan)
    return torch.tensor(means, dtype=torch.float32)


class ZeroOnFailure:
    """Fault: where there is nothing to judge it returns 0, which is the best value of a -z^2 reward."""

    def __init__(self, honest: Reward) -> None:
        self.honest, self.name = honest, honest.name
        self.label_free = getattr(honest, "label_free", False)
        self.worst = getattr(honest, "worst", None)

    def __call__(self, batch: Batch) -> Score:
        score = self.honest(batch)
        nothing = (Reason.NO_NUCLEUS, Reason.NO_CELL, Reason.BLANK)
        failed = torch.isin(score.reason, torch.tensor(nothing, device=score.reason.device))
        value = torch.where(failed & ~score.value.isnan(), torch.zeros_like(score.value), score.value)
        return replace(score, value=value)

    def __repr__(self) -> str:
        return f"ZeroOnFailure({self.honest!r})"


def style(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4 C): level of the background, its noise and the smoothness of each channel; no cells."""
    x = images.float()
    flat = x.flatten(2)
    dark = torch.quantile(flat, torch.tensor([0.01, 0.05], device=x.device), 2).permute(1, 2, 0).flatten(1)
    second = x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
    wide = x[..., 4:] - 2 * x[..., 2:-2] + x[..., :-4]
    grain = [torch.log(d.abs().flatten(2).median(2).values + 1e-4) for d in (second, wide)]
    return torch.cat([dark, *grain], 1)


def _with_rewards(bench: Bench, faulty: Reward) -> Bench:
    """The bench's own assay and rewards, the faulty one in the place of its name."""
    return bench.judged_by(bench.assay, bench.suite.rewards | {faulty.name: faulty})


def _with_classifier(bench: Bench, classifier: Classifier, card: dict[str, object]) -> Bench:
    digest = hashlib.sha256(f"{bench.assay.fingerprint} {classifier.fingerprint}".encode()).hexdigest()[:16]
    assay = replace(bench.assay, classifier=classifier, card=bench.assay.card | card, fingerprint=digest)
    return bench.judged_by(assay, bench.suite.rewards)


def leaky_split(bench: Bench) -> Bench:
    """Fault: crops were copied (flips) before they were parted, so that the test set was in the training set.

    The classifier remembers its training crops (nearest neighbour in pixel statistics). Its card reports what it
    achieves on the "random" test set.
    """
    rows, _ = halves(bench)
    images = torch.cat([bench.assay.normalised(bench.images(part)) for part in np.array_split(rows, 8)])
    kept, place = np.unique(bench.target[rows], return_inverse=True)
    classes = [bench.assay.classes[k] for k in kept]
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(1))
    memory = PlainClassifier(pixel_features, model, images, place.astype(np.int64), classes)
    tested = images.flip(3)[:: max(1, len(images) // 400)]
    truth = place[:: max(1, len(images) // 400)]
    claim = accuracy(memory(tested).numpy(), truth)
    plates = sorted(bench.rows.plate.iloc[rows].unique())
    card = {"classifier": {"random": claim}, "plates": {"train": plates, "val": plates, "test": plates}}
    return _with_classifier(bench, memory, card)


def batch_style(bench: Bench) -> Bench:
    """Fault: in the training images every class came from one plate, and the classifier learnt the plate.

    Linear discriminant analysis of background, noise and sharpness. Raises ValueError with fewer than two plates.
    """
    rows = _confounded(bench)
    kept, place = np.unique(bench.target[rows], return_inverse=True)
    classes = [bench.assay.classes[k] for k in kept]
    images = torch.cat([bench.assay.normalised(bench.images(part)) for part in np.array_split(rows, 8)])
    return _with_classifier(bench, PlainClassifier(style, discriminant(), images, place.astype(np.int64), classes), {})


def _confounded(bench: Bench) -> Rows:
    """The rows of a lay-out in which every class lies on one plate only, classes dealt to plates in turn."""
    plates = sorted(bench.rows.plate.unique())
    if len(plates) < 2:
        raise ValueError("batch_style wants real images of at least two plates (a column PLATE)")
    every = np.arange(len(bench))
    plate = bench.rows.plate.to_numpy()
    chosen = [every[(bench.target == k) & (plate == plates[k % len(plates)])] for k in range(len(bench.assay.classes))]
    kept = np.concatenate([one for one in chosen if len(one) >= 2])
    if len(np.unique(bench.target[kept])) < 2:
        raise ValueError("batch_style wants several classes on each of several plates")
    return np.sort(kept)


#: name -> control. Order and names are those of the report.
CONTROLS: dict[str, Control] = {
    "plain_roundness": Control(
        "roundness from the plain pixel perimeter: it reads size",
        "shape_and_size",
        "nucleus_roundness",
        lambda bench: _with_rewards(bench, PlainRoundness.of(bench)),
    ),
    "zero_on_failure": Control(
        "a -z^2 reward that returns 0 where nothing was found",
        "missing_biology",
        "nucleus_size",
        lambda bench: _with_rewards(bench, ZeroOnFailure(ReferenceReward("nucleus_size"))),
    ),
    "leaky_split": Control(
        "a MoA classifier whose test crops were copies of training crops", "splits", "moa", leaky_split
    ),
    "batch_style": Control("a MoA classifier that reads the style of the plate", "plates", "moa", batch_style),
}
