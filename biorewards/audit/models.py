"""The table over models: every statistic with its interval, beside real images and copies of controls.

A statistic is an array of draws (B + 1,): its value first, then its value in every resample. Whatever is made of
several (differences, anchored scores, ranks) is made draw by draw, so its interval needs no further thought.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from biorewards.audit.bootstrap import RESAMPLES, Sums, differs, interval, pooled, resample, seed_of
from biorewards.audit.columns import SCOPES, Yardstick, columns
from biorewards.audit.conditions import Conditions
from biorewards.audit.samples import CONTROL, REAL, Sample
from biorewards.reward import Suite
from biorewards.rewards import MEASURES

Floats = npt.NDArray[np.float64]
#: Shares of images from which a fault is flagged, and the ratio of spread below which a model draws too few kinds.
FLAGGED, COLLAPSED = 0.02, 0.5
#: Faults that take a model out of the ranking: its scores are other images' scores, or those of a few of its own.
DISQUALIFYING = ("memorised", "leaked", "collapsed")


class Metric(NamedTuple):
    """better: "higher", "lower", or "" where nearness to real is what counts. anchored: has a score between anchors."""

    name: str
    better: str = ""
    anchored: bool = False


@dataclass(frozen=True)
class Row:
    """One sample's statistics. draws: metric -> (B + 1,). groups: (scope, group) -> the same for its images.

    n: images compared; n_equal: of those, the images behind distances at equal numbers.
    """

    name: str
    kind: str
    n: int
    n_equal: int
    draws: dict[str, Floats]
    groups: dict[tuple[str, str], dict[str, Floats]]
    group_n: dict[tuple[str, str], int]


@dataclass(frozen=True)
class Flag:
    """What a reader must know before believing a row. kind names it, text says it with its number.

    metrics: names of metrics that end the text, where it is about some.
    """

    kind: str
    text: str
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Rank of a model by its gap to real: between best and worst, as far as intervals say; None when left out."""

    best: int | None
    worst: int | None


@dataclass(frozen=True)
class Audit:
    """rows: real, copy-control, then the models. floor: the gap that images as good as real ones show by chance."""

    rows: dict[str, Row]
    metrics: list[Metric]
    conditions: Conditions
    flags: dict[str, list[Flag]]
    places: dict[str, Place]
    floor: float
    better_than: list[tuple[str, str]]
    columns: dict[str, pd.DataFrame] = field(repr=False)

    @property
    def models(self) -> list[Row]:
        return [row for row in self.rows.values() if row.kind == "model"]

    def anchored(self, row: Row, metric: Metric, scope: str = "", group: str = "") -> Floats | None:
        """(u - b) / (r - b) by draw, b the copied controls, r held-out real images; not limited to [0, 1].

        None where real images are not better than copied controls by more than chance: then there is no scale.
        """
        value, real, copy = (_of(one, metric.name, scope, group) for one in (row, self.rows[REAL], self.rows[CONTROL]))
        if not metric.anchored or value is None or real is None or copy is None:
            return None
        if differs(real - copy) != (1 if metric.better == "higher" else -1):
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            score: Floats = (value - copy) / (real - copy)
        return score

    def beyond_real(self, row: Row, metric: Metric, scope: str = "", group: str = "") -> bool:
        """Better than real held-out images by more than chance: a warning."""
        value, real = (_of(one, metric.name, scope, group) for one in (row, self.rows[REAL]))
        if value is None or real is None or row.kind != "model" or not metric.better:
            return False
        return differs(value - real) == (1 if metric.better == "higher" else -1)


def _of(row: Row, name: str, scope: str, group: str) -> Floats | None:
    return (row.groups.get((scope, group), {}) if scope else row.draws).get(name)


def metrics_of(suite: Suite, classified: bool) -> list[Metric]:
    """Everything that the table has, in its order."""
    found = [Metric("total", "higher", True), *(Metric(name, "higher", True) for name in suite.rewards)]
    if classified:
        found += [Metric("moa_accuracy", "higher", True), Metric("moa_macro_f1", "higher", True)]
    found += [Metric("frechet", "lower", True), Metric("kernel", "lower", True)]
    found += [Metric(name, "higher", True) for name in ("precision", "recall", "density", "coverage")]
    found += [Metric(f"spread_ratio_{name}") for name in suite.rewards if name in MEASURES]
    found += [Metric("diversity"), Metric("train_distance")]
    faults = ("worst_share", "near_copies", "duplicates", "leaked", "control_copies")
    found += [Metric(name, "lower") for name in faults]
    return found + [Metric(f"worst_{name}", "lower") for name, one in suite.rewards.items() if hasattr(one, "worst")]


