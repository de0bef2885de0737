"""The numbers of a report: by reward, by class, by reason, and the sentences that say what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from biorewards.assay import TREATED
from biorewards.report.wording import number, percent, wording
from biorewards.reward import UNSCORED, Reason

if TYPE_CHECKING:
    from biorewards.assay import Assay

QUANTILES = ("q05", "q25", "q50", "q75", "q95")
NO_LABEL = "(no label)"
EMPTY = tuple(reason.name for reason in (Reason.NO_NUCLEUS, Reason.NO_CELL, Reason.BLANK))
MISSING = tuple(reason.name for reason in UNSCORED)
#: Generated spread over real spread of a measure, below which the text warns of a generator that draws the mean.
NARROW = 0.6


@dataclass(frozen=True)
class Cell:
    """One class under one reward: the mean value, its number of images, and how far below real it lies (0 to 1)."""

    mean: float
    n: int
    shade: float


def row_classes(scores: pd.DataFrame) -> pd.Series:
    """The class of each row as text: its MoA, else its compound, else "(no label)"; as in the summary."""
    label = pd.Series(NO_LABEL, index=scores.index, dtype=object)
    for column in ("Metadata_Compound", "Metadata_MoA"):
        if column in scores:
            given = scores[column].notna() & (scores[column].astype(str) != "")
            label = label.mask(given, scores[column].astype(str))
    return label


def class_order(classes: pd.Series, assay: Assay) -> list[str]:
    """Classes that occur: the assay's first, in its order (control first), then others, unlabelled last."""
    present = set(classes)
    known = [name for name in assay.classes if name in present]
    others = sorted(present - set(known) - {NO_LABEL})
    return [*known, *others, *([NO_LABEL] if NO_LABEL in present else [])]


def reference(assay: Assay, name: str) -> pd.DataFrame:
    """What a measure was held against: mean and quantiles by class, NaN where the assay has none.

    A class with too few real images shows the pooled treated ones, as its reward was scored.
    """
    table = assay.statistics[assay.statistics["measure"] == name].set_index("class")[["mean", *QUANTILES]]
    own = table.reindex(assay.classes)
    _, _, reason = assay.reference(name, torch.arange(len(assay.classes)))
    pooled = (reason == Reason.POOLED_REFERENCE).numpy()
    none = (reason == Reason.NO_REFERENCE).numpy()
    if pooled.any():
        own[pooled] = table.loc[TREATED].to_numpy()
    own[none] = np.nan
    return own


def empty_rows(scores: pd.DataFrame, name: str, names: list[str]) -> pd.Series:
    """(N,) bool: nothing was found in the crop, as this reward (or, for a total, any reward) says."""
    used = [name] if name in names else names
    found_nothing = pd.concat([scores[f"Reason_{each}"].isin(EMPTY) for each in used], axis=1)
    return found_nothing.any(axis=1)


