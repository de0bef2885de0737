"""A score table in a few numbers: each reward's mean with its uncertainty, beside what real images score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from biorewards.assay import Assay
from biorewards.reward import Reason, Suite

#: Bootstrap resamples behind an interval: its ends then move by about 3 % of its width from seed to seed.
RESAMPLES = 1000
#: A class is called the worst only with this many scored images.
ENOUGH = 5
NO_LABEL = "(no label)"
TOTALS = ("total", "total_label_free")

Floats = npt.NDArray[np.float64]


def summarise(scores: pd.DataFrame, assay: Assay, suite: Suite, *, seed: int = 0) -> dict[str, Any]:
    """Summary of a score table; plain numbers, text and None, ready for JSON.

    images, unreadable, unlabelled, unknown_label: row counts. fingerprint, assay: what the numbers stand on.
    rewards: name -> for each reward, "total" and "total_label_free":
        n, missing: rows with and without a value.
        mean, ci_low, ci_high: 95 % percentile bootstrap over images (images of one well are not independent: over
            wells the interval is wider). sd: of the values.
        real_mean, real_n: what real held-out images score (assay card), None when the assay does not say.
        worst_share: share of the n values that are the worst the reward gives (nothing found, or beyond the limit).
        spread_ratio: standard deviation of the measure within classes / that of real images, pooled over classes;
            well below 1 means a generator that draws the mean. None without reference.
        reasons: reason -> rows. classes: class -> {n, mean}. worst_class: lowest mean among those with 5 images.
    furthest: {class, reward, mean, real_mean, shortfall}: the class and reward furthest from real images, where
        shortfall is (real - mean) / (real - worst value), or None.
    """
    names = list(suite.rewards)
    labels = scores["Metadata_MoA"].where(scores["Metadata_MoA"] != "", scores["Metadata_Compound"])
    labels = labels.where(labels != "", NO_LABEL)
    columns = [*names, *TOTALS]
    values = scores[[f"Reward_{name}" for name in columns]].to_numpy(np.float64)
    low, high = bootstrap(values, seed)
    target = torch.tensor(_targets(scores, assay), dtype=torch.int64)
    real_scores: dict[str, dict[str, float]] = assay.card.get("real_scores", {})
    rewards: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(columns):
        value = values[:, k]
        there = ~np.isnan(value)
        worst = getattr(suite.rewards.get(name), "worst", None)  # a user's own reward need not have one
        by_class = pd.Series(value[there]).groupby(labels[there].to_numpy()).agg(["count", "mean"])
        enough = by_class[by_class["count"] >= ENOUGH]
        real = real_scores.get(name, {})
        rewards[name] = {
            "n": int(there.sum()),
            "missing": int((~there).sum()),
            "mean": _plain(value[there].mean()) if there.any() else None,
            "ci_low": _plain(low[k]),
            "ci_high": _plain(high[k]),
            "sd": _plain(value[there].std(ddof=1)) if there.sum() > 1 else None,
            "real_mean": _plain(real.get("mean")),
            "real_n": real.get("n"),
            "worst_share": _plain((value[there] <= worst).mean()) if worst is not None and there.any() else None,
            "spread_ratio": spread_ratio(scores, name, assay, target) if name in suite.rewards else None,
            "reasons": scores[f"Reason_{name}"].value_counts().to_dict() if name in suite.rewards else {},
            "classes": {
                str(label): {"n": int(n), "mean": _plain(mean)}
                for label, n, mean in zip(by_class.index, by_class["count"], by_class["mean"], strict=True)
            },
            "worst_class": str(enough["mean"].idxmin()) if len(enough) else None,
        }
    first = scores[f"Reason_{names[0]}"]
    unknown = (scores[[f"Reason_{name}" for name in names]] == Reason.UNKNOWN_TARGET.name).any(axis=1)
    return {
        "images": len(scores),
        "unreadable": int((first == Reason.BAD_IMAGE.name).sum()),
        "unlabelled": int((labels == NO_LABEL).sum()),
        "unknown_label": int(unknown.sum()),
        "assay": assay.name,
        "fingerprint": suite.fingerprint,
        "rewards": rewards,
        "furthest": _furthest(rewards, suite),
    }


def bootstrap(values: Floats, seed: int) -> tuple[Floats, Floats]:
    """2.5 and 97.5 % quantiles, (K,) each, of the mean of every column of (N, K) over resampled rows.

    NaN counts as absent. One resampling serves all columns. NaN where a column has fewer than two values.
    """
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    weights = np.concatenate([filled, there], axis=1)
    rng = np.random.default_rng(seed)
    n, k = values.shape
    sums = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ weights for _ in range(RESAMPLES)])
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums[:, :k] / sums[:, k:]
    few = there.sum(0) < 2
    means[:, few] = 0.0
    # A resample may miss every value of a sparse column: it says nothing about its mean.
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    low[few] = high[few] = np.nan
    return low, high


def spread_ratio(scores: pd.DataFrame, name: str, assay: Assay, target: torch.Tensor) -> float | None:
    """sqrt( sum over images ((measure - class mean) / real sd of the class)^2 / (images - classes) ), or None.

    Over images that have a measure and whose class has a reference. About 1 for real images.
    """
    _, real_sd, _ = assay.reference(name, target)
    frame = pd.DataFrame({
        "class": target.numpy(),
        "measure": scores[f"Measure_{name}"].to_numpy(np.float64),
        "sd": real_sd.numpy().astype(np.float64),
    })  # fmt: skip
    frame = frame[(frame["class"] >= 0) & frame["measure"].notna() & (frame["sd"] > 0)]
    freedom = len(frame) - frame["class"].nunique()
    if freedom < 1:
        return None
    centred = frame["measure"] - frame.groupby("class")["measure"].transform("mean")
    return _plain(math.sqrt(float(((centred / frame["sd"]) ** 2).sum()) / freedom))


def _targets(scores: pd.DataFrame, assay: Assay) -> list[int]:
    place = {name: index for index, name in enumerate(assay.classes)}
    return [place.get(label, -1) for label in scores["Metadata_MoA"]]


def _furthest(rewards: dict[str, dict[str, Any]], suite: Suite) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = []
    for name, reward in suite.rewards.items():
        worst, real = getattr(reward, "worst", None), rewards[name]["real_mean"]
        if worst is None or real is None or real <= worst:
            continue
        for label, one in rewards[name]["classes"].items():
            if one["n"] >= ENOUGH and one["mean"] < real:
                shortfall = (real - one["mean"]) / (real - worst)
                entry = {"class": label, "reward": name, "mean": one["mean"], "real_mean": real, "shortfall": shortfall}
                found.append(entry)
    return max(found, key=lambda entry: float(entry["shortfall"]), default=None)


def _plain(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
