"""Check 4: the matrix of rewards by lesions. A reward answers to its own damage, hardly to other damage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from biorewards.audit.lesions import LESIONS
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.lesions_response import Response, harmed, responses

NAME = "specificity"
#: A reward may answer to another's lesion by a third of its answer to its own.
MOST_FOREIGN = 1 / 3
#: Real standard deviations that an owner must move by on the average over doses, else it does not see its lesion; a
#: lesion that moves nothing by as much is a blind spot of the suite.
LEAST_RESPONSE = 0.5
#: Images seen before and after, that a response is the mean of.
FEWEST = 8

_WHOLE = "the classifier reads the whole picture: nuclei and cells are what a mechanism shows by"
_GONE = "the largest one may be among those that are gone"
_SPLIT = "cells that touch are told apart by their nuclei, so that an added nucleus splits its cell in two"
_GROWN = "nuclei at 2.7 times their area touch, overlap, reach beyond their cell and are cut by the border"
_CUT = "where the only whole nucleus is gone, or lies at the border now, those that the border cuts are judged instead"
_EXCHANGED = (
    "with DNA and actin exchanged, what is taken for nuclei is actin: everything about nuclei and cells changes"
)
_MIXED = "the crop that is mixed in brings nuclei and cells of its own"
#: (reward, lesion) -> why the reward answers to damage that another one owns. Shown on the card, never dropped.
EXPLAINED: dict[tuple[str, str], str] = {
    **{("moa", name): _WHOLE for name, lesion in LESIONS.items() if lesion.owner not in ("moa", None)},
    **{(str(lesion.owner), "swap_dna"): _EXCHANGED for lesion in LESIONS.values() if lesion.owner not in ("moa", None)},
    **{(str(lesion.owner), "blend"): _MIXED for lesion in LESIONS.values() if lesion.owner not in ("moa", None)},
    (
        "nucleus_in_cytoplasm",
        "erase_cytoplasm",
    ): "a nucleus without its cytoplasm lies outside every cell, by definition",
    ("nucleus_in_cytoplasm", "grow_nuclei"): _GROWN,
    ("nucleus_roundness", "grow_nuclei"): _GROWN,
    ("nucleus_roundness", "erase_nuclei"): _CUT,
    ("nucleus_roundness", "move_nucleus_out"): _CUT,
    ("nucleus_count", "grow_nuclei"): _GROWN,
    ("nucleus_size", "erase_nuclei"): _GONE,
    ("cytoplasm_size", "erase_cytoplasm"): _GONE,
    ("cytoplasm_size", "duplicate_nuclei"): _SPLIT,
    ("cytoplasm_count", "duplicate_nuclei"): _SPLIT,
}

Floats = npt.NDArray[np.float64]


def specificity(bench: Bench) -> list[Finding]:
    """Every owner's response to its lesions, and for every reward its largest unexplained share of another's."""
    findings: list[Finding] = []
    drops: dict[str, dict[str, Floats]] = {}  # lesion -> reward -> (n,) mean fall over doses, real sd
    for lesion, found in responses(bench).items():
        owner = str(LESIONS[lesion].owner)
        if isinstance(found, str):
            findings.append(_own(bench, owner, lesion, None, found))
            continue
        drops[lesion] = {name: _drop(bench, found, name, owned=name == owner) for name in bench.suite.rewards}
        findings.append(_own(bench, owner, lesion, drops[lesion].get(owner), "real images have no value"))
    findings = [one for one in findings if one.reward in bench.suite.rewards]
    findings += [_foreign(bench, name, drops) for name in bench.suite.rewards]
    if drops:
        findings.append(_blind(drops))
    return findings


def _drop(bench: Bench, found: Response, name: str, owned: bool) -> Floats:
    """(n,) fall of the reward, mean over doses, in real standard deviations; NaN for images that do not count.

    What another's lesion leaves without an object gets the worst value by rule, which is no answer of this reward: only
    images where there still is something to judge count. At its own lesion the loss of the object is the answer, and
    images count that have room for the lesion.
    """
    fall = found.value[name][:1] - found.value[name][1:]
    if owned:
        fall = np.where(harmed(found, name), fall, np.nan)
    else:
        fall = np.where(found.valid[name][:1] & found.valid[name][1:], fall, np.nan)
    there = np.isfinite(fall).any(0)
    mean = np.full(fall.shape[1], np.nan)
    mean[there] = np.nanmean(fall[:, there], 0)
    return mean / bench.spread(name)


def _own(bench: Bench, owner: str, lesion: str, drop: Floats | None, reason: str) -> Finding:
    what = f"Mean fall of the reward over the doses of {lesion.replace('_', ' ')}, its own lesion, in real sd."
    threshold = f">= {LEAST_RESPONSE}"
    if drop is None or not _enough(drop):
        return not_judged(NAME, owner, what, threshold, reason)
    value = float(np.nanmean(drop))
    passed = value >= LEAST_RESPONSE
    return Finding(NAME, owner, what, value, bench.interval(drop), threshold, passed, int(np.isfinite(drop).sum()),
                   "" if passed else "it does not see its own lesion", {"lesion": lesion})  # fmt: skip


def _foreign(bench: Bench, name: str, drops: dict[str, dict[str, Floats]]) -> Finding:
    what = "Largest unexplained answer to another reward's lesion, as a share of the mean answer to its own."
    threshold = f"<= {MOST_FOREIGN:.2f}"
    own = [drop[name] for lesion, drop in drops.items() if LESIONS[lesion].owner == name and _enough(drop[name])]
    details: dict[str, Any] = {"responses": {lesion: _mean(drop[name]) for lesion, drop in drops.items()}}
    shares: dict[str, float] = {}
    explained: dict[str, str] = {}
    for lesion, drop in drops.items():
        if own and LESIONS[lesion].owner != name and _enough(drop[name]):
            shares[lesion] = _share(drop[name], own, np.arange(len(drop[name])))
            if shares[lesion] > MOST_FOREIGN and (name, lesion) in EXPLAINED:
                explained[lesion] = EXPLAINED[name, lesion]
    judged = {lesion: share for lesion, share in shares.items() if lesion not in explained}
    details |= {"shares": shares, "explained": explained}
    if not judged:
        why = "there is no lesion of another reward that it could be judged by"
        why = why if own else "its own lesions cannot be made of these images, or it has no value there"
        return Finding(NAME, name, what, None, None, threshold, None, 0, why, details)
    worst = max(judged, key=lambda lesion: judged[lesion])
    other = drops[worst][name]
    value, low, high = bench.interval_of(lambda drawn: _share(other, own, drawn), len(other), resamples=200)
    passed = value <= MOST_FOREIGN
    over = [lesion for lesion, share in judged.items() if share > MOST_FOREIGN]
    reason = "" if passed else "it answers to " + ", ".join(lesion.replace("_", " ") for lesion in over)
    return Finding(NAME, name, what, value, (low, high), threshold, passed, len(other), reason, details)


def _enough(drop: Floats) -> bool:
    return bool(np.isfinite(drop).sum() >= FEWEST)


def _share(other: Floats, own: list[Floats], drawn: Rows) -> float:
    """|mean fall| at another's lesion over that at its own ones; infinite where there is no fall at all."""
    below = abs(float(np.mean([_mean(one[drawn]) for one in own])))
    return abs(_mean(other[drawn])) / below if below else math.inf


def _blind(drops: dict[str, dict[str, Floats]]) -> Finding:
    """Lesions that no reward on trial answers to."""
    strongest = {lesion: max((_mean(drop[name]) for name in drop), key=_or_none) for lesion, drop in drops.items()}
    unseen = [lesion for lesion, value in strongest.items() if not value >= LEAST_RESPONSE]
    what = (
        f"Lesions that move no reward by {LEAST_RESPONSE} real sd on the average over doses: blind spots of the suite."
    )
    reason = "" if not unseen else "unseen: " + ", ".join(lesion.replace("_", " ") for lesion in unseen)
    n = max(len(one) for drop in drops.values() for one in drop.values())
    return Finding(NAME, None, what, float(len(unseen)), None, "<= 0", not unseen, n, reason, {"strongest": strongest})


def _mean(values: Floats) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _or_none(value: float) -> float:
    return -math.inf if math.isnan(value) else value
