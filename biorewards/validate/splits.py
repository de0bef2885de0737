"""Check 8: what the MoA classifier knows of plates and compounds that it has not seen, beside counts and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from biorewards.fitting import accuracy, counts_and_sizes
from biorewards.rewards import MEASURES
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats, real_under_every_label
from biorewards.validate.second import halves

NAME = "splits"
#: Balanced accuracy that may be lost from images like those of training to unseen ones. Reported drops of BBBC021
#: classifiers between not-same-compound and not-same-compound-and-batch are about as large.
MOST_DROP = 0.1
#: By how much the classifier must beat one that sees counts and sizes only, else cell number explains the MoA.
LEAST_LEAD = 0.1
#: By how much the card's figure may lie above what is measured here, beyond the interval.
MOST_CLAIM = 0.05
#: Images on either side of a comparison.
LEAST = 30
REWARD = "moa"
#: Headline figures of a card, the first that it has.
HEADLINES = ("shipped_on_held_out_plates", "plate", "random")


def splits(bench: Bench) -> list[Finding]:
    """Accuracy on seen and unseen plates, the card's four splits and its claim, and the lead over counts and sizes."""
    if REWARD not in bench.suite.rewards:
        return [not_judged(NAME, None, "The MoA classifier on unseen data.", "", f"no reward {REWARD!r} on trial")]
    rows = np.arange(len(bench))
    values = real_under_every_label(bench, rows)[REWARD]
    if not np.isfinite(values).any():
        reason = f"assay {bench.assay.name} has no MoA classifier that covers these classes"
        return [not_judged(NAME, REWARD, "The MoA classifier on unseen data.", "", reason)]
    covered = np.atleast_1d(np.isfinite(values).any(0))
    rows = rows[covered[bench.target]]
    values = np.where(covered, values, -np.inf)[rows]
    truth = bench.target[rows]
    if len(np.unique(truth)) < 2:
        return [not_judged(NAME, REWARD, "The MoA classifier on unseen data.", "", "the real images show one class")]
    card = bench.assay.card
    return [
        _drop(bench, values, truth, rows, card),
        *_of_card(card),
        _claim(bench, values, truth, rows, card),
        _lead(bench, values, truth, rows),
    ]


def balanced(correct: npt.NDArray[np.bool_], truth: Rows) -> float:
    """Mean over classes of the share that is right."""
    return float(np.mean([correct[truth == k].mean() for k in np.unique(truth)])) if len(truth) else float("nan")


def _seen(bench: Bench, rows: Rows, card: dict[str, Any]) -> npt.NDArray[np.bool_] | str:
    """(N,) the image's plate was trained on, by the card; or why that is unknown."""
    trained = set(card.get("plates", {}).get("train", []))
    plate = bench.rows.plate.to_numpy()[rows]
    if not trained:
        return "the assay's card does not say which plates it was trained on"
    if (plate == "").all():
        return "the real images have no plates"
    return np.isin(plate, sorted(trained))


def _drop(bench: Bench, values: Floats, truth: Rows, rows: Rows, card: dict[str, Any]) -> Finding:
    what = (
        "Balanced accuracy on real images of the plates that the classifier was trained on, less that on other plates."
    )
    threshold = f"<= {MOST_DROP}, beyond the interval"
    seen = _seen(bench, rows, card)
    if isinstance(seen, str):
        return not_judged(NAME, REWARD, what, threshold, seen)
    if min(seen.sum(), (~seen).sum()) < LEAST:
        reason = (
            f"{int(seen.sum())} images of plates of its training, {int((~seen).sum())} of others; {LEAST} each needed"
        )
        return not_judged(NAME, REWARD, what, threshold, reason)
    correct = values.argmax(1) == truth

    def drop(drawn: Rows) -> float:
        here = seen[drawn]
        return balanced(correct[drawn][here], truth[drawn][here]) - balanced(correct[drawn][~here], truth[drawn][~here])

    value, low, high = bench.interval_of(drop, len(rows))
    details = {
        "seen": balanced(correct[seen], truth[seen]), "unseen": balanced(correct[~seen], truth[~seen]),
        "n_seen": int(seen.sum()), "n_unseen": int((~seen).sum()),
    }  # fmt: skip
    passed = low <= MOST_DROP
    reason = "" if passed else "it remembers its training images"
    return Finding(NAME, REWARD, what, value, (low, high), threshold, passed, len(rows), reason, details)


