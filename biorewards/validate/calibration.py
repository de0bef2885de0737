"""Check 14: probabilities come true as often as they say, and real images lie where the reference says that they do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from biorewards.rewards import MechanismOfAction, ReferenceReward
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged

NAME = "calibration"
#: Expected calibration error: a tenth off on average is what a reader of a probability bears.
MOST_ERROR = 0.1
BINS = 10
#: -z^2 of real images averages -1 where the reference describes them; half as much again is a reference of other cells.
REAL, MOST_OFF = -1.0, 0.5
FEWEST = 50

Floats = npt.NDArray[np.float64]


def calibration(bench: Bench) -> list[Finding]:
    """Expected calibration error of the classifier; mean of every -z^2 reward over real images."""
    findings = []
    for name, reward in bench.suite.rewards.items():
        if isinstance(reward, MechanismOfAction):
            findings.append(_probabilities(bench, name))
        elif isinstance(reward, ReferenceReward):
            findings.append(_reference(bench, name))
    return findings


def _probabilities(bench: Bench, name: str) -> Finding:
    what = "Expected calibration error: mean distance of the likeliest class's probability from how often it is right."
    classifier = bench.assay.classifier
    if classifier is None:
        return not_judged(NAME, name, what, f"<= {MOST_ERROR}", f"assay {bench.assay.name} has no MoA classifier")
    # Plates that the classifier was not trained on, where the split is told.
    unseen = np.flatnonzero(bench.rows["split"].str.lower().isin(["test", "val"]).to_numpy())
    rows = unseen if len(unseen) >= FEWEST else np.arange(len(bench))
    column = bench.assay.classifier_columns.numpy()[bench.target[rows]]
    rows, column = rows[column >= 0], column[column >= 0]
    if len(rows) < FEWEST:
        return not_judged(NAME, name, what, f"<= {MOST_ERROR}", f"{len(rows)} images of its classes are too few")
    probability = bench.real(rows).encoded.probabilities.astype(float)
    sure, right = probability.max(1), (probability.argmax(1) == column).astype(float)
    value, low, high = bench.interval_of(lambda drawn: expected_error(sure[drawn], right[drawn]), len(rows))
    told = np.clip(probability[np.arange(len(rows)), column], 1e-12, 1)
    brier = float(((probability - np.eye(probability.shape[1])[column]) ** 2).sum(1).mean())
    order = np.array_split(np.argsort(sure, kind="stable"), BINS)
    details = {
        "accuracy": float(right.mean()), "brier": brier, "log_loss": float(-np.log(told).mean()),
        "held_out_plates": len(unseen) >= FEWEST,
        "bins": [{"said": float(sure[b].mean()), "right": float(right[b].mean()), "n": len(b)} for b in order],
    }  # fmt: skip
    passed = value <= MOST_ERROR
    reason = "" if passed else f"it says {sure.mean():.2f} on average and is right in {right.mean():.2f}"
    return Finding(NAME, name, what, value, (low, high), f"<= {MOST_ERROR}", passed, len(rows), reason, details)


def expected_error(sure: Floats, right: Floats) -> float:
    """Expected calibration error over ten bins of equal numbers (Nixon et al. 2019), (N,) each."""
    bins = np.array_split(np.argsort(sure, kind="stable"), BINS)
    return float(sum(len(b) * abs(sure[b].mean() - right[b].mean()) for b in bins if len(b)) / len(sure))


def _reference(bench: Bench, name: str) -> Finding:
    what = "Mean reward of real images: −1 where the reference describes them."
    threshold = f"within {REAL:g} ± {MOST_OFF:g}".replace("-", "−")
    value = bench.real().value[name].to_numpy()
    there = np.flatnonzero(np.isfinite(value))
    if len(there) < FEWEST:
        return not_judged(NAME, name, what, threshold, f"{len(there)} real images with a value are too few")
    mean = float(value[there].mean())
    by_class = {bench.assay.classes[k]: float(np.nanmean(value[rows])) for k, rows in _classes(bench, there).items()}
    passed = abs(mean - REAL) <= MOST_OFF
    worse = (
        "further from the reference than the images behind it"
        if mean < REAL
        else "closer together than those behind it"
    )
    reason = "" if passed else f"these images lie {worse}: another scale, another site, or too few behind the reference"
    reasons = bench.real().reason[name].iloc[there].value_counts().to_dict()
    return Finding(NAME, name, what, mean, bench.interval(value), threshold, passed, len(there), reason,
                   {"by_class": by_class, "reasons": reasons})  # fmt: skip


def _classes(bench: Bench, there: Rows) -> dict[int, Rows]:
    return {int(k): there[bench.target[there] == k] for k in np.unique(bench.target[there])}
