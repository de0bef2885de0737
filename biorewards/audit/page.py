"""An audit as one HTML file that opens anywhere: no network, no script."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from biorewards.assay import Assay
from biorewards.audit.bootstrap import bounded
from biorewards.audit.columns import SCOPES
from biorewards.audit.figures import Values, colours, forest
from biorewards.audit.models import Audit, Metric, Place
from biorewards.audit.opinion import Opinion
from biorewards.audit.results import GAP, measured
from biorewards.audit.run import Audited
from biorewards.audit.samples import CONTROL, REAL, Sample
from biorewards.audit.wording import COPIES, METRICS, SHARES, VARIETY, fine, quantity, said, sentences, title
from biorewards.io.tables import atomic
from biorewards.report import ROLE_COLOURS
from biorewards.report.crops import best_and_worst, load_crops
from biorewards.report.tables import empty_rows
from biorewards.report.wording import number, percent, plain, wording

#: Worst crops of a model and reward, and conditions shown side by side.
WORST, BESIDE = 4, 8
#: What is shown of an opinion beside what it ranks by.
SHOWN = ("moa", "moa_accuracy")


def write_page(path: Path, audited: Audited, assay: Assay, settings: dict[str, Any]) -> None:
    """Write the page. settings: shown under "How it was made", in the order given.

    Reads the shown crops again and finds their masks again with the assay's segmenter.
    """
    with atomic(Path(path)) as (temporary,):
        temporary.write_text(render(audited, assay, settings), encoding="utf-8", errors="backslashreplace")


def render(audited: Audited, assay: Assay, settings: dict[str, Any]) -> str:
    """The page as text; arguments as for `write_page`."""
    audit, samples = audited.audit, audited.samples
    names = list(audit.rows)
    models = [row.name for row in audit.models]
    palette = colours(names)
    rewards = [m for m in audit.metrics if f"Reward_{m.name}" in samples[REAL].scores]
    worst = {name: _worst(audited, name, [m.name for m in rewards]) for name in models}
    beside = _beside(audited, names)
    wanted: dict[str, set[int]] = {name: set() for name in names}
    for name, galleries in worst.items():
        wanted[name] |= {row for rows in galleries.values() for row in rows}
    for rows in beside.values():
        for name, row in rows.items():
            wanted[name].add(row)
    crops = {name: load_crops(sorted(rows), samples[name].read, assay) for name, rows in wanted.items()}
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("biorewards.audit", "."), PackageLoader("biorewards.report", ".")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "fine": fine, "percent": percent, "said": said}
    main = [m for m in audit.metrics if m.anchored and m.name not in VARIETY]
    return environment.get_template("audit.html.j2").render(
        models=models,
        names=names,
        number_of={name: place for place, name in enumerate(names)},
        palette=palette,
        kinds={name: row.kind for name, row in audit.rows.items()},
        facts=_facts(audited, assay),
        words=sentences(audit, audited.opinions),
        ranking=_ranking(audit),
        floor=audit.floor,
        gap_figure=forest(
            {name: {name: _span(audit.rows[name].draws["gap"])} for name in models}, palette,
            "gap to real images (0 = like real)", {0.0: "real", audit.floor: "by chance"}, (0.0, np.inf),
        ),
        main=_cells(audit, main, names),
        anchored_figure=forest(
            _anchored(audit, main), palette, "anchored score: 0 = copied control, 1 = real held-out images",
            {0.0: "copy", 1.0: "real"}, (-1.0, 2.0),
        ),
        spread_figure=forest(
            _values(audit, [m for m in audit.metrics if m.name.startswith("spread_ratio_")], [REAL, *models]),
            palette, "standard deviation within classes over that of the assay's reference (1 = as varied)",
            {1.0: ""}, (0.0, 3.0),
        ),
        variety=_cells(audit, [m for m in audit.metrics if m.name in VARIETY], names),
        copies=_cells(audit, [m for m in audit.metrics if m.name in COPIES], names),
        shares=SHARES,
        about_metrics={m.name: METRICS[m.name][1] for m in [GAP, *audit.metrics] if m.name in METRICS},
        by_class=_by_group(audit, names),
        beside=beside,
        rewards=[
            {"name": m.name, "wording": wording(m.name, assay.pixel_size),
             "galleries": {name: _shown(samples[name], m.name, worst[name][m.name], assay) for name in models}}
            for m in rewards
        ],
        crops=crops,
        roles=[(role, ROLE_COLOURS[role]) for role in assay.channels if role in ROLE_COLOURS],
        opinions=[_opinion(audited, one) for one in audited.opinions],
        notes=audited.about["notes"],
        made=[(key.replace("_", " ").capitalize(), plain(value)) for key, value in settings.items()],
        level=" and ".join(audit.conditions.level) or "nothing (no labels in common)",
    )  # fmt: skip


def _facts(audited: Audited, assay: Assay) -> list[str]:
    audit = audited.audit
    return [
        f"{len(audit.models)} model{'s' * (len(audit.models) != 1)}",
        f"{sum(row.n for row in audit.models):,} images compared".replace(",", "\u202f"),
        f"{len(audit.conditions.names)} conditions",
        f"assay {assay.name}",
        f"fingerprint {audited.about['suite']}",
    ]


def _span(draws: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    return (float(draws[0]), *bounded(draws))


def _place(place: Place) -> str:
    if place.best is None:
        return "–"
    return f"{place.best}" if place.best == place.worst else f"{place.best}–{place.worst}"


def _ranking(audit: Audit) -> list[dict[str, Any]]:
    rows = []
    for row in audit.models:
        place = audit.places[row.name]
        rows.append({"name": row.name, "place": _place(place), "order": place.best or 99, "n": row.n,
                     "flags": audit.flags[row.name], **measured(audit, row, GAP)})  # fmt: skip
    return sorted(rows, key=lambda one: (one["order"], one["value"] or 0.0))


def _cells(audit: Audit, metrics: Iterable[Metric], names: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": m.name, "title": title(m.name), "better": m.better,
         "cells": {name: measured(audit, audit.rows[name], m) for name in names}}
        for m in metrics
    ]  # fmt: skip


def _anchored(audit: Audit, metrics: list[Metric]) -> Values:
    found: Values = {}
    for metric in metrics:
        scores = {row.name: audit.anchored(row, metric) for row in audit.models}
        spans = {name: _span(score) for name, score in scores.items() if score is not None}
        if spans:
            found[title(metric.name)] = spans
    return found


def _values(audit: Audit, metrics: list[Metric], names: list[str]) -> Values:
    found: Values = {}
    for metric in metrics:
        spans = {name: _span(audit.rows[name].draws[metric.name]) for name in names}
        found[title(metric.name)] = {name: span for name, span in spans.items() if np.isfinite(span[0])}
    return found


def _by_group(audit: Audit, names: list[str]) -> dict[str, Any]:
    """scope -> metric title -> group -> sample -> (value, shade 0 to 1 by how far beyond real images)."""
    found: dict[str, Any] = {}
    shown = [m for m in audit.metrics if m.name in ("total", "moa", "frechet", "kernel")]
    for scope in SCOPES:
        for metric in shown:
            lines: dict[str, Any] = {}
            for group in audit.conditions.groups(scope):
                values = {
                    n: audit.rows[n].groups[scope, group].get(metric.name) for n in names
                }  # fmt: skip
                first = {n: float(v[0]) if v is not None else float("nan") for n, v in values.items()}
                span = abs(first[REAL] - first[CONTROL]) or 1.0
                sign = 1 if metric.better == "higher" else -1
                shade = {n: float(np.clip(sign * (first[REAL] - v) / span, 0, 1)) for n, v in first.items()}
                lines[group] = {
                    "n": audit.rows[names[-1]].group_n[scope, group],
                    "cells": {n: (first[n], 0.0 if np.isnan(shade[n]) else round(shade[n], 3)) for n in names},
                }
            if lines and any(np.isfinite(v) for line in lines.values() for v, _ in line["cells"].values()):
                found.setdefault(scope, {})[title(metric.name)] = lines
    return found


def _worst(audited: Audited, name: str, rewards: list[str]) -> dict[str, list[int]]:
    """Reward -> rows of the worst compared images of a model."""
    sample = audited.samples[name]
    compared = audited.audit.conditions.number[name] >= 0
    singles = [r for r in rewards if r != "total"]
    found = {}
    for reward in rewards:
        value = sample.scores[f"Reward_{reward}"].astype(float).where(compared)
        _, worst = best_and_worst(value, empty_rows(sample.scores, reward, singles), WORST)
        found[reward] = worst
    return found


def _beside(audited: Audited, names: list[str]) -> dict[str, dict[str, int]]:
    """Class -> sample -> a row drawn at random, for up to `BESIDE` classes spread over all."""
    conditions = audited.audit.conditions
    groups = conditions.groups("class") or [conditions.classes[0]]
    chosen = [groups[int(k)] for k in np.unique(np.linspace(0, len(groups) - 1, BESIDE).round())]
    rng = np.random.default_rng(audited.about["seed"])
    found = {}
    for group in chosen:
        members = conditions.members("class", group)
        found[group] = {
            name: int(rng.choice(np.flatnonzero(np.isin(conditions.number[name], members)))) for name in names
        }
    return found


def _shown(sample: Sample, reward: str, rows: list[int], assay: Assay) -> list[dict[str, Any]]:
    reference = assay.statistics[assay.statistics["measure"] == reward].set_index("class")["mean"].to_dict()
    found = []
    for row in rows:
        line = sample.scores.iloc[row]
        measure = float(line[f"Measure_{reward}"]) if f"Measure_{reward}" in line else float("nan")
        reason = str(line.get(f"Reason_{reward}", "OK"))
        found.append({
            "row": row, "value": float(line[f"Reward_{reward}"]),
            "measure": measure if measure == measure and line["Metadata_MoA"] in reference else None,
            "real": reference.get(line["Metadata_MoA"]),
            "whole": reward.endswith("_count"),
            "label": line["Metadata_MoA"] or line["Metadata_Compound"] or "(no label)",
            "reason": "" if reason == "OK" else reason, "file": str(line["Metadata_File"]),
        })  # fmt: skip
    return found


def _opinion(audited: Audited, opinion: Opinion) -> dict[str, Any]:
    """One opinion beside the first verifiers, every row of the audit in it."""
    words = {1: "{a} closer", -1: "{b} closer", 0: "not settled"}
    shown = list(dict.fromkeys([opinion.ranks_by, *(k for k in SHOWN if k in opinion.draws[REAL])]))
    rows = []
    for row in audited.audit.rows.values():
        place = opinion.places.get(row.name)
        rows.append({
            "name": row.name, "n": opinion.n[row.name], "place": "" if place is None else _place(place),
            "first": _span(row.draws["gap"]) if place else None,
            "second": {k: _span(opinion.draws[row.name][k]) for k in shown},
        })  # fmt: skip
    changes = [
        {"title": quantity(c), "pair": f"{c.a}, {c.b}", "first": words[c.first].format(a=c.a, b=c.b),
         "second": words[c.second].format(a=c.a, b=c.b), "reversed": c.reversed}
        for c in opinion.changes
    ]  # fmt: skip
    return {"name": opinion.name, "about": opinion.about, "titles": [title(k) for k in shown], "rows": rows,
            "changes": sorted(changes, key=lambda c: not c["reversed"])}  # fmt: skip
