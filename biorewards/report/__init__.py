"""A score table as one HTML file that opens anywhere: no network, no script."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from biorewards import __version__
from biorewards.io.tables import atomic
from biorewards.report import crops, figures, tables, wording
from biorewards.reward import Reason

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from biorewards.io.images import FloatImage
    from biorewards.reward import Suite

#: Unreadable files listed by name; the table holds all of them.
BAD_LISTED = 100
ROLE_COLOURS = {"actin": "#f00", "tubulin": "#0c0", "dna": "#22f"}


def write_report(
    path: Path,
    scores: pd.DataFrame,
    *,
    assay: Assay,
    manifest: pd.DataFrame,
    read: Callable[[int], FloatImage],
    suite: Suite,
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write the report of a score table as one self-contained HTML file (a few hundred kB, whatever the row count).

    scores: the score table, one row an image; manifest: its rows in the same order.
    read: row position -> (C, H, W) float32 in [0, 1]; called again for the best and worst crops that are shown,
        whose masks are found again with `assay.segment`. May raise ImageError or OSError for a file that is gone.
    summary: what `biorewards.scoring.summarise` returned for this table.
    settings: shown under "How it was made", in the order given.

    Raises ValueError when table and manifest differ in length.
    """
    if len(scores) != len(manifest):
        raise ValueError(
            f"the score table has {len(scores)} rows and the manifest {len(manifest)}; they must be the same images"
        )
    html = render(scores.reset_index(drop=True), assay, read, suite, summary, settings)
    with atomic(Path(path)) as (temporary,):
        # File names may hold bytes that are no text; they are shown, not refused.
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def render(
    scores: pd.DataFrame,
    assay: Assay,
    read: Callable[[int], FloatImage],
    suite: Suite,
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> str:
    """The page as text; arguments as for `write_report`."""
    names = list(suite.rewards)
    classes = tables.row_classes(scores)
    order = tables.class_order(classes, assay)
    rows = tables.summary_rows(summary, names, assay.pixel_size)
    real = {row["name"]: row["real_mean"] for row in rows if row["real_mean"] is not None}
    # Where the full sum exists, the sum without labels has a row in the tables but no section of its own.
    shown = [row for row in rows if row["name"] != "total_label_free" or "total" not in {each["name"] for each in rows}]
    sections = [_section(scores, classes, order, row, names, assay) for row in shown]
    pictures = crops.load_crops(sorted({place for section in sections for place in section["rows"]}), read, assay)
    bad = scores[scores[f"Reason_{names[0]}"] == Reason.BAD_IMAGE.name]
    counts = tables.reason_table(scores, names)
    environment = Environment(
        loader=PackageLoader("biorewards.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "percent": wording.percent,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    return environment.get_template("template.html.j2").render(
        title=str(settings.get("source", "Scores")),
        facts=[
            f"{len(scores):,} images".replace(",", " "),
            f"{len(set(order) - {tables.NO_LABEL}) or 'no'} classes",
            f"assay {assay.name}",
            f"fingerprint {suite.fingerprint}",
        ],
        words=tables.words(summary, rows, scores),
        summary=rows,
        order=order,
        class_sizes=classes.value_counts().to_dict(),
        by_class=tables.class_means(scores, classes, [row["name"] for row in rows if row["n"]], real),
        sections=sections,
        linked={section["name"] for section in sections},
        crops=pictures,
        roles=[(role, ROLE_COLOURS[role]) for role in assay.channels if role in ROLE_COLOURS],
        names=names,
        titles={row["name"]: row["title"] for row in rows},
        reasons=[(reason, counts.loc[reason].tolist(), wording.REASONS[Reason[reason]]) for reason in counts.index],
        bad={"count": len(bad), "rows": _bad_files(bad.head(BAD_LISTED))},
        total=len(scores),
        made=_made(assay, suite, settings),
        card=[(key, wording.plain(value)) for key, value in assay.card.items()],
    )


def _section(
    scores: pd.DataFrame,
    classes: pd.Series,
    order: list[str],
    row: dict[str, Any],
    names: list[str],
    assay: Assay,
) -> dict[str, Any]:
    """Everything the template needs for one reward or total."""
    name = row["name"]
    told = wording.wording(name, assay.pixel_size)
    value = scores[f"Reward_{name}"].astype(float)
    empty = tables.empty_rows(scores, name, names)
    single = name in names
    measure = scores[f"Measure_{name}"].astype(float) if single else value
    reference = tables.reference(assay, name)
    axis = told.measure + (f", {told.unit}" if told.unit else "")
    # A crop where nothing was found has no measure to draw; the reasons count it.
    figure = figures.distribution(measure.mask(empty), value, classes, reference, order, axis)
    best, worst = crops.best_and_worst(value, empty)
    reasons = scores[[f"Reason_{each}" for each in ([name] if single else names)]].to_numpy(str)
    files, values, numbers = scores["Metadata_File"].to_numpy(), value.to_numpy(float), measure.to_numpy(float)

    real_mean = reference["mean"].reindex(classes).to_numpy(float)
    silent = (Reason.OK.name,) if single else (Reason.OK.name, *tables.MISSING)

    def shown(place: int) -> dict[str, Any]:
        measured = float(numbers[place])
        reason = " ".join(dict.fromkeys(text for text in reasons[place] if text not in silent))
        return {
            "row": place,
            "file": str(files[place]),
            "value": float(values[place]),
            "measure": measured if single and measured == measured and measured != values[place] else None,
            "real": float(real_mean[place]) if single and real_mean[place] == real_mean[place] else None,
            "unit": told.unit,
            "whole": name.endswith("_count"),
            "label": str(classes[place]),
            "reason": reason,
        }

    # Where all images have one value, none is the worst.
    ties = int((value == value.min()).sum()) if value.min() < value.max() else 0
    return {
        "name": name,
        "wording": told,
        "sentence": tables.sentence(scores, classes, name, assay, row["real_mean"], row["worst_class"])
        if single
        else "",
        "figure": figure,
        "best": [shown(row) for row in best],
        "worst": [shown(row) for row in worst],
        "ties": ties if ties > len(worst) else 0,
        "rows": [*best, *worst],
    }


def _bad_files(bad: pd.DataFrame) -> list[tuple[str, str]]:
    messages = bad["Metadata_Error"] if "Metadata_Error" in bad else pd.Series("", index=bad.index)
    return [(str(file), str(text)) for file, text in zip(bad["Metadata_File"], messages.fillna(""), strict=True)]


def _made(assay: Assay, suite: Suite, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to make the same table again."""
    area = "unknown" if assay.pixel_size is None else f"{assay.pixel_size:g} µm"
    rows = [
        ("biorewards", __version__),
        ("Fingerprint", suite.fingerprint),
        ("Assay", f"{assay.name} ({assay.fingerprint})"),
        ("Segmenter", assay.segmenter_name),
        ("Channels", ", ".join(f"{role} = {index}" for role, index in assay.channels.items())),
        ("Pixel size", area),
        ("Weights", ", ".join(f"{name} {weight:g}" for name, weight in suite.weights.items())),
    ]
    rows += [(key.replace("_", " ").capitalize(), wording.plain(value)) for key, value in settings.items()]
    return [*rows, ("Python", platform.python_version())]
