"""The audit on models whose order is known, the bundled mini CellFlux among them (benchmarks/known_rank.py)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from bundled import bundled

import generators


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_module("benchmarks.known_rank")


@pytest.mark.slow
def test_the_audit_returns_a_known_rank(bench: ModuleType, tmp_path: Path) -> None:
    """Fresh drawings come first, more lost nuclei later, copies last; the mini CellFlux beats copies in MoA."""
    bundled("phantom")
    names = bench.make_models(tmp_path, 10, 1000, generators.MINI_CELLFLUX)
    assert names == list(bench.ORDER)
    found = bench.audited(tmp_path, names)
    result = bench.figures(found)
    rows = result["models"]
    gap = {name: row["gap"] for name, row in rows.items()}
    assert min(gap, key=gap.__getitem__) == "real-again" and rows["real-again"]["rank"][0] == 1
    assert gap["mild"] < gap["severe"]
    settled = set(found.audit.better_than)
    assert {("real-again", "mini-cellflux"), ("real-again", "severe"), ("real-again", "copies")} <= settled
    assert max(gap, key=gap.__getitem__) == "copies"
    lost = {name: row["lost_against_fresh"] for name, row in rows.items()}
    # The right rewards answer: counts to lost nuclei, MoA to copied controls, which the samples do better.
    assert lost["severe"]["nucleus_count"] > 3 * abs(lost["severe"]["cytoplasm_count"])
    assert max(lost["copies"], key=lambda name: lost["copies"][name] * (5 if name == "moa" else 1)) == "moa"
    assert lost["mini-cellflux"]["moa"] < 0.7 * lost["copies"]["moa"]
    assert "copies controls" in rows["copies"]["flags"]
    for name in ("real-again", "mini-cellflux", "mild", "severe"):
        assert not {"memorised", "leaked", "collapsed"} & set(rows[name]["flags"])
