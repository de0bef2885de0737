"""What a reward is: one batch in, one score a crop out, with the reason for every value.

Read this file first. A `Reward` judges a `Batch`; a `Suite` is a reward made of weighted rewards. The seven
verifiers of CellFluxRL (arXiv 2603.21743) are in `biorewards.rewards`; anything else with a `name` and this
call is a reward too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from biorewards.batch import Batch


class Reason(IntEnum):
    """Why a value is what it is. Stored with every score; the names are what tables print."""

    OK = 0
    NO_TARGET = 1  # no label was given: the question cannot be asked, the value is NaN
    UNKNOWN_TARGET = 2  # a label was given that the assay does not know; NaN
    NO_REFERENCE = 3  # the assay has no reference (statistics or classifier class) for this target; NaN
    POOLED_REFERENCE = 4  # scored, against all treated classes: too few real images behind the target's own
    NO_NUCLEUS = 5  # no nucleus was found: worst value
    NO_CELL = 6  # no cell was found: worst value
    BLANK = 7  # the crop has no contrast or carries NaN or infinite pixels: worst value
    BAD_IMAGE = 8  # the file could not be read: NaN everywhere, and the file's own message in the table
    CARRIED_REFERENCE = 9  # scored, against a reference carried over from whole-well measurements, not from crops


#: Reasons whose value is missing (NaN). Every other reason comes with a number.
UNSCORED = (Reason.NO_TARGET, Reason.UNKNOWN_TARGET, Reason.NO_REFERENCE, Reason.BAD_IMAGE)


@dataclass(frozen=True)
class Score:
    """One reward's answer for a batch.

    value: (B,) float32, higher is better; NaN only for the reasons in `UNSCORED`.
    measure: (B,) float32, the statistic in its own unit (probability, fraction, um^2 or px^2, objects).
    reason: (B,) uint8, a `Reason`.
    """

    value: Tensor
    measure: Tensor
    reason: Tensor


@dataclass(frozen=True)
class SuiteScore:
    """All rewards of a suite for one batch. `total` and `total_label_free` are (B,) float32."""

    scores: dict[str, Score]
    total: Tensor
    total_label_free: Tensor


@runtime_checkable
class Reward(Protocol):
    """A verifier. `name` is stable: it is the metric key and the column name."""

    name: str

    def __call__(self, batch: Batch) -> Score: ...


class Suite:
    """Weighted rewards over one batch, so that masks and regions are computed once and shared.

    total = sum_k weight_k * value_k (CellFluxRL, section on the reward). It is NaN when any weighted part is
    missing: a sum over fewer parts is another quantity, never silently comparable. `total_label_free` sums
    the parts that need no target; NaN when there is none.

    Raises ValueError when a name occurs twice or a weight names no reward.
    """

    def __init__(
        self, rewards: list[Reward], weights: Mapping[str, float] | None = None, fingerprint: str = ""
    ) -> None:
        self.rewards: dict[str, Reward] = {}
        for reward in rewards:
            if reward.name in self.rewards:
                raise ValueError(f"two rewards are called {reward.name!r}; give one of them another name")
            self.rewards[reward.name] = reward
        self.weights = dict.fromkeys(self.rewards, 1.0) | dict(weights or {})
        if unknown := sorted(set(self.weights) - set(self.rewards)):
            raise ValueError(f"weights for unknown rewards {unknown}; this suite has {sorted(self.rewards)}")
        self._parent = fingerprint

    @property
    def fingerprint(self) -> str:
        """Hash over everything that moves a number: assay, segmenter and classifier weights, rewards, weights."""
        from biorewards import __version__

        parts = {
            "version": __version__,
            "assay": self._parent,
            "weights": self.weights,
            "rewards": {name: repr(reward) for name, reward in self.rewards.items()},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, batch: Batch) -> SuiteScore:
        """Score a batch; every tensor of the result stays on the device of `batch.images`."""
        scores = {name: reward(batch) for name, reward in self.rewards.items()}
        total = torch.zeros(len(batch), device=batch.images.device)
        free = [name for name, reward in self.rewards.items() if getattr(reward, "label_free", False)]
        label_free = torch.full_like(total, 0.0 if free else torch.nan)
        for name, score in scores.items():
            total = total + self.weights[name] * score.value
            if name in free:
                label_free = label_free + self.weights[name] * score.value
        return SuiteScore(scores, total, label_free)
