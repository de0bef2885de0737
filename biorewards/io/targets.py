"""The class that each image is judged against."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd


class Targets(NamedTuple):
    """target: (N,) int64 class index, -1 no label, -2 a label that the assay does not know; table: the rows."""

    target: npt.NDArray[np.int64]
    table: pd.DataFrame
    notes: list[str]


def assign_targets(table: pd.DataFrame, classes: Sequence[str], compounds: Mapping[str, str]) -> Targets:
    """The class that each row is judged against: its MoA where that names a class, else its compound's class.

    Names match exactly, else without regard to case and "_". A compound that is a class's name (a sub-folder) counts
    as that class; a control row (`Metadata_State`) without names as class 0. `Metadata_MoA` of the result is the
    class where one was found, else what was given. `notes` names each unknown label once, with the nearest known.
    """
    class_of, compound_of = _lookup(classes), _lookup(compounds)
    state = table["Metadata_State"] if "Metadata_State" in table else pd.Series("", index=table.index)
    keys = list(zip(table["Metadata_Compound"], table["Metadata_MoA"], state, strict=True))
    answer: dict[tuple[str, str, str], tuple[int, str, str]] = {}
    unknown: Counter[str] = Counter()
    overruled: Counter[str] = Counter()
    for key, rows in Counter(keys).items():
        compound, moa, status = key
        known = compound_of(compound)
        name = class_of(moa) or (compounds[known] if known else None)
        if name is None and (name := class_of(compound)):
            compound = ""  # a sub-folder named for its class
        if name is None and not compound.strip() and not moa.strip():
            name = classes[0] if status == "control" else None
            answer[key] = (0 if name else -1, compound, name or "")
        elif name is None:
            unknown[moa.strip() or compound] += rows
            answer[key] = (-2, compound, moa)
        else:
            if moa.strip() and class_of(moa) is None:
                overruled[f"{moa!r} is no class of the assay; {compound}'s class {name!r} is used"] += rows
            answer[key] = (list(classes).index(name), known or compound, name)
    notes = [f"{text} ({rows} rows)" for text, rows in overruled.items()]
    known_names = [*classes, *compounds]
    for label, rows in unknown.items():
        near = difflib.get_close_matches(label, known_names, n=3, cutoff=0.6)
        hint = f"nearest known: {', '.join(near)}" if near else f"known classes: {', '.join(classes)}"
        notes.append(f"unknown label {label!r} ({rows} rows): {hint}")
    picked = [answer[key] for key in keys]
    table = table.assign(Metadata_Compound=[one[1] for one in picked], Metadata_MoA=[one[2] for one in picked])
    return Targets(np.array([one[0] for one in picked], dtype=np.int64), table, notes)


def _lookup(names: Iterable[str]) -> Callable[[str], str | None]:
    """text -> the known name that it means, or None."""

    def plain(text: str) -> str:
        return text.replace("_", " ").strip().casefold()

    loose = {plain(name): name for name in names}
    exact = set(names)
    return lambda text: text if text in exact else loose.get(plain(text)) if text.strip() else None
