"""Everything an audit takes the mean of: one row an image, one column a quantity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.audit.conditions import Conditions
from biorewards.audit.distances import (
    Distance,
    Moments,
    Strata,
    frechet,
    kernel,
    likeness,
    moments,
    neighbourhood,
    self_similarity,
)
from biorewards.audit.samples import Sample, standardise
from biorewards.reward import Reason, Suite
from biorewards.rewards import MEASURES

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
#: Two images are copies when their thumbnails correlate this much, in one of eight orientations. Of 600 held-out
#: phantom crops 0.3 % come this near to one of 1800 others; copies through JPEG, noise, blur, gain or flips all do.
COPY = 0.97
#: Images of a sample that are looked up among the others: 2,000 settle a share of 2 % to within 0.6.
LOOKED_UP = 2_000
#: Rows of a sample that kernel distances are taken over: pairs grow with the square.
MOST_PAIRED = 10_000
#: A class or compound has a distance of its own from this many images on.
ENOUGH = 20
#: Reasons with which a crop has no mechanism, whatever the classifier says.
EMPTY = [Reason.BLANK.name, Reason.NO_NUCLEUS.name]
SCOPES = ("class", "compound")


@dataclass
class Yardstick:
    """The reference images as all samples are held against them, and what is taken from them once."""

    assay: Assay
    suite: Suite
    conditions: Conditions
    reference: Sample
    embeddings: dict[str, Tensor]
    each: npt.NDArray[np.int64]
    pools: dict[str, Tensor]
    seed: int
    _moments: dict[tuple[str, str], Moments] = field(default_factory=dict)
    _kernels: dict[tuple[str, str], tuple[Rows, Floats, float]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, assay: Assay, suite: Suite, conditions: Conditions, samples: dict[str, Sample], reference: Sample,
        standard: bool, seed: int,
    ) -> Yardstick:  # fmt: skip
        """samples: all of them, the reference among them, by name."""
        raw = {name: torch.from_numpy(s.encoded.embedding) for name, s in samples.items()}
        embeddings = standardise(list(samples.values()), reference) if standard else raw
        size = len(conditions.names)
        counts = [np.bincount(number[number >= 0], minlength=size) for number in conditions.number.values()]
        return cls(assay, suite, conditions, reference, embeddings, np.min(counts, 0), _pools(samples, assay), seed)

    def equal(self, name: str) -> npt.NDArray[np.bool_]:
        """(N,) rows of a sample such that every sample has the same number of every condition."""
        return self.some(name, self.each)

    def some(self, name: str, most: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(N,) at most `most` (S,) rows of each condition, by the seed; the same places in samples of one size."""
        number = self.conditions.number[name]
        chosen = np.zeros(len(number), bool)
        for s, n in enumerate(most):
            rows = np.flatnonzero(number == s)
            chosen[np.random.default_rng([self.seed, s]).permutation(rows)[:n]] = True
        return chosen

    def within(self, name: str, chosen: npt.NDArray[np.bool_], scope: str, group: str) -> tuple[Rows, Strata]:
        """Rows of a sample among `chosen` that belong to a group ("", "" for all), as strata."""
        number = self.conditions.number[name]
        wanted = chosen & (number >= 0)
        if scope:
            wanted &= np.isin(number, self.conditions.members(scope, group))
        rows = np.flatnonzero(wanted)
        present, local = np.unique(number[rows], return_inverse=True)
        share = self.conditions.share[present]
        return rows, Strata(local, share / share.sum() if len(share) else share)

    def frechet(self, name: str, scope: str, group: str) -> tuple[Rows, Distance] | None:
        """Frechet distance of equal numbers of images; None where there are too few."""
        rows, strata = self.within(name, self.equal(name), scope, group)
        if len(rows) < ENOUGH:
            return None
        key = (scope, group)
        if key not in self._moments:
            whole = np.ones(len(self.reference), bool)
            own, own_strata = self.within(self.reference.name, whole, scope, group)
            self._moments[key] = moments(self.embeddings[self.reference.name][own].numpy(), own_strata.weight)
        return rows, frechet(self.embeddings[name][rows].numpy(), self._moments[key], strata.weight)

    def kernel(self, name: str, scope: str, group: str) -> tuple[Rows, Distance] | None:
        """Kernel distance of all images (a share of each condition beyond `MOST_PAIRED`); None where too few."""
        rows, strata = self.within(name, self._paired(name), scope, group)
        if len(rows) < ENOUGH or np.bincount(strata.number).min() < 2:
            return None
        key = (scope, group)
        reference = self.embeddings[self.reference.name]
        if key not in self._kernels:
            own, own_strata = self.within(self.reference.name, self._paired(self.reference.name), scope, group)
            alike = float(own_strata.weight @ self_similarity(reference[own], own_strata))
            self._kernels[key] = own, own_strata.weight, alike
        own, weight, alike = self._kernels[key]
        return rows, kernel(self.embeddings[name][rows], strata, reference[own], weight, alike)

    def _paired(self, name: str) -> npt.NDArray[np.bool_]:
        number = self.conditions.number[name]
        counts = np.bincount(number[number >= 0], minlength=len(self.conditions.names))
        share = min(1.0, MOST_PAIRED / max(1, counts.sum()))
        return self.some(name, np.maximum(2, np.floor(share * counts)).astype(np.int64))


