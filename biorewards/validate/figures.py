"""Dose-response curves and the specificity matrix as inline SVG and table cells: plain geometry, no script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from biorewards.report.figures import ticks
from biorewards.validate.check import Finding
from biorewards.validate.specificity import MOST_FOREIGN
from biorewards.validate.wording import lesion_title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 44, 12, 26, 44


@dataclass(frozen=True)
class Curve:
    """One dose-response curve in SVG units: the line, the band of its interval, and the axes."""

    title: str
    width: int
    height: int
    points: list[tuple[float, float]]
    band: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    axis: str
    passed: bool | None
    label: str


def curve(finding: Finding, reward_title: str) -> Curve | None:
    """Mean reward over the doses of a lesion, equally spaced, with its 95 % band; None without a curve."""
    told = finding.details
    if "value" not in told or any(value is None for value in told["value"]):
        return None
    mean = [float(value) for value in told["value"]]
    low = [m if v is None else float(v) for m, v in zip(mean, told["low"], strict=True)]
    high = [m if v is None else float(v) for m, v in zip(mean, told["high"], strict=True)]
    bottom, top = min(low), max(high)
    pad = 0.05 * (top - bottom) or 0.1
    bottom, top = bottom - pad, top + pad

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / (len(mean) - 1), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (top - value) / (top - bottom), 1)

    forward = [f"{x(k)},{y(v)}" for k, v in enumerate(high)]
    back = [f"{x(k)},{y(low[k])}" for k in reversed(range(len(low)))]
    marks = ticks(bottom, top, 4)
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 1
    return Curve(
        title=lesion_title(str(told["lesion"])),
        width=WIDTH,
        height=HEIGHT,
        points=[(x(k), y(v)) for k, v in enumerate(mean)],
        band=" ".join([*forward, *back]),
        x_ticks=[(x(k), "none" if k == 0 else f"{dose:.3g}") for k, dose in enumerate(told["doses"])],
        y_ticks=[(y(mark), f"{mark:.{decimals}f}".replace("-", "−")) for mark in marks],
        axis=str(told["unit"]),
        passed=finding.passed,
        label=reward_title,
    )


def matrix(findings: list[Finding], rewards: list[str], owners: dict[str, str | None]) -> dict[str, Any] | None:
    """Rows (rewards) and columns (lesions) of the specificity matrix; None where there is none.

    A cell: response in real sd (None where it was not judged), share of the answer to its own, kind: own, foreign,
    explained, over (unexplained and above the threshold), or none.
    """
    told = {one.reward: one.details for one in findings if one.check == "specificity" and "responses" in one.details}
    lesions = [name for name in owners if any(name in details["responses"] for details in told.values())]
    if not lesions:
        return None
    rows = []
    for reward in (one for one in rewards if one in told):
        details = told[reward]
        cells = []
        for lesion in lesions:
            response, share = details["responses"].get(lesion), details["shares"].get(lesion)
            kind = "none" if response is None else "foreign"
            if owners[lesion] == reward:
                kind = "own"
            elif lesion in details["explained"]:
                kind = "explained"
            elif share is None:
                kind = "none"
            elif share > MOST_FOREIGN:
                kind = "over"
            strength = 0.0 if response is None else min(1.0, math.log1p(abs(response)) / math.log1p(20))
            cells.append({"response": response, "share": share, "kind": kind, "strength": round(strength, 2)})
        rows.append({"reward": reward, "cells": cells})
    return {"lesions": [(name, owners[name]) for name in lesions], "rows": rows}
