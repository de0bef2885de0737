"""What the audit's page says about its quantities, and the sentences that it opens with."""

from __future__ import annotations

from collections.abc import Sequence

from biorewards.audit.models import Audit, Flag, Place
from biorewards.audit.opinion import Change, Opinion
from biorewards.report.wording import number, wording

#: metric -> title, what it is
METRICS = {
    "gap": ("Gap to real", "weighted distance of the seven mean rewards from those of real images: Σ weight · |u − r|"),
    "map": ("Mean average precision", "of retrieving real images of the same class, by CellProfiler's features"),
    "moa_accuracy": ("MoA accuracy", "share of images whose likeliest class is the one asked for"),
    "moa_macro_f1": ("MoA macro F1", "mean F1 over classes"),
    "frechet": ("Fréchet distance", "to the reference images in the encoder's features, at equal numbers; no FID"),
    "kernel": ("Kernel distance", "unbiased MMD² with KID's kernel in the encoder's features; no KID"),
    "precision": ("Precision", "share of images inside the neighbourhood of a reference image"),
    "recall": ("Recall", "share of reference images inside the neighbourhood of an image"),
    "density": ("Density", "neighbourhoods of reference images that an image lies in, over 5"),
    "coverage": ("Coverage", "share of reference images whose neighbourhood holds an image"),
    "diversity": ("Diversity", "spread of the features within conditions, over that of held-out real images"),
    "train_distance": ("Distance to nearest", "to the nearest reference image, over that of held-out real images"),
    "worst_share": ("At a worst value", "share of images with any reward at its worst: nothing found, or |z| ≥ 5"),
    "near_copies": ("Near-copies of reference", "share of images whose thumbnail is that of a reference image"),
    "duplicates": ("Near-copies of each other", "share of images whose thumbnail is that of another of the model"),
    "leaked": ("Near-copies of held-out", "share of images whose thumbnail is that of a held-out image"),
    "control_copies": ("Near-copies of controls", "share of treated images whose thumbnail is that of a control"),
}
VARIETY = ("precision", "recall", "density", "coverage", "diversity", "train_distance")
COPIES = ("near_copies", "leaked", "duplicates", "control_copies", "worst_share")
SHARES = (*COPIES, "moa_accuracy", "precision", "recall", "coverage")


def title(metric: str) -> str:
    """Name of a metric for a reader."""
    if metric.startswith("spread_ratio_"):
        return wording(metric.removeprefix("spread_ratio_"), None).title
    if metric.startswith("worst_") and metric not in METRICS:
        return f"At worst: {wording(metric.removeprefix('worst_'), None).title.lower()}"
    return METRICS[metric][0] if metric in METRICS else wording(metric, None).title


def quantity(change: Change) -> str:
    """What two opinions differ in: one quantity, or the second's beside the first's."""
    own, theirs = title(change.reward).lower(), title(change.against).lower()
    return own if own == theirs else f"{own} (against {theirs})"


def said(flag: Flag) -> str:
    """A flag in words."""
    return " ".join([flag.text, ", ".join(title(name).lower() for name in flag.metrics)]).strip()


def fine(value: float | None) -> str:
    """`number`, with three decimals below 0.1: kernel distances are small."""
    if value is None or not 0.0005 <= abs(value) < 0.1:
        return number(value)
    return f"{value:.3f}".replace("-", "−")


def sentences(audit: Audit, opinions: Sequence[Opinion]) -> list[tuple[str, str]]:
    """The page's first lines: (kind, text), kind "" or "warn"."""
    out = [("", _ranking(audit))]
    for row in audit.models:
        value, ranked = float(row.draws["gap"][0]), audit.places[row.name].best is not None
        if ranked and value <= audit.floor:
            chance = f"its gap of {number(value)} is within what real images show by chance ({number(audit.floor)})"
            out.append(("", f"{row.name} cannot be told from real images by these rewards: {chance}."))
        if flags := audit.flags[row.name]:
            out.append(
                ("warn", f"{row.name}: {'; '.join(said(flag) for flag in flags)}.{' Not ranked.' * (not ranked)}")
            )
    for opinion in opinions:
        against = [c for c in opinion.changes if c.reversed]
        says = f"Second opinion ({opinion.name}): {_placed(opinion.places) or 'no model is ranked'}"
        if against:
            pairs = "; ".join(f"{c.a} and {c.b} in {quantity(c)}" for c in against)
            out.append(("warn", f"{says}. It reverses the order of {pairs}."))
        else:
            out.append(("", f"{says}. It reverses no order that the first verifiers settle."))
    return out


def _ranking(audit: Audit) -> str:
    placed = _placed(audit.places)
    if not placed:
        return "No model is ranked."
    return f"Rank by gap to real images, as far as the intervals settle it: {placed}."


def _placed(places: dict[str, Place]) -> str:
    """Models that have a place, from the best on."""
    placed = {name: place for name, place in places.items() if place.best is not None}
    parts = []
    for name, place in sorted(placed.items(), key=lambda pair: (pair[1].best or 0, pair[1].worst or 0)):
        parts.append(f"{name} {place.best if place.best == place.worst else f'{place.best} to {place.worst}'}")
    return ", ".join(parts)