def _pools(samples: dict[str, Sample], assay: Assay) -> dict[str, Tensor]:
    """Thumbnails that copies are looked for in: all images of either part, and all controls of both."""
    found: dict[str, list[npt.NDArray[np.float32]]] = {"reference": [], "real": [], "controls": []}
    for sample in samples.values():
        untreated = (sample.scores["Metadata_MoA"] == assay.classes[0]).to_numpy()
        if sample.kind in ("reference", "real"):
            found[sample.kind].append(sample.encoded.thumbnail[sample.readable])
            found["controls"].append(sample.encoded.thumbnail[sample.readable & untreated])
        elif sample.kind == "control":
            found["controls"].append(sample.encoded.thumbnail[sample.readable])
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def columns(sample: Sample, yard: Yardstick) -> pd.DataFrame:
    """One row an image of the sample, NaN where a quantity does not exist or the image is not compared.

    Reward_<name>, Reward_total; worst (any reward at its worst), worst_<name>; correct (top class is the target);
    class_<k> (top class, one-hot); z_<name>, zz_<name> (measure against the reference of its class, and its square);
    frechet, kernel and frechet_class, ... (value + influence); precision, density, coverage, recall; nearest
    (distance to the nearest reference image); spread (squared distance from the condition's middle); near_copy,
    leaked, control_copy, duplicate (0 or 1; of at most `LOOKED_UP` treated images).
    """
    number = yard.conditions.number[sample.name]
    found = pd.DataFrame(index=range(len(sample)))
    for name in [*yard.suite.rewards, "total"]:
        found[f"Reward_{name}"] = sample.scores[f"Reward_{name}"].to_numpy(np.float64)
    _worst(found, sample, yard.suite)
    _classified(found, sample, yard.assay)
    _against_reference(found, sample, yard)
    for scope, groups in [("", [""]), *((scope, yard.conditions.groups(scope)) for scope in SCOPES)]:
        for what, take in (("frechet", yard.frechet), ("kernel", yard.kernel)):
            column = np.full(len(sample), np.nan)
            for group in groups:
                if (taken := take(sample.name, scope, group)) is not None:
                    rows, distance = taken
                    column[rows] = distance.value + distance.influence
            found[f"{what}_{scope}" if scope else what] = column
    _neighbours(found, sample, yard)
    _spread(found, sample, yard)
    _copies(found, sample, yard)
    found[number < 0] = np.nan
    return found


def _worst(found: pd.DataFrame, sample: Sample, suite: Suite) -> None:
    anything = np.zeros(len(sample))
    for name, reward in suite.rewards.items():
        worst = getattr(reward, "worst", None)
        if worst is not None:
            value = found[f"Reward_{name}"]
            found[f"worst_{name}"] = (value <= worst).astype(float).where(value.notna())
            anything = np.maximum(anything, found[f"worst_{name}"].fillna(0))
    found["worst"] = anything


