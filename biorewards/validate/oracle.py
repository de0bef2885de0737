"""Check 1: real images under their own label win against nulls that must not win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.audit.samples import copy_controls, subset
from biorewards.validate.bench import Bench, Rows, Scores
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.statistics import auroc, share_interval

NAME = "oracle"
#: One reward alone need not tell a treated cell from an untreated one: not every mechanism changes every measure. But
#: a null may not win. The weighted sum is what post-training climbs, so it must tell them apart nearly always.
LEAST_ONE, LEAST_TOTAL = 0.5, 0.9
#: Quantile of real images above which nothing may come that shows no cell.
FLOOR = 0.05
#: Grey levels of blank images: black, mid-grey, white.
BLANKS = (0.0, 0.5, 1.0)
#: null -> what it is
LABELLED = {
    "shuffled": "the same images under another class's label",
    "control": "untreated cells under a treated class's label",
    "copy": "an untreated cell of the same plate, handed in as the treated one",
}
EMPTY = {
    "noise": "white noise",
    "matched noise": "white noise with the mean and spread of a real image",
    "blank": "one grey level everywhere",
}


def oracle(bench: Bench) -> list[Finding]:
    """AUROC of real images against each labelled null; share of empty images above the real 5th percentile."""
    rows = bench.some(4 * bench.n, bench.treated if len(bench.treated) else None)
    real = bench.real(rows)
    findings = []
    for null, make in (("shuffled", _shuffled), ("control", _controls), ("copy", _copies)):
        findings += _against(bench, rows, real, null, make)
    return findings + _empty(bench, rows)


def _against(bench: Bench, rows: Rows, real: Scores, null: str, make: Callable[[Bench, Rows], Scores]) -> list[Finding]:
    names = list(bench.suite.rewards)
    what = f"How often a real treated image scores above {LABELLED[null]} (AUROC)."
    try:
        scores = make(bench, rows)
    except ValueError as error:
        return [not_judged(NAME, name, what, f">= {LEAST_ONE}", str(error)) for name in names]
    findings = []
    for name in names:
        if getattr(bench.suite.rewards[name], "label_free", False):
            reason = "it asks for no label: neither a wrong one nor an untreated cell need lower it"
            findings.append(not_judged(NAME, name, what, f">= {LEAST_ONE}", reason))
            continue
        findings.append(_judged(bench, name, null, what, real.value[name], scores.value[name], LEAST_ONE))
    if len(names) > 1:
        weights = bench.suite.weights
        findings.append(_judged(bench, None, null, what, real.total(weights), scores.total(weights), LEAST_TOTAL))
    return findings


def _judged(
    bench: Bench, name: str | None, null: str, what: str, good: npt.ArrayLike, bad: npt.ArrayLike, least: float
) -> Finding:
    good, bad = np.asarray(good, float), np.asarray(bad, float)
    n = int(np.isfinite(good).sum())
    if not n or np.isnan(bad).all():
        reason = "the sum is missing, because a part of it is" if name is None else "real images have no value"
        return not_judged(NAME, name, what, f">= {least}", reason)
    value, low, high = bench.interval_of(lambda drawn: auroc(good[drawn], bad[drawn]), len(good))
    # A single reward fails where the null wins by more than chance; the sum must reach its bar.
    passed = high >= least if name is not None else value >= least
    unsettled = name is not None and low <= LEAST_ONE <= high
    reason = "cannot tell the two apart: most mechanisms leave this measure as it is" if unsettled else ""
    reason = reason if passed else "the null wins" if name is not None else "too often the null scores as high"
    details = {"null": null, "mean_real": float(np.nanmean(good)), "mean_null": float(np.nanmean(bad))}
    return Finding(NAME, name, what, value, (low, high), f">= {least}", passed, n, reason, details)


def _shuffled(bench: Bench, rows: Rows) -> Scores:
    present = np.unique(bench.target)
    if len(present) < 2:
        raise ValueError("the real images show one class only: there is no other label to give")
    rng = bench.rng(NAME)
    other = [int(rng.choice(present[present != bench.target[row]])) for row in rows]
    return bench.score(bench.images(rows), other)


def _controls(bench: Bench, rows: Rows) -> Scores:
    _controls_and_treated(bench)
    chosen = bench.rng(NAME).choice(bench.controls, len(rows), replace=len(bench.controls) < len(rows))
    return bench.score(bench.images(chosen), bench.target[rows])


def _copies(bench: Bench, rows: Rows) -> Scores:
    _controls_and_treated(bench)
    asked, untreated = subset(bench.manifest, bench.source[rows]), bench.source[bench.controls]
    copies = copy_controls(asked, bench.manifest, untreated, bench.assay, bench.seed, most=len(rows))
    read = replace(bench.reader, manifest=copies)
    images = torch.from_numpy(np.stack([read(row).pixels for row in range(len(copies))]))
    return bench.score(images, bench.target[rows])


def _controls_and_treated(bench: Bench) -> None:
    if len(bench.controls) < 2:
        raise ValueError(f"fewer than two untreated real images (class {bench.assay.classes[0]})")
    if not len(bench.treated):
        raise ValueError("no treated real image")


def _empty(bench: Bench, rows: Rows) -> list[Finding]:
    """Images without a cell: none may score above the real 5th percentile, none may be let off without a value."""
    rng, some = bench.rng(NAME), rows[: bench.n]
    images, target = bench.images(some), bench.target[some]
    whole = bench.real(rows).value
    white = torch.from_numpy(rng.random(images.shape, dtype=np.float32))
    blank = torch.stack([torch.full_like(images[0], level) for level in BLANKS])
    # Every blank under every label: there are few of both.
    labels = np.unique(target)
    nulls = {
        "noise": bench.score(white, target),
        "matched noise": bench.score(_matched(images, rng), target),
        "blank": bench.score(blank.repeat_interleave(len(labels), 0), np.tile(labels, len(blank))),
    }
    findings = []
    for null, scores in nulls.items():
        for name in bench.suite.rewards:
            what = f"Share of images of {EMPTY[null]} above the lowest twentieth of real images, or without a value."
            if whole[name].isna().all():
                findings.append(not_judged(NAME, name, what, "<= 0", "real images have no value"))
                continue
            floor = float(whole[name].quantile(FLOOR))
            let_off = scores.value[name].isna().to_numpy()
            above = (scores.value[name].to_numpy() > floor + 1e-6) | let_off
            share = float(above.mean())
            reason = (
                "" if not share else "left without a value" if let_off.any() else "empty images score like real ones"
            )
            details = {"null": null, "real_floor": floor, "highest": float(scores.value[name].max())}
            interval = share_interval(above)
            findings.append(Finding(NAME, name, what, share, interval, "<= 0", share == 0, len(above), reason, details))
    return findings


def _matched(images: Tensor, rng: np.random.Generator) -> Tensor:
    grain = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    mean, spread = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    return (mean + spread * grain).clamp(0, 1)
