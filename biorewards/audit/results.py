"""An audit as plain numbers: one long table, and one JSON document."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from biorewards.audit.bootstrap import bounded
from biorewards.audit.models import Audit, Metric, Row

#: Weighted distance of all rewards from real images: what models are ranked by.
GAP = Metric("gap", "lower")


def measured(audit: Audit, row: Row, metric: Metric, scope: str = "", group: str = "") -> dict[str, Any]:
    """value, ci_low, ci_high, anchored, anchored_low, anchored_high, better_than_real; None where it does not exist."""
    draws = (row.groups.get((scope, group), {}) if scope else row.draws).get(metric.name)
    found: dict[str, Any] = dict.fromkeys(("value", "ci_low", "ci_high", "anchored", "anchored_low", "anchored_high"))
    if draws is not None:
        found |= _three("value", "ci_low", "ci_high", draws)
        score = audit.anchored(row, metric, scope, group)
        if score is not None:
            found |= _three("anchored", "anchored_low", "anchored_high", score)
    return found | {"better_than_real": metric.anchored and audit.beyond_real(row, metric, scope, group)}


def _three(value: str, low: str, high: str, draws: Any) -> dict[str, float | None]:
    ends = bounded(draws)
    return {value: _plain(float(draws[0])), low: _plain(ends[0]), high: _plain(ends[1])}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(audit: Audit) -> pd.DataFrame:
    """One line a row, metric and group: row, kind, scope (all, class, compound), group, metric, n and `measured`."""
    lines = []
    for row in audit.rows.values():
        parts = [("", "", row.n, row.draws), *((*key, row.group_n[key], own) for key, own in row.groups.items())]
        for scope, group, n, draws in parts:
            about = {"row": row.name, "kind": row.kind, "scope": scope or "all", "group": group, "n": n}
            lines += [
                about | {"metric": metric.name} | measured(audit, row, metric, scope, group)
                for metric in [GAP, *audit.metrics]
                if metric.name in draws
            ]
    frame = pd.DataFrame(lines)
    numbers = [name for name in frame if name not in ("row", "kind", "scope", "group", "metric", "better_than_real")]
    return frame.astype(dict.fromkeys(numbers, float)).astype({"n": int})


def document(audit: Audit, about: dict[str, Any]) -> dict[str, Any]:
    """The audit for JSON. `about`: settings, notes and provenance, put first."""
    rows = {}
    for row in audit.rows.values():
        place = audit.places.get(row.name)
        rows[row.name] = {
            "kind": row.kind,
            "n": row.n,
            "n_at_equal_numbers": row.n_equal,
            "rank": None if place is None or place.best is None else [place.best, place.worst],
            "flags": [
                {"kind": flag.kind, "text": " ".join([flag.text, ", ".join(flag.metrics)]).strip()}
                for flag in audit.flags.get(row.name, [])
            ],
            "metrics": {metric.name: measured(audit, row, metric) for metric in [GAP, *audit.metrics]},
        }
    return about | {
        "conditions": {"level": list(audit.conditions.level), "number": len(audit.conditions.names)},
        "gap_by_chance": audit.floor,
        "better_than": [list(pair) for pair in audit.better_than],
        "rows": rows,
    }
