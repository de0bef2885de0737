"""What a check of the verifiers is, and what it says: one `Finding` a figure that was held against a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biorewards.validate.bench import Bench


@dataclass(frozen=True)
class Finding:
    """One figure of a check, and whether it is good enough.

    check: name of the check, a key of `CHECKS`. reward: name of the reward that it is about, None for the suite.
    what: one sentence that says what was measured. value: the figure; interval: its 95 % confidence interval, None
    where there is none. threshold: as text, such as ">= 0.9". passed: None where it could not be judged, and `reason`
    then says why; of a failure or of an exception that is allowed `reason` says what is known about it.
    n: images behind the figure. details: whatever else a page draws, of plain JSON types.
    """

    check: str
    reward: str | None
    what: str
    value: float | None
    interval: tuple[float, float] | None
    threshold: str
    passed: bool | None
    n: int
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.passed is None and not self.reason:
            raise ValueError(f"check {self.check}: a figure that could not be judged wants a reason")

    def document(self) -> dict[str, Any]:
        """The finding for JSON; numbers that are not finite become null."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def read(cls, document: dict[str, Any]) -> Finding:
        """What `document` wrote."""
        found = cls(**document)
        return replace(found, interval=None if found.interval is None else _pair(found.interval))


#: A check: the bench in, findings out. It draws its random numbers from `bench.rng`, so that it can be repeated.
Check = Callable[["Bench"], list[Finding]]


def not_judged(check: str, reward: str | None, what: str, threshold: str, reason: str) -> Finding:
    """A finding of something that could not be judged, and why."""
    return Finding(check, reward, what, None, None, threshold, None, 0, reason)


def settled(good: bool, interval: tuple[float, float]) -> tuple[bool | None, str]:
    """Verdict on a change that should be none, and the reason for no verdict: beyond the bar, but perhaps by chance."""
    if good:
        return True, ""
    if interval[0] <= 0 <= interval[1]:
        return None, "it lies beyond the bar, but the interval holds 0: more images are wanted (--n)"
    return False, ""


def _pair(ends: Any) -> tuple[float, float]:
    low, high = (math.nan if end is None else float(end) for end in ends)
    return low, high


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
