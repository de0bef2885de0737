"""A bench of phantom crops on five plates before the bundled assay: for tests that need real verifiers."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

from bundled import bundled

from biorewards.io.manifest import Manifest, read_manifest
from biorewards.phantom import write_dataset
from biorewards.validate import Bench


@lru_cache
def manifest(crops: int = 150) -> Manifest:
    """Crops with exact masks beside them."""
    folder = Path(tempfile.mkdtemp(prefix="biorewards-validate-")) / "real"
    write_dataset(folder, crops, seed=19)
    return read_manifest(folder)


@lru_cache
def honest(n: int = 8) -> Bench:
    """The seven verifiers of the bundled assay on trial."""
    return Bench.build(bundled("phantom"), manifest(), n=n)
