"""Check 7: plate against treatment. Untreated cells are the same everywhere; a reward that tells their plates reads
style, and where treatments lie on plates of their own it can be earned without a treatment."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats, real_under_every_label
from biorewards.validate.statistics import auroc
from biorewards.validate.variance import centred, explained

NAME = "plates"
#: Share of the variance of untreated cells that plates may explain: a large effect begins there (Cohen 1988, eta^2).
MOST_PLATE = 0.14
#: How well untouched controls may be told by whether the treatment that they are asked for lies on their plate.
MOST_AUROC = 0.6
#: Controls of a plate, plates, and controls on either side of a lay-out that are needed.
LEAST_CONTROLS, LEAST_PLATES, LEAST_SIDE = 5, 2, 20

Groups = npt.NDArray[Any]


def plates(bench: Bench) -> list[Finding]:
    """Variance of untreated cells by plate beside that of treatments; and whether lay-out leaks into controls."""
    names = list(bench.suite.rewards)
    what = "Share of the variance among untreated cells, under all labels, that their plate explains (omega^2)."
    threshold = f"<= {MOST_PLATE}, and not above the treatment's share"
    rows = bench.controls
    plate = bench.rows.plate.to_numpy()
    known = rows[plate[rows] != ""]
    counts = {p: int((plate[known] == p).sum()) for p in sorted(set(plate[known]))}
    rows = known[[counts[p] >= LEAST_CONTROLS for p in plate[known]]]
    if len(set(plate[rows])) < LEAST_PLATES:
        reason = (
            f"untreated cells of two plates are needed, {LEAST_CONTROLS} or more of each; there are {counts or 'none'}"
        )
        return [not_judged(NAME, name, what, threshold, reason) for name in names]
    treated = bench.some(4 * bench.n, bench.treated[plate[bench.treated] != ""])
    of_controls, of_treated = real_under_every_label(bench, rows), real_under_every_label(bench, treated)
    findings = []
    for name in names:
        values = _usable(of_controls[name])
        if not values.shape[1] or not values.std(0).any():
            findings.append(
                not_judged(NAME, name, what, threshold, "untreated cells have no value, or all the same one")
            )
            continue
        group = plate[rows]

        def share(drawn: Rows, values: Floats = values, group: Groups = group) -> float:
            return explained(values[drawn], group[drawn])

        value, low, high = bench.interval_of(share, len(rows))
        class_share = _of_treatment(of_treated[name], bench.target[treated], plate[treated])
        passed, reason = _verdict(value, low, class_share, len(rows))
        details = {
            "treatment_share": class_share, "plates": counts, "per_plate": {
                str(p): float(values[group == p].mean()) for p in sorted(set(group))
            },
        }  # fmt: skip
        findings.append(Finding(NAME, name, what, value, (low, high), threshold, passed, len(rows), reason, details))
    return findings + _lay_out(bench, rows, of_controls)


def _verdict(value: float, low: float, class_share: float, n: int) -> tuple[bool | None, str]:
    """Fails where the interval leaves no doubt; where the figure is over the bar, but chance may be why, it is open."""
    if low > max(class_share, 0.0):
        return False, "it tells the plates of untreated cells apart better than it tells treatments"
    if low > MOST_PLATE:
        return False, "it tells the plates of untreated cells apart"
    if value > MOST_PLATE:
        return None, f"{n} untreated cells do not settle it: the interval reaches below the bar"
    return True, ""


def _usable(values: Floats) -> Floats:
    """The columns (labels) under which every image has a value."""
    return values[:, np.isfinite(values).all(0)]


def _of_treatment(values: Floats, target: Groups, plate: Groups) -> float:
    """Share of the variance of treated cells that their class explains within plates."""
    values = _usable(values)
    if len(values) < 2 or not values.shape[1]:
        return float("nan")
    return explained(centred(values, plate), target)


def _lay_out(bench: Bench, rows: Rows, values: dict[str, Floats]) -> list[Finding]:
    """Untouched controls asked for a treatment of their own plate against those asked for one of other plates."""
    what = "How well untouched controls are told by whether their plate holds the treatment they are asked for (AUROC)."
    threshold = f"<= {MOST_AUROC}, or 0.5 within the interval"
    plate = bench.rows.plate.to_numpy()
    holds = {p: set(bench.target[plate == p].tolist()) for p in set(plate[rows])}
    classes = [k for k in np.unique(bench.target[bench.treated]) if len({k in holds[p] for p in holds}) == 2]
    here = np.array([[k in holds[p] for k in classes] for p in plate[rows]], bool).reshape(len(rows), -1)
    findings = []
    for name in bench.suite.rewards:
        if getattr(bench.suite.rewards[name], "label_free", False):
            findings.append(not_judged(NAME, name, what, threshold, "it asks for no label"))
            continue
        if not classes or min(here.any(1).sum(), (~here).any(1).sum()) < LEAST_SIDE:
            reason = "every plate holds every class: plate and treatment are not confounded in these images"
            findings.append(not_judged(NAME, name, what, threshold, reason))
            continue
        own = values[name][:, classes]
        if not np.isfinite(own).all(0).any():
            findings.append(not_judged(NAME, name, what, threshold, "untreated cells have no value under these labels"))
            continue
        own = np.where(np.isfinite(own).all(0), own, np.nan)
        # Labels differ in what any control earns under them: that is no matter of plates.
        own = own - own.mean(0)

        def told(drawn: Rows, own: Floats = own) -> float:
            return auroc(own[drawn][here[drawn]], own[drawn][~here[drawn]])

        value, low, high = bench.interval_of(told, len(rows))
        passed = value <= MOST_AUROC or low <= 0.5
        reason = "" if passed else "an untouched control earns more when its plate holds the treatment"
        findings.append(Finding(NAME, name, what, value, (low, high), threshold, passed, len(rows), reason))
    return findings