def audit(samples: dict[str, Sample], yard: Yardstick, *, seed: int = 0, resamples: int = RESAMPLES) -> Audit:
    """Compare samples: `real` and `copy-control` among them, the reference not."""
    tables = {name: columns(sample, yard) for name, sample in samples.items()}
    rows = {name: _row(samples[name], tables[name], yard, seed, resamples) for name in samples}
    for ratio in ("diversity", "train_distance"):
        real = rows[REAL].draws[ratio][0]
        for row in rows.values():
            row.draws[ratio] = row.draws[ratio] / real
    suite = yard.suite
    gaps = {name: gap(row, rows[REAL], suite) for name, row in rows.items()}
    for name, row in rows.items():
        row.draws["gap"] = gaps[name]
    flags = {name: _flags(row, rows[REAL]) for name, row in rows.items() if row.kind == "model"}
    places, better_than = rank(gaps, flags)
    metrics = metrics_of(suite, yard.assay.classifier is not None)
    found = Audit(rows, metrics, yard.conditions, flags, places, _floor(rows[REAL], suite), better_than, tables)
    for row in found.models:
        if beyond := [m.name for m in metrics if m.anchored and found.beyond_real(row, m)]:
            flags[row.name].append(Flag("better than real", "better than real images in", tuple(beyond)))
    return found


def _row(sample: Sample, table: pd.DataFrame, yard: Yardstick, seed: int, resamples: int) -> Row:
    conditions = yard.conditions
    number = conditions.number[sample.name]
    used = np.flatnonzero(number >= 0)
    # Files in one order, so that samples of the same files are resampled in pairs.
    files = sample.scores["Metadata_File"].iloc[used]
    used = used[np.lexsort((files.to_numpy(str), number[used]))]
    ordered = sample.scores["Metadata_File"].iloc[used].tolist()
    sums = resample(
        table.to_numpy(np.float64)[used], number[used], len(conditions.names), seed=seed_of(seed, ordered),
        resamples=resamples,
    )  # fmt: skip
    place = {str(name): k for k, name in enumerate(table.columns)}
    draws = _statistics(sums, place, conditions, yard)
    groups: dict[tuple[str, str], dict[str, Floats]] = {}
    group_n: dict[tuple[str, str], int] = {}
    for scope in SCOPES:
        for group in conditions.groups(scope):
            members = conditions.members(scope, group)
            part = Sums(sums.total[:, members], sums.number[:, members])
            mean = pooled(part, conditions.share[members])
            names = {f"Reward_{n}": n for n in (*yard.suite.rewards, "total")}
            names |= {"correct": "moa_accuracy", f"frechet_{scope}": "frechet", f"kernel_{scope}": "kernel"}
            names["worst"] = "worst_share"
            groups[scope, group] = {new: mean[:, place[old]] for old, new in names.items() if old in place}
            group_n[scope, group] = int(np.isin(number, members).sum())
    equal = int(yard.equal(sample.name).sum())
    return Row(sample.name, sample.kind, len(used), equal, draws, groups, group_n)


def _statistics(sums: Sums, place: dict[str, int], conditions: Conditions, yard: Yardstick) -> dict[str, Floats]:
    mean = pooled(sums, conditions.share)
    taken = {name: mean[:, place[f"Reward_{name}"]] for name in (*yard.suite.rewards, "total")}
    same = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    taken |= {name: mean[:, place[name]] for name in same}
    renamed = {
        "worst_share": "worst", "near_copies": "near_copy", "duplicates": "duplicate", "leaked": "leaked",
        "control_copies": "control_copy", "train_distance": "nearest",
    }  # fmt: skip
    taken |= {new: mean[:, place[old]] for new, old in renamed.items()}
    taken |= {f"worst_{n}": mean[:, place[f"worst_{n}"]] for n in yard.suite.rewards if f"worst_{n}" in place}
    taken["diversity"] = np.sqrt(mean[:, place["spread"]])
    classes = np.array(conditions.classes)
    for name in yard.suite.rewards:
        if name in MEASURES:
            z, zz = sums.mean[..., place[f"z_{name}"]], sums.mean[..., place[f"zz_{name}"]]
            taken[f"spread_ratio_{name}"] = _within(z, zz, classes, conditions.share)
    if "correct" in place:
        taken["moa_accuracy"] = mean[:, place["correct"]]
        known = yard.assay.classifier.classes if yard.assay.classifier is not None else []
        votes = sums.mean[..., [place[f"class_{k}"] for k in range(len(known))]]
        taken["moa_macro_f1"] = macro_f1(votes, classes, conditions.share, known)
    return taken


