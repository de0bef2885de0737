"""Run checks on a bench, keep what is finished, and put the findings in order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biorewards import __version__
from biorewards.io.tables import write_text
from biorewards.validate.bench import Bench
from biorewards.validate.check import Check, Finding

#: progress(check, what is known of it: "" when it starts, then "reused" or a count of findings)
Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Validation:
    """findings: check -> what it found, in the order of the report. about: how it was made, for JSON and pages."""

    findings: dict[str, list[Finding]]
    about: dict[str, Any]

    @property
    def all(self) -> list[Finding]:
        """Every finding, check by check."""
        return [one for found in self.findings.values() for one in found]

    @property
    def failed(self) -> list[Finding]:
        """What did not pass; what could not be judged is not among it."""
        return [one for one in self.all if one.passed is False]

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards on trial."""
        return list(self.about["rewards"])

    def of(self, reward: str | None) -> list[Finding]:
        """Findings about a reward (None: about the suite): failures first, then passed, then what was not judged."""
        order = {False: 0, True: 1, None: 2}
        return sorted((one for one in self.all if one.reward == reward), key=lambda one: order[one.passed])

    def document(self) -> dict[str, Any]:
        """Everything for JSON."""
        counts = {"failed": len(self.failed), "passed": sum(one.passed is True for one in self.all),
                  "not_judged": sum(one.passed is None for one in self.all)}  # fmt: skip
        return self.about | counts | {
            "checks": {check: [one.document() for one in found] for check, found in self.findings.items()}
        }  # fmt: skip


def validate(
    bench: Bench, checks: Mapping[str, Check], wanted: Iterable[str] | None = None, *, folder: Path | None = None,
    progress: Progress | None = None,
) -> Validation:  # fmt: skip
    """Run the wanted checks (all of them by default).

    folder: where finished checks are kept. One that was made by the same code from the same images, rewards and
    settings is not run again. Raises ValueError for a check that there is not.
    """
    names = list(checks) if wanted is None else list(wanted)
    if unknown := [name for name in names if name not in checks]:
        raise ValueError(f"no check {unknown[0]!r}; there are {', '.join(checks)}")
    findings = {}
    for name in (one for one in checks if one in names):
        if progress is not None:
            progress(name, "")
        path = None if folder is None else folder / f"{name}.json"
        made_by = hashlib.sha256(f"{__version__} {_source(checks[name])} {bench.fingerprint}".encode()).hexdigest()[:16]
        found = _finished(path, made_by)
        said = "reused"
        if found is None:
            found = checks[name](bench)
            said = f"{len(found)} findings"
            if path is not None:
                kept = {"made_by": made_by, "findings": [one.document() for one in found]}
                write_text(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        # Through JSON in either case, so that a rerun gives the same bytes.
        findings[name] = [Finding.read(one.document()) for one in found]
        if progress is not None:
            progress(name, said)
    assay = bench.assay
    about = {
        "biorewards": __version__,
        "assay": assay.name,
        "assay_fingerprint": assay.fingerprint,
        "suite": bench.suite.fingerprint,
        "segmenter": assay.segmenter_name,
        "rewards": list(bench.suite.rewards),
        "weights": bench.suite.weights,
        "real": {
            "images": len(bench),
            "controls": len(bench.controls),
            "classes": int(bench.rows["class"].nunique()),
            "compounds": int(bench.rows["compound"].nunique()),
            "plates": int(bench.rows["plate"].nunique()),
            "masks": "exact" if bench.exact_masks else f"found by the {assay.segmenter_name} segmenter",
        },
        "n": bench.n,
        "seed": bench.seed,
        "notes": list(bench.notes),
    }
    return Validation(findings, about)


def _source(check: Check) -> str:
    """Hash of the module that a check lies in: a changed check is run again."""
    path = getattr(sys.modules.get(check.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else check.__module__


def _finished(path: Path | None, made_by: str) -> list[Finding] | None:
    if path is None or not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_by"] != made_by:
            return None
        return [Finding.read(one) for one in kept["findings"]]
    except (ValueError, KeyError, TypeError):  # a file of another version, or not ours
        return None
