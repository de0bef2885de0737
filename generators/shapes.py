"""Reading a network's sizes off the shapes of its state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generators.checkpoints import CheckpointError, shapes_of


class Shapes:
    """The shapes of a state dict. what: whose it should be ("an IMPA generator"), for messages."""

    def __init__(self, state: Mapping[str, Any], path: Path | str, what: str) -> None:
        self._shapes = shapes_of(state, path)
        self._path, self._what = path, what

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def __call__(self, key: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError where it is missing, empty, or has another number of axes."""
        shape = self._shapes.get(key)
        if shape is None:
            raise CheckpointError(f"{self._path}: {key} is missing: not {self._what}")
        if len(shape) != axes or 0 in shape:
            raise CheckpointError(f"{self._path}: {key} is {shape}, wanted {axes} axes: not {self._what}")
        return shape

    def numbers(self, prefix: str, suffix: str = "") -> list[int]:
        """Sorted numbers i of the keys `<prefix>.<i>.<suffix>...`."""
        # No more than four digits: a number from a strange file must not size a loop.
        form = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\.{re.escape(suffix)}")
        return sorted({int(match[1]) for key in self._shapes if (match := form.match(key))})

    def count(self, prefix: str, suffix: str = "") -> int:
        """How many there are, numbered from 0. Raises CheckpointError for a gap in the numbers, or none at all."""
        numbers = self.numbers(prefix, suffix)
        if numbers != list(range(len(numbers))) or not numbers:
            first = next((i for i, n in enumerate(numbers) if i != n), len(numbers))
            raise CheckpointError(f"{self._path}: {prefix}.{first} is missing: not {self._what}")
        return len(numbers)
