"""The table of compounds that a generator was trained with: names and their embedding rows.

CSV as in IMPA and CellFlux: first column the name (header empty or anything), the other columns 0 .. D-1 numbers.
Fingerprints come as counts (how often a substructure occurs) or binary (whether it does). The same compounds have
non-zero entries at the same places in both, so a model trained on one takes the other without a complaint, and draws
something else: `expect_kind` tells them apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

#: What a table can hold; "any" switches the check off.
KINDS = ("counts", "binary", "real", "any")


@dataclass(frozen=True)
class CompoundTable:
    """Names (unique, in table order) and values float32 (n, D). source: where it came from, for messages."""

    names: list[str]
    values: Tensor
    source: str = "compound table"

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.names) != len(self.values):
            raise ValueError(f"{self.source}: {len(self.names)} names for values of shape {tuple(self.values.shape)}")
        doubled = pd.Series(self.names, dtype=object)
        if (twice := doubled[doubled.duplicated()]).size:
            raise ValueError(f"{self.source}: {twice.iloc[0]!r} has two rows; keep one")
        if not bool(torch.isfinite(self.values).all()):
            row = int((~torch.isfinite(self.values)).any(1).nonzero()[0])
            raise ValueError(f"{self.source}: {self.names[row]!r} has an empty or non-finite value")

    @classmethod
    def read_csv(cls, path: str | Path) -> CompoundTable:
        """Read a table. Raises ValueError naming row and column of what is no number, FileNotFoundError."""
        try:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no CSV table: {error}") from None
        if frame.shape[1] < 2 or not len(frame):
            raise ValueError(f"{path}: needs a first column of names, columns of numbers after it, and a row each")
        numbers = frame.iloc[:, 1:].apply(pd.to_numeric, errors="coerce")
        if numbers.isna().to_numpy().any():
            row, column = np.argwhere(numbers.isna().to_numpy())[0]
            raise ValueError(
                f"{path}: {frame.iloc[row, 0]!r}, column {frame.columns[column + 1]!r}: "
                f"{frame.iloc[row, column + 1]!r} is no number"
            )
        values = torch.from_numpy(numbers.to_numpy(dtype=np.float32).copy())
        return cls([str(name).strip() for name in frame.iloc[:, 0]], values, str(path))

    @property
    def dim(self) -> int:
        """D."""
        return self.values.shape[1]

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def index(self, names: Sequence[str]) -> Tensor:
        """Row numbers int64 (N,) of names. Raises ValueError for an unknown one, with the nearest."""
        for name in names:
            if name not in self._row:
                raise ValueError(unknown_compound(name, self.names, self.source))
        return torch.tensor([self._row[name] for name in names], dtype=torch.int64)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Embedding rows float32 (N, D) of names. Raises ValueError for an unknown one, with the nearest."""
        return self.values[self.index(names)]

    def subset(self, names: Sequence[str]) -> CompoundTable:
        """The table of these names only, in this order."""
        return CompoundTable(list(names), self.rows(names), self.source)

    @property
    def kind(self) -> str:
        """ "counts", "binary" or "real"; what the values look like."""
        return kind_of(self.values)

    def expect_kind(self, kind: str, model: str) -> None:
        """Raise ValueError unless the values are what `model` was trained on ("counts", "binary", "real", "any")."""
        if kind not in KINDS:
            raise ValueError(f"fingerprints={kind!r}: one of {', '.join(KINDS)}")
        if kind == "any" or self.kind == kind:
            return
        raise ValueError(
            f"{self.source} holds {_SAYS[self.kind]}; {model} was trained on {_SAYS[kind]}. Give the table it was "
            "trained with, or fingerprints='any' where you know that this one is right"
        )


_SAYS = {
    "counts": "fingerprint counts (whole numbers, some above 1)",
    "binary": "binary fingerprints (0 and 1 only)",
    "real": "real numbers",
}


def kind_of(values: Tensor) -> str:
    """ "binary" (0 and 1 only), "counts" (whole, not negative, some above 1) or "real"."""
    if bool(((values < 0) | (values != values.round())).any()):
        return "real"
    return "counts" if bool((values > 1).any()) else "binary"


def unknown_compound(name: str, names: Sequence[str], source: str) -> str:
    """The message for a compound that is not in a table: the nearest names, or the first few."""
    folded = {other.casefold(): other for other in names}
    near = [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=3)]
    if near:
        return f"{source} has no compound {name!r}; did you mean {', '.join(map(repr, near))}?"
    some = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"{source} has no compound {name!r}; it has: {some}"
