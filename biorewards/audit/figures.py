"""Intervals as inline SVG: one band a quantity, one mark with its interval a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biorewards.report.figures import ticks

LEFT, WIDTH, RIGHT, STEP, PAD, BOTTOM = 210, 640, 30, 13, 9, 38
#: Told apart by readers who see fewer colours, too (Okabe and Ito 2008, without yellow), then repeated.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4a8a", "#7a5c3e")
ANCHOR_COLOURS = {"real": "#1c2126", "copy-control": "#8a949e"}


@dataclass(frozen=True)
class Mark:
    """x, low, high and y in SVG units; beyond: -1 or 1 where the value lies left or right of the axis."""

    x: float
    low: float
    high: float
    y: float
    colour: str
    beyond: int
    text: str


@dataclass(frozen=True)
class Band:
    """One quantity: its label, its top and height, and its marks."""

    label: str
    top: float
    height: float
    marks: list[Mark]


@dataclass(frozen=True)
class Forest:
    """A finished figure, ready for the template. lines: (x, text) of values drawn through all bands."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    axis: str
    bands: list[Band]
    ticks: list[tuple[float, str]]
    lines: list[tuple[float, str]]


#: label -> sample -> (value, low, high)
Values = dict[str, dict[str, tuple[float, float, float]]]


def colours(names: list[str]) -> dict[str, str]:
    """A colour a sample; real images and copied controls always have theirs."""
    others = [name for name in names if name not in ANCHOR_COLOURS]
    return ANCHOR_COLOURS | {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(others)}


def forest(
    values: Values, palette: dict[str, str], axis: str, lines: dict[float, str], limits: tuple[float, float]
) -> Forest | None:
    """Draw values with their intervals; None where there is nothing to draw.

    lines: value -> text, drawn through all bands. limits: the axis never goes beyond; what lies there is drawn at its
    edge as an arrow.
    """
    spans = [v for one in values.values() for v in one.values()]
    if not spans:
        return None
    ends = np.array([*(e for span in spans for e in span if np.isfinite(e)), *lines])
    low, high = max(float(ends.min()), limits[0]), min(float(ends.max()), limits[1])
    pad = 0.04 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(float(LEFT + (np.clip(value, low, high) - low) / (high - low) * WIDTH), 1)

    bands, top = [], 6.0
    for label, one in values.items():
        marks = []
        for k, (name, (value, start, end)) in enumerate(one.items()):
            y = top + PAD + STEP * (k + 0.5)
            beyond = -1 if value < low else 1 if value > high else 0
            ends_at = [x(e) if np.isfinite(e) else x(value) for e in (start, end)]
            text = f"{name}: {value:.3g} ({start:.3g} to {end:.3g})"
            marks.append(Mark(x(value), ends_at[0], ends_at[1], y, palette[name], beyond, text))
        height = 2 * PAD + STEP * len(one)
        bands.append(Band(label, top, height, marks))
        top += height
    marked = ticks(low, high)
    decimals = max(0, -int(np.floor(np.log10(marked[1] - marked[0]) + 1e-9))) if len(marked) > 1 else 1
    return Forest(
        width=LEFT + WIDTH + RIGHT,
        height=top + BOTTOM,
        left=LEFT,
        right=LEFT + WIDTH,
        bottom=top,
        axis=axis,
        bands=bands,
        ticks=[(x(mark), f"{mark:.{decimals}f}".replace("-", "−")) for mark in marked],
        lines=[(x(value), text) for value, text in lines.items()],
    )