def _classified(found: pd.DataFrame, sample: Sample, assay: Assay) -> None:
    if assay.classifier is None or "Reason_moa" not in sample.scores:
        return
    top = np.nan_to_num(sample.encoded.probabilities).argmax(1)
    place = {name: k for k, name in enumerate(assay.classifier.classes)}
    truth = sample.scores["Metadata_MoA"].map(place).to_numpy(np.float64)
    empty = sample.scores["Reason_moa"].isin(EMPTY).to_numpy()
    found["correct"] = np.where(np.isnan(truth), np.nan, (top == truth) & ~empty)
    for k in range(len(place)):
        found[f"class_{k}"] = np.where(np.isnan(truth), np.nan, (top == k) & ~empty)


def _against_reference(found: pd.DataFrame, sample: Sample, yard: Yardstick) -> None:
    place = {name: k for k, name in enumerate(yard.assay.classes)}
    target = torch.tensor([place.get(name, -1) for name in sample.scores["Metadata_MoA"]], dtype=torch.int64)
    for name in yard.suite.rewards:
        if name in MEASURES:
            mean, sd, _ = (part.double().numpy() for part in yard.assay.reference(name, target))
            z = (sample.scores[f"Measure_{name}"].to_numpy(np.float64) - mean) / sd
            found[f"z_{name}"], found[f"zz_{name}"] = z, z**2


def _neighbours(found: pd.DataFrame, sample: Sample, yard: Yardstick) -> None:
    rows, _ = yard.within(sample.name, yard.equal(sample.name), "", "")
    own, _ = yard.within(yard.reference.name, yard.equal(yard.reference.name), "", "")
    near = neighbourhood(yard.embeddings[sample.name][rows], yard.embeddings[yard.reference.name][own])
    values = {
        "precision": near.precision,
        "density": near.density,
        "nearest": near.nearest,
        "coverage": near.coverage.value + near.coverage.influence,
        "recall": near.recall.value + near.recall.influence,
    }
    for name, value in values.items():
        found[name] = _placed(value, rows, len(sample))


def _placed(values: npt.NDArray[Any], rows: Rows, n: int) -> Floats:
    column = np.full(n, np.nan)
    column[rows] = values
    return column


def _spread(found: pd.DataFrame, sample: Sample, yard: Yardstick) -> None:
    number, x = yard.conditions.number[sample.name], yard.embeddings[sample.name].double().numpy()
    column = np.full(len(sample), np.nan)
    for s in np.unique(number[number >= 0]):
        rows = np.flatnonzero(number == s)
        column[rows] = ((x[rows] - x[rows].mean(0)) ** 2).sum(1) * len(rows) / (len(rows) - 1)
    found["spread"] = column


def _copies(found: pd.DataFrame, sample: Sample, yard: Yardstick) -> None:
    compared = np.flatnonzero(yard.conditions.number[sample.name] >= 0)
    rng = np.random.default_rng(yard.seed)
    rows = np.sort(rng.permutation(compared)[:LOOKED_UP])
    thumbnail = torch.from_numpy(sample.encoded.thumbnail)
    # A treated image that shows a control is a copied control, not a memory of the class it was asked for. Returning
    # the control itself where a control was asked for is right, so those images are no evidence.
    untreated = (sample.scores["Metadata_MoA"] == yard.assay.classes[0]).to_numpy()[rows]
    rows = rows[~untreated]
    like = {name: likeness(thumbnail[rows], pool)[0] > COPY for name, pool in yard.pools.items() if name != sample.kind}
    copied = like["controls"]
    duplicate = likeness(thumbnail[rows], thumbnail[compared], np.searchsorted(compared, rows))[0] > COPY
    columns = {
        "near_copy": like["reference"] & ~copied,
        "leaked": like["real"] & ~copied if "real" in like else np.zeros(len(rows)),
        "control_copy": copied,
        "duplicate": duplicate & ~copied,
    }
    for name, value in columns.items():
        found[name] = _placed(value, rows, len(sample))