def reason_table(scores: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Counts of every reason that occurs (rows) under every reward (columns)."""
    counts = {name: scores[f"Reason_{name}"].value_counts() for name in names}
    table = pd.DataFrame(counts).fillna(0).astype(int)
    return table.reindex([reason.name for reason in Reason if reason.name in table.index])


def class_means(
    scores: pd.DataFrame, classes: pd.Series, names: list[str], real: dict[str, float]
) -> dict[str, dict[str, Cell]]:
    """Mean value by class and reward. `real` is what real images score: the shade is the distance below it."""
    out: dict[str, dict[str, Cell]] = {}
    for name in names:
        value = scores[f"Reward_{name}"]
        span = 1.0 if float(value.min(skipna=True) or 0) >= 0 else 10.0
        for label, part in value.groupby(classes):
            mean, n = float(part.mean()), int(part.notna().sum())
            below = real.get(name, np.nan) - mean
            shade = float(np.clip(below / span, 0, 1)) if np.isfinite(below) else 0.0
            out.setdefault(str(label), {})[name] = Cell(mean, n, round(shade, 3))
    return out


def sentence(
    scores: pd.DataFrame, classes: pd.Series, name: str, assay: Assay, real: float | None, worst: str | None
) -> str:
    """One sentence in plain words: which class does worst in this reward, and in which direction its measure is off."""
    value = scores[f"Reward_{name}"]
    n = int(value.notna().sum())
    if not n:
        return ""
    compared = "" if real is None else f"; real images score {number(real)}"
    if worst is None or classes.nunique() < 2:
        return f"Mean {number(float(value.mean()))} over {n} images{compared}."
    here = classes == worst
    mean, count = float(value[here].mean()), int(value[here].notna().sum())
    text = f"Worst in {worst}: mean {number(mean)} over {count} images{compared}."
    empty = scores[f"Reason_{name}"].isin(EMPTY)
    found = scores.loc[here & ~empty, f"Measure_{name}"].dropna()
    theirs = reference(assay, name)["mean"].to_dict().get(worst, np.nan)
    if np.isfinite(theirs) and len(found):
        told = wording(name, assay.pixel_size)
        ours = float(found.mean())
        unit = f" {told.unit}" if told.unit else ""
        text += f" {told.measure[:1].upper()}{told.measure[1:]}: {number(ours)}{unit} on average, "
        text += f"{number(theirs)}{unit} in real images"
        text += f" ({percent(abs(ours / theirs - 1))} {'above' if ours > theirs else 'below'})." if theirs else "."
    if nothing := int((here & empty).sum()):
        text += f" In {nothing} of its images nothing was found."
    return text


def summary_rows(summary: dict[str, Any], names: list[str], pixel_size: float | None) -> list[dict[str, Any]]:
    """Rows of the summary table, rewards first; a total that is missing everywhere is left out."""
    rows = []
    for name, row in summary["rewards"].items():
        total = name not in names
        if total and not row["n"]:
            continue
        # Narrower than real is a fault where real images differ (−z²), not in a share that is right at 1.
        squared = row["mean"] is not None and row["mean"] < 0
        narrow = squared and row["spread_ratio"] is not None and row["spread_ratio"] < NARROW
        title = wording(name, pixel_size).title
        rows.append({**row, "name": name, "title": title, "total": total, "narrow": narrow, "squared": squared})
    return rows


def words(summary: dict[str, Any], rows: list[dict[str, Any]], scores: pd.DataFrame) -> list[tuple[str, str]]:
    """The report's first lines, (kind, text) with kind "" or "warn"."""
    titles = {row["name"]: row["title"] for row in rows}
    out: list[tuple[str, str]] = []
    if furthest := summary["furthest"]:
        out.append(
            (
                "",
                f"Furthest from real images: {furthest['class']} in {titles[furthest['reward']].lower()}, mean "
                f"{number(furthest['mean'])} where real images score {number(furthest['real_mean'])}.",
            )
        )
    behind = [row["title"].lower() for row in rows if _below(row)]
    ahead = [row["title"].lower() for row in rows if _above(row)]
    if behind:
        out.append(("", f"Below real images by more than chance: {', '.join(behind)}."))
    if ahead:
        out.append(
            ("warn", f"Better than real images: {', '.join(ahead)}. Images that are all near the mean score so.")
        )
    if narrow := [row["title"].lower() for row in rows if row["narrow"]]:
        out.append(("warn", f"The images vary too little ({', '.join(narrow)}): see the spread ratio."))
    nothing = scores[[name for name in scores.columns if name.startswith("Reason_")]].isin(EMPTY).any(axis=1)
    if nothing.any():
        out.append(("warn", f"In {_share(int(nothing.sum()), len(scores))} no nucleus or no cell was found."))
    for key, what in (
        ("unreadable", "could not be read"),
        ("unlabelled", "have no label: only the label-free rewards are scored there"),
        ("unknown_label", "have a label that the assay does not know"),
    ):
        if summary[key]:
            out.append(("warn" if key != "unlabelled" else "", f"{_share(summary[key], len(scores))} {what}."))
    return out or [("", "Nothing stands out.")]


def _below(row: dict[str, Any]) -> bool:
    return row["real_mean"] is not None and row["ci_high"] is not None and row["ci_high"] < row["real_mean"]


def _above(row: dict[str, Any]) -> bool:
    return row["real_mean"] is not None and row["ci_low"] is not None and row["ci_low"] > row["real_mean"]


def _share(count: int, total: int) -> str:
    noun = "image" if count == 1 else "images"
    return f"{count:,} {noun} ({percent(count / total)})".replace(",", "\u202f")