def _of_card(card: dict[str, Any]) -> list[Finding]:
    """The four splits that `biorewards fit` measures with a second training, as the card has them."""
    figures = {k: v for k, v in card.get("classifier", {}).items() if isinstance(v, dict) and "balanced_accuracy" in v}
    found = []
    for split, other in (("plate", "plates"), ("compound", "compounds"), ("compound_and_plate", "both")):
        held = f"held-out {other}" if other != "both" else "held-out compounds on held-out plates"
        what = f"Balanced accuracy on a random split less that on {held}, from the assay's card."
        if "random" not in figures or split not in figures:
            reason = f"the card has no figure for {held}; `biorewards fit` measures it where classes have two compounds"
            found.append(not_judged(NAME, REWARD, what, f"<= {MOST_DROP}", reason))
            continue
        a, b = figures["random"], figures[split]
        value = a["balanced_accuracy"] - b["balanced_accuracy"]
        # Independent images: the half widths add in squares.
        half = float(np.hypot(*((one["interval_95"][1] - one["interval_95"][0]) / 2 for one in (a, b))))
        passed = value <= MOST_DROP
        details = {"random": a, split: b, "counts_and_sizes_only": figures.get("counts_and_sizes_only")}
        found.append(Finding(NAME, REWARD, what, value, (value - half, value + half), f"<= {MOST_DROP}", passed,
                             b["n"], "" if passed else f"what it knows does not hold on {held}", details))  # fmt: skip
    return found


def _claim(bench: Bench, values: Floats, truth: Rows, rows: Rows, card: dict[str, Any]) -> Finding:
    what = "Balanced accuracy that the assay's card claims, less that on these images of plates it was not trained on."
    threshold = f"<= {MOST_CLAIM}, beyond the interval"
    figures = card.get("classifier", {})
    key = next((k for k in HEADLINES if k in figures), None)
    if key is None:
        return not_judged(NAME, REWARD, what, threshold, "the card claims no accuracy")
    seen = _seen(bench, rows, card)
    # Without a word on plates all images must bear the claim out.
    there = np.ones(len(rows), bool) if isinstance(seen, str) or (~seen).sum() < LEAST else ~seen
    correct = values.argmax(1)[there] == truth[there]
    claimed = float(figures[key]["balanced_accuracy"])
    value, low, high = bench.interval_of(lambda d: claimed - balanced(correct[d], truth[there][d]), int(there.sum()))
    passed = low <= MOST_CLAIM
    details = {"split": key, "claimed": claimed, "measured": claimed - value, "only_unseen_plates": not there.all()}
    reason = "" if passed else f"the card's figure ({key}) does not hold on unseen images"
    return Finding(NAME, REWARD, what, value, (low, high), threshold, passed, int(there.sum()), reason, details)


def _lead(bench: Bench, values: Floats, truth: Rows, rows: Rows) -> Finding:
    what = "Balanced accuracy less that of a classifier that sees only counts, sizes and roundness, on the same images."
    threshold = f">= {LEAST_LEAD}"
    train, test = (np.isin(rows, half) for half in halves(bench))
    if min(train.sum(), test.sum()) < LEAST or set(truth[test]) - set(truth[train]):
        return not_judged(NAME, REWARD, what, threshold, "too few real images to fit counts and sizes to half of them")
    measured = bench.real(rows).measure
    measures = measured[[name for name in MEASURES if name in measured]].to_numpy()
    if not measures.shape[1]:
        return not_judged(NAME, REWARD, what, threshold, "no reward on trial measures counts or sizes")
    plain = counts_and_sizes(measures, truth, train, test, len(bench.assay.classes), bench.seed)
    ours, theirs, own = values.argmax(1)[test] == truth[test], plain.argmax(1) == truth[test], truth[test]
    value, low, high = bench.interval_of(
        lambda d: balanced(ours[d], own[d]) - balanced(theirs[d], own[d]), int(test.sum())
    )
    details = {"classifier": accuracy(values[test], own), "counts_and_sizes": accuracy(plain, own)}
    passed = value >= LEAST_LEAD
    reason = "" if passed else "cell number and size explain the MoA nearly as well"
    return Finding(NAME, REWARD, what, value, (low, high), threshold, passed, int(test.sum()), reason, details)
