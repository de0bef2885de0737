"""Which images of several samples may be compared: the same conditions, in the same proportions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from biorewards.audit.samples import Sample

#: From fine to coarse. The finest is taken at which nearly all images of every sample have a counterpart in all others.
LEVELS = (("MoA", "Compound", "Dose"), ("MoA", "Compound"), ("MoA",), ())
#: The share of a model's images that must have one (else the level at which most have), and how many images of a
#: condition every sample needs.
KEPT, LEAST = 0.9, 2
ALL = "(all)"


class Conditions(NamedTuple):
    """The conditions (strata) that all samples have.

    level: columns that make a condition, () when labels do not match. names: (S,) text. share: (S,) of the held-out
    real images, sums to 1: every sample is weighted so. classes, compounds: (S,) of each condition. number: sample
    name -> (N,) condition of each image, -1 for images that are not compared.
    """

    level: tuple[str, ...]
    names: list[str]
    share: npt.NDArray[np.float64]
    classes: list[str]
    compounds: list[str]
    number: dict[str, npt.NDArray[np.intp]]

    def groups(self, scope: str) -> list[str]:
        """Classes or compounds (`scope` "class" or "compound") in order of first appearance; [] where unknown."""
        if scope == "class":
            return list(dict.fromkeys(self.classes)) if self.level else []
        return list(dict.fromkeys(c for c in self.compounds if c)) if "Compound" in self.level else []

    def members(self, scope: str, group: str) -> npt.NDArray[np.intp]:
        """Conditions of a class or compound."""
        names = self.classes if scope == "class" else self.compounds
        return np.flatnonzero([name == group for name in names])


def match(samples: Mapping[str, Sample], weigh_by: str) -> Conditions:
    """Find the finest level at which the samples match; proportions are those of the sample `weigh_by`.

    Raises ValueError when there is nothing to compare at all.
    """
    best = None
    for level in LEVELS:
        keys = {name: _keys(sample.scores, level) for name, sample in samples.items()}
        counted = {name: key[samples[name].readable].value_counts() for name, key in keys.items()}
        common = set.intersection(*(set(count[count >= LEAST].index) for count in counted.values()))
        models = [name for name, sample in samples.items() if sample.kind == "model"] or [weigh_by]
        kept = min(float(keys[name].isin(common).mean()) for name in models)
        if common and (best is None or (level and kept > best[0])):
            best = kept, level, keys, counted, common
        if best is not None and best[0] >= KEPT:
            break
    if best is None:
        raise ValueError(f"{' and '.join(samples)} have no two readable images each to compare")
    _, level, keys, counted, common = best
    names = sorted(common)
    place = {name: index for index, name in enumerate(names)}
    weight = counted[weigh_by].reindex(names).to_numpy(np.float64)
    number = {}
    for name, key in keys.items():
        found = np.array(key.map(place).fillna(-1), np.intp)
        found[~samples[name].readable] = -1
        number[name] = found
    parts = [name.split("\0") for name in names]
    return Conditions(
        level=level,
        names=[" / ".join(part) for part in parts],
        share=weight / weight.sum(),
        classes=[part[0] if level else ALL for part in parts],
        compounds=[part[1] if len(part) > 1 else "" for part in parts],
        number=number,
    )


def _keys(scores: pd.DataFrame, level: tuple[str, ...]) -> pd.Series:
    """One text a row; rows without a value in the first column have no key at that level."""
    if not level:
        return pd.Series(ALL, index=scores.index, dtype=object)
    columns = [
        scores.get(f"Metadata_{name}", pd.Series("", index=scores.index)).fillna("").astype(str) for name in level
    ]
    if "Dose" in level:
        columns[-1] = columns[-1].map(_plain_number)
    key = columns[0]
    for column in columns[1:]:
        key = key + "\0" + column
    return key.mask(columns[0] == "")


def _plain_number(text: str) -> str:
    """ "3.0" and "3" are one dose."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
