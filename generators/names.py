"""Names of labels, which most checkpoints do not hold; and what our own JSON says beside the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from generators.checkpoints import CheckpointError

#: A list of names, or the path of a text file with one a line.
Names: TypeAlias = str | os.PathLike[str] | Sequence[str]


def stored_names(names: Any, path: Path) -> list[str]:
    """Names out of the JSON beside our own weights. Raises CheckpointError for anything but a list of text."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: its JSON is not whole (compounds is no list of names)")
    return names


def stored_settings(settings: Any, kinds: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings out of the JSON beside our own weights. kinds: what each may be, None aside. Raises CheckpointError."""
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: its JSON is not whole (sampling is missing)")
    for key, value in settings.items():
        if value is not None and not isinstance(value, kinds.get(key, ())):
            raise CheckpointError(f"{path}: its JSON has {key}={value!r}, which is no such setting")
    return settings


def read_names(names: Names | None, count: int, where: str, *, exact: bool = True) -> list[str]:
    """Names of labels 0, 1, ...; "0", "1", ... where none are given.

    count: how many labels `where` (a file, for messages) has. exact: False where it may have more labels than names.
    Raises ValueError for another number of names, an empty one, or the same twice.
    """
    if names is None:
        return [str(i) for i in range(count)]
    source = "compounds"
    if isinstance(names, str | os.PathLike):
        source = os.fspath(names)
        try:
            names = Path(names).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{source}: no text file; give one with a name a line") from None
    found = [str(name).strip() for name in names]
    if len(found) > count or (exact and len(found) != count):
        raise ValueError(f"{source}: {len(found)} names for the {count} labels of {where}; give them in label order")
    for i, name in enumerate(found):
        if not name:
            raise ValueError(f"{source}: name {i + 1} is empty; the place of a name is its label")
        if name in found[:i]:
            raise ValueError(f"{source}: {name!r} is there twice (labels {found.index(name)} and {i})")
    return found
