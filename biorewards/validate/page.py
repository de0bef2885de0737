"""A validation as HTML files that open anywhere (no network, no script): one summary, one card a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from biorewards.assay import Assay
from biorewards.audit.lesions import LESIONS
from biorewards.io.tables import write_text
from biorewards.report.wording import number, percent, plain, wording
from biorewards.reward import Suite
from biorewards.validate import wording as words
from biorewards.validate.check import Finding
from biorewards.validate.figures import Curve, curve, matrix
from biorewards.validate.run import Validation


def write_pages(out: Path, found: Validation, assay: Assay, suite: Suite, settings: dict[str, Any]) -> None:
    """validate.html, validate.json, and cards/<reward>.html and .json under `out`.

    settings: shown under "How it was made" beside what `found.about` says.
    """
    write_text(out / "validate.json", _json(found.document()))
    write_text(out / "validate.html", render(found, assay, settings))
    for name in found.rewards:
        write_text(out / "cards" / f"{name}.json", _json(card_document(found, assay, suite, name)))
        write_text(out / "cards" / f"{name}.html", render_card(found, assay, suite, name, settings))


def card_document(found: Validation, assay: Assay, suite: Suite, name: str) -> dict[str, Any]:
    """A card as plain data: context of use, measure, limits, explained exceptions, findings with failures first."""
    told = wording(name, assay.pixel_size)
    kept = ("biorewards", "assay", "assay_fingerprint", "suite", "segmenter", "real", "n", "seed")
    return {
        "reward": name,
        "title": told.title,
        "context_of_use": words.USE,
        "measures": f"{told.question} {told.direction}",
        "limits": words.limits(name, _squared(suite, name)),
        "explained": dict(_explained(found, name)),
        **{key: found.about[key] for key in kept},
        "findings": [one.document() for one in found.of(name)],
    }


def render(found: Validation, assay: Assay, settings: dict[str, Any]) -> str:
    """The summary page as text."""
    findings = found.all
    shown = _common(found, assay, settings)
    curves = [one for one in (_curve(finding, assay) for finding in findings) if one is not None]
    blind = [one.reason.removeprefix("unseen: ") for one in findings
             if one.check == "specificity" and one.reward is None and one.passed is False]  # fmt: skip
    return _environment().get_template("validate.html.j2").render(
        **shown,
        counts=_counts(findings),
        words=[("warn", text) for text in _failures(found, assay)],
        cards=True,
        grid=[{"check": check, "cells": [_cell(own, name) for name in [*found.rewards, None]]}
              for check, own in found.findings.items()],
        matrix=matrix(findings, found.rewards, {name: lesion.owner for name, lesion in LESIONS.items()}),
        explained=[(name, *pair) for name in found.rewards for pair in _together(_explained(found, name))],
        blind=blind,
        curves=curves,
        checks=[(check, words.CHECK_WORDS.get(check, ("", ""))[1], own) for check, own in found.findings.items()],
    )  # fmt: skip


def render_card(found: Validation, assay: Assay, suite: Suite, name: str, settings: dict[str, Any]) -> str:
    """The card of a reward as text."""
    own = found.of(name)
    groups = [("failed", False), ("passed", True), ("not judged", None)]
    return (
        _environment()
        .get_template("card.html.j2")
        .render(
            **_common(found, assay, settings),
            reward=name,
            use=words.USE,
            wording=wording(name, assay.pixel_size),
            counts=_counts(own),
            limits=words.limits(name, _squared(suite, name)),
            explained=_together(_explained(found, name)),
            groups=[(kind, [one for one in own if one.passed is passed]) for kind, passed in groups],
            curves=[one for one in (_curve(finding, assay) for finding in own) if one is not None],
            summary=True,
        )
    )


def _common(found: Validation, assay: Assay, settings: dict[str, Any]) -> dict[str, Any]:
    about = found.about
    real = about["real"]
    facts = [f"{real['images']} real images", f"{real['classes']} classes", f"{real['plates']} plates",
             f"n {about['n']}", f"seed {about['seed']}", f"suite {about['suite']}"]  # fmt: skip
    made = {"biorewards": about["biorewards"], "assay": f"{about['assay']} ({about['assay_fingerprint']})",
            "segmenter": about["segmenter"], "weights": about["weights"], "real": real, **settings}  # fmt: skip
    return {
        "assay": about["assay"],
        "facts": facts,
        "rewards": found.rewards,
        "titles": {name: wording(name, assay.pixel_size).title for name in found.rewards},
        "made": [(key.replace("_", " ").capitalize(), plain(value)) for key, value in made.items()],
        "notes": about["notes"],
    }


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("biorewards.validate", "."), PackageLoader("biorewards.report", ".")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "percent": percent,
        "figure": words.figure,
        "verdict": words.verdict,
        "check_title": words.title,
        "lesion_title": words.lesion_title,
        "signs": lambda text: text.replace(">=", "≥").replace("<=", "≤"),
    }
    return environment


def _counts(findings: list[Finding]) -> str:
    number_of = {passed: sum(one.passed is passed for one in findings) for passed in (False, True, None)}
    return words.sentence(number_of[False], number_of[True], number_of[None])


def _failures(found: Validation, assay: Assay) -> list[str]:
    """One sentence a check and reason: who fails it, and why."""
    told: dict[tuple[str, str], list[str]] = {}
    for one in found.failed:
        name = "the suite" if one.reward is None else wording(one.reward, assay.pixel_size).title
        told.setdefault((one.check, one.reason or one.what), []).append(name)
    return [
        f"{words.title(check)}: {', '.join(dict.fromkeys(names))}: {reason.rstrip('.')}."
        for (check, reason), names in told.items()
    ]


def _cell(own: list[Finding], name: str | None) -> dict[str, str] | None:
    """A cell of the table: how many figures pass, and the one that matters most."""
    here = [one for one in own if one.reward == name]
    if not here:
        return None
    judged = [one for one in here if one.passed is not None]
    if not judged:
        return {"kind": "open", "shown": "open", "figure": "", "text": here[0].reason}
    failed = [one for one in judged if not one.passed]
    first = (failed or judged)[0]
    figure = words.number_of(first.value) if first.value is not None and (failed or len(judged) == 1) else ""
    return {
        "kind": "fail" if failed else "pass",
        "shown": f"{'✗' if failed else '✓'} {len(judged) - len(failed)} of {len(judged)}",
        "figure": figure,
        "text": first.what if not failed else f"{first.what} {first.reason}",
    }


def _explained(found: Validation, name: str) -> list[tuple[str, str]]:
    """(lesion, why) of the exceptions that a reward is allowed in the specificity matrix."""
    pairs: dict[str, str] = {}
    for one in found.findings.get("specificity", []):
        if one.reward == name:
            pairs |= one.details.get("explained", {})
    return list(pairs.items())


def _together(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lesions with one explanation in one line."""
    found: dict[str, list[str]] = {}
    for lesion, why in pairs:
        found.setdefault(why, []).append(lesion)
    return [(", ".join(lesions), why) for why, lesions in found.items()]


def _curve(finding: Finding, assay: Assay) -> Curve | None:
    if finding.check != "dose_response" or finding.reward is None:
        return None
    return curve(finding, wording(finding.reward, assay.pixel_size).title.lower())


def _squared(suite: Suite, name: str) -> bool:
    """Whether the reward has a worst value below 0, as those that are −z²."""
    return bool(getattr(suite.rewards[name], "worst", 0.0) < 0)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
