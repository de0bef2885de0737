"""The assays that ship with the package."""

from __future__ import annotations

from functools import lru_cache

import pytest

from biorewards.assay import Assay


@lru_cache
def bundled(name: str) -> Assay:
    """A bundled assay; the calling test is skipped where its files are not there."""
    try:
        return Assay.load(name)
    except (ValueError, OSError) as error:
        pytest.skip(f"bundled assay {name} is not there: {error}")
