"""Distributions as inline SVG: one row a class, what was scored drawn over what is real.

The drawing is plain geometry in a fixed coordinate system, so the page needs no script and no plotting library,
and its size does not grow with the number of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

GUTTER, WIDTH, ROW, TOP, BOTTOM, RIGHT = 210, 560, 28, 8, 40, 120
#: Points drawn a class. Sixty show the shape; more only hide the box behind them.
POINTS = 60
#: Classes drawn. An assay of hundreds of compounds shows its worst ones; the tables hold all.
CLASSES = 30


@dataclass(frozen=True)
class Row:
    """One class of a figure, in SVG units: `y` is the row's middle.

    band, box: q05, q25, q50, q75, q95 of the real images and of the n measured ones. mean: of the reward.
    """

    label: str
    y: float
    n: int
    band: list[float] | None
    box: list[float]
    points: list[tuple[float, float]]
    mean: float


@dataclass(frozen=True)
class Figure:
    """A finished distribution figure, ready for the template."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    axis: str
    rows: list[Row]
    ticks: list[tuple[float, str]]
    left_out: int
    beyond: int


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers between `low` and `high`, about `wanted` of them, in steps of 1, 2 or 5 times ten to a power."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def distribution(
    measure: pd.Series, value: pd.Series, group: pd.Series, reference: pd.DataFrame, order: list[str], axis: str
) -> Figure | None:
    """Draw a measure by class against the real quantiles.

    measure, value: (N,) the statistic in its unit and the reward, NaN where missing. A row without a measure is
        not drawn, but its value counts in the mean.
    group: (N,) the class of each row.
    reference: indexed by class, columns q05 q25 q50 q75 q95 in the measure's unit; NaN or no row where unknown.
    order: classes in the order to draw them; those without a measure are left out.
    Returns None where there is nothing to draw.
    """
    means = value.groupby(group).mean()
    frame = pd.DataFrame({"measure": measure, "group": group})
    frame = frame[np.isfinite(frame["measure"])]
    if frame.empty:
        return None
    drawn = set(frame["group"])
    present = [name for name in order if name in drawn]
    left_out = max(0, len(present) - CLASSES)
    if left_out:
        worst = set(means.loc[present].sort_values().index[:CLASSES])
        present = [name for name in present if name in worst]
    frame = frame[frame["group"].isin(present)]
    real = reference.reindex(present)[["q05", "q25", "q50", "q75", "q95"]]

    ends = [*np.nanquantile(frame["measure"], [0.01, 0.99])]
    if real.notna().to_numpy().any():
        ends += [np.nanmin(real.to_numpy()), np.nanmax(real.to_numpy())]
    low, high = float(min(ends)), float(max(ends))
    pad = 0.04 * (high - low) or 0.1 * abs(high) or 0.5
    low, high = low - pad, high + pad
    marks = ticks(low, high)

    def x(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.round(GUTTER + (np.clip(values, low, high) - low) / (high - low) * WIDTH, 1)

    rng = np.random.default_rng(0)
    rows = []
    for index, (name, part) in enumerate((name, frame[frame["group"] == name]) for name in present):
        y = TOP + ROW * (index + 0.5)
        numbers = part["measure"].to_numpy(float)
        shown = numbers if len(numbers) <= POINTS else rng.choice(numbers, POINTS, replace=False)
        jitter = np.round(y + rng.uniform(-0.3, 0.3, len(shown)) * ROW, 1)
        band = None if real.loc[name].isna().any() else [float(v) for v in x(real.loc[name].to_numpy())]
        box = [float(v) for v in x(np.quantile(numbers, [0.05, 0.25, 0.5, 0.75, 0.95]))]
        points = [(float(px), float(py)) for px, py in zip(x(shown), jitter, strict=True)]
        rows.append(Row(str(name), y, len(numbers), band, box, points, float(means[name])))
    outside = (frame["measure"] < low) | (frame["measure"] > high)
    return Figure(
        width=GUTTER + WIDTH + RIGHT,
        height=TOP + ROW * len(rows) + BOTTOM,
        left=GUTTER,
        right=GUTTER + WIDTH,
        bottom=TOP + ROW * len(rows),
        axis=axis,
        rows=rows,
        ticks=[(float(x(mark)), _label(mark, marks)) for mark in marks],
        left_out=left_out,
        beyond=int(outside.sum()),
    )


def _label(mark: float, marks: list[float]) -> str:
    """A tick's text, with as many decimals as the step needs."""
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{mark:,.{decimals}f}".replace("-", "−").replace(",", "\u202f")