def _within(z: Floats, zz: Floats, classes: npt.NDArray[np.str_], share: Floats) -> Floats:
    """Standard deviation of a standardised measure within classes, (B + 1,)."""
    variance, weight = np.zeros(len(z)), np.zeros(len(z))
    for name in np.unique(classes):
        own = np.flatnonzero(classes == name)
        there = np.where(np.isnan(z[:, own]), 0.0, share[own])
        total = there.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            first = (np.nan_to_num(z[:, own]) * there).sum(1) / total
            second = (np.nan_to_num(zz[:, own]) * there).sum(1) / total
        variance += np.where(total > 0, total * np.nan_to_num(second - first**2), 0.0)
        weight += total
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0, np.sqrt(np.maximum(variance, 0) / weight), np.nan)


def macro_f1(votes: Floats, classes: npt.NDArray[np.str_], share: Floats, known: list[str]) -> Floats:
    """(B + 1,) mean F1 over the classes that occur and that the classifier knows.

    votes: (B + 1, S, n) share of each condition's images that get each class; classes (S,) the true one.
    """
    mass = np.nan_to_num(votes) * share[None, :, None]
    scores = []
    for name in np.unique(classes):
        if name in known:
            own, k = classes == name, known.index(name)
            hit, said, true = mass[:, own, k].sum(1), mass[:, :, k].sum(1), share[own].sum()
            scores.append(2 * hit / (said + true))
    return np.mean(scores, 0) if scores else np.full(len(votes), np.nan)


def gap(row: Row, real: Row, suite: Suite) -> Floats:
    """Weighted distance of a row's mean rewards from those of real images: sum_k weight_k |u_k - r_k|, (B + 1,).

    Lower is better, and being better than real counts like being worse: -z^2 is best for images that are all the
    same. Rewards without a value on either side are left out.
    """
    total = np.zeros_like(real.draws["total"])
    for name in suite.rewards:
        apart = np.abs(row.draws[name] - real.draws[name])
        if np.isfinite(apart[0]):
            total += suite.weights[name] * np.nan_to_num(apart)
    return total


def _floor(real: Row, suite: Suite) -> float:
    """95 % quantile of the gap between two sets of real images, from pairs of resamples of the held-out one."""
    half = (len(real.draws["total"]) - 1) // 2
    other = Row("", "", 0, 0, {k: np.concatenate([v[:1], np.roll(v[1:], half)]) for k, v in real.draws.items()}, {}, {})
    return float(np.quantile(gap(other, real, suite)[1:], 0.95))


def rank(gaps: dict[str, Floats], flags: dict[str, list[Flag]]) -> tuple[dict[str, Place], list[tuple[str, str]]]:
    """Places of the models by gap, and the pairs (better, worse) whose order the intervals settle.

    All pairs are tested at once: each at 5 % over the number of pairs (Bonferroni). A disqualified model has no place.
    """
    ranked = [name for name, found in flags.items() if not {f.kind for f in found} & set(DISQUALIFYING)]
    pairs = list(combinations(ranked, 2))
    settled = []
    for a, b in pairs:
        sign = differs(gaps[a] - gaps[b], 1 - 0.05 / len(pairs))
        if sign:
            settled.append((b, a) if sign > 0 else (a, b))
    places = {name: Place(None, None) for name in flags}
    for name in ranked:
        better = sum(worse == name for _, worse in settled)
        worse = sum(best == name for best, _ in settled)
        places[name] = Place(1 + better, len(ranked) - worse)
    return places, settled


def _flags(row: Row, real: Row) -> list[Flag]:
    def share(name: str) -> float:
        return float(row.draws[name][0])

    def beyond(name: str) -> bool:
        """At least `FLAGGED` of the images, and more than among held-out real ones."""
        return share(name) >= FLAGGED and (name == "leaked" or differs(row.draws[name] - real.draws[name]) > 0)

    found = []
    if beyond("near_copies"):
        text = f"{share('near_copies'):.0%} of the images are near-copies of reference images"
        found.append(Flag("memorised", text))
    if beyond("leaked"):
        found.append(Flag("leaked", f"{share('leaked'):.0%} of the images are near-copies of held-out images"))
    narrow = interval(row.draws["diversity"])[1] < COLLAPSED
    if beyond("duplicates") or narrow:
        text = f"{share('duplicates'):.0%} of the images are near-copies of others of the same model"
        found.append(Flag("collapsed", f"{text}; spread within conditions {share('diversity'):.2f} of real"))
    if beyond("control_copies"):
        text = f"{share('control_copies'):.0%} of the treated images are near-copies of control images"
        found.append(Flag("copies controls", text))
    ratios = [draws for name, draws in row.draws.items() if name.startswith("spread_ratio_")]
    narrower = sum(differs(draws / theirs - COLLAPSED) < 0 for draws, theirs in zip(
        ratios, [real.draws[n] for n in row.draws if n.startswith("spread_ratio_")], strict=True))  # fmt: skip
    if narrower >= 2:
        found.append(Flag("too alike", f"{narrower} of {len(ratios)} measures vary less than half as much as in real"))
    return found
