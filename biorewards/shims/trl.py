"""A reward of TRL's trainers: called with lists, answers with a list of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from biorewards.assay import Assay
from biorewards.reward import Suite
from biorewards.shims.judge import Judge


class TrlReward:
    """See `as_trl`. `__name__` is the metric key; an object of a module-level class can be pickled."""

    def __init__(self, judge: Judge, label: str | None, name: str) -> None:
        self.judge = judge
        self.label = label
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """completions: the images. columns: others of the data set, and TRL's log_metric, which is told the parts."""
        if self.label is not None and self.label not in columns:
            raise ValueError(f"no column {self.label!r}; there are {sorted(columns)}: as_trl(..., label=NAME)")
        values = self.judge(completions, prompts if self.label is None else columns[self.label])
        if log := columns.get("log_metric"):
            for name, value in values.items():
                log(f"{self.__name__}/{name}", float(value.mean()))
        total: list[float] = values["total"].tolist()
        return total


def as_trl(suite: Suite, assay: Assay, *, label: str | None = "moa", name: str = "biorewards") -> TrlReward:
    """A reward function for TRL: f(prompts, completions, **columns) -> total of each image, never None.

    label: the data set's column with class or compound; None: the prompts are the labels. name: TRL's metric key.
    """
    return TrlReward(Judge(suite, assay), label, name)
