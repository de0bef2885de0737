"""What the report says about each reward and each reason, in plain words, and how it prints numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from biorewards.reward import Reason


@dataclass(frozen=True)
class Wording:
    """Texts of one reward: a title, what is asked, the name and unit of its measure, and which way is good."""

    title: str
    question: str
    measure: str
    unit: str
    direction: str


_FRACTION = "From 0 to 1; higher is better."
_SQUARED = "The best value is 0, real images of the class average about −1, and −25 is the worst there is."

#: "{area}" becomes the assay's unit of area.
WORDINGS = {
    "moa": Wording(
        "Mechanism of action",
        "Does the image look like the class that its label names? The measure is the calibrated probability that "
        "the assay's classifier gives to that class.",
        "probability of the labelled class",
        "",
        _FRACTION,
    ),
    "nucleus_in_cytoplasm": Wording(
        "Nucleus inside its cell",
        "Do the nuclei lie inside cells? The measure is the share of all nuclear pixels of the crop that lie inside "
        "any cell mask.",
        "nuclear pixels inside a cell, share",
        "",
        _FRACTION + " Real cells are close to 1.",
    ),
    "nucleus_roundness": Wording(
        "Nucleus roundness",
        "Are the nuclei as round as real ones of the class? The measure is the mean form factor 4πA/P² over nuclei "
        "that the border does not cut: 1 is a disc. The value is −z², so too round loses as much as too ragged.",
        "form factor (1 = disc)",
        "",
        _SQUARED,
    ),
    "nucleus_size": Wording(
        "Nucleus size",
        "Is the largest nucleus as large as in real images of the class? The value is −z² of its area.",
        "area of the largest nucleus",
        "{area}",
        _SQUARED,
    ),
    "cytoplasm_size": Wording(
        "Cell size",
        "Is the largest cell as large as in real images of the class? The value is −z² of the area of its mask, the "
        "nucleus included.",
        "area of the largest cell",
        "{area}",
        _SQUARED,
    ),
    "nucleus_count": Wording(
        "Number of nuclei",
        "Does the crop hold as many nuclei as real crops of the class? The value is −z² of their number.",
        "nuclei in the crop",
        "",
        _SQUARED,
    ),
    "cytoplasm_count": Wording(
        "Number of cells",
        "Does the crop hold as many cells as real crops of the class? The value is −z² of their number.",
        "cells in the crop",
        "",
        _SQUARED,
    ),
    "total": Wording(
        "Total",
        "The weighted sum of the rewards. It is missing wherever one of its parts is missing.",
        "weighted sum",
        "",
        "Higher is better.",
    ),
    "total_label_free": Wording(
        "Total without labels",
        "The weighted sum of the rewards that need no label. It is another quantity than the full sum.",
        "weighted sum",
        "",
        "Higher is better.",
    ),
}

REASONS = {
    Reason.OK: "Scored against real images of the image's own class.",
    Reason.NO_TARGET: "The image has no label, so the question cannot be asked. The value is missing.",
    Reason.UNKNOWN_TARGET: "The label is not one that the assay knows. The value is missing.",
    Reason.NO_REFERENCE: "The assay holds no reference for this class. The value is missing.",
    Reason.POOLED_REFERENCE: "Scored against all treated classes together: too few real images of the own class.",
    Reason.CARRIED_REFERENCE: "Scored against a reference carried over from whole wells: no real crops of this class.",
    Reason.NO_NUCLEUS: "No nucleus was found. The worst value.",
    Reason.NO_CELL: "No cell was found. The worst value.",
    Reason.BLANK: "The crop has no contrast, or pixels that are not finite. The worst value.",
    Reason.BAD_IMAGE: "The file could not be read. All values are missing.",
}


def wording(name: str, pixel_size: float | None) -> Wording:
    """Texts for a reward; a reward that is not one of the seven is shown under its own name."""
    known = WORDINGS.get(name)
    if known is None:
        title = name.replace("_", " ").capitalize()
        return Wording(title, "A reward of the user's own.", "measure", "", "Higher is better.")
    area = "px²" if pixel_size is None else "µm²"
    return Wording(known.title, known.question, known.measure, known.unit.format(area=area), known.direction)


def number(value: float | None, whole: bool = False) -> str:
    """A number in three significant digits (or whole) with a real minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(value)
    if size >= 100 or whole:
        text = f"{value:,.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−").replace(",", "\u202f")


def percent(value: float | None) -> str:
    """A share in percent; "< 0.1 %" rather than a zero that is none."""
    if value is None or math.isnan(value):
        return "–"
    if 0 < value < 0.001:
        return "< 0.1\u00a0%"
    return f"{100 * value:.1f}\u00a0%" if 0 < value < 0.1 else f"{100 * value:.0f}\u00a0%"


def plain(value: object) -> str:
    """A setting or a card's entry as text: nested entries on lines of their own."""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
