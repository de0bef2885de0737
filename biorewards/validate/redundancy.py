"""Check 9: how many different questions the rewards ask."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.labels import Floats
from biorewards.validate.pools import candidates
from biorewards.validate.statistics import rank_correlations
from biorewards.validate.variance import centred

NAME = "redundancy"
#: Rank correlation of two rewards over real images beyond which four fifths of their variance is shared: one question
#: with two weights.
MOST_ALIKE = 0.9
#: Effective number of rewards over their number. Half: as if every question were asked twice.
LEAST_SHARE = 0.5


def redundancy(bench: Bench) -> list[Finding]:
    """Effective number of rewards on real images, on damaged ones, and the pair that is most alike."""
    pool = candidates(bench)
    samples = {
        "real images": (bench.real().value, bench.target),
        "images of the pressure test": (bench.score(pool.images, pool.goal).value, pool.goal),
    }
    return [one for sample, (value, target) in samples.items() for one in _of(bench, sample, value, target)]


def _of(bench: Bench, sample: str, value: pd.DataFrame, target: Rows) -> list[Finding]:
    table = value.to_numpy(np.float64)
    names = [n for k, n in enumerate(bench.suite.rewards) if np.isfinite(table[:, k]).any() and np.nanstd(table[:, k])]
    what = f"Effective number of rewards on {sample}, as a share of their number (participation ratio of eigenvalues)."
    alike = f"Largest rank correlation of two rewards on {sample}, within classes."
    if len(names) < 2:
        reason = "fewer than two rewards have values that vary"
        return [not_judged(NAME, None, what, f">= {LEAST_SHARE}", reason)]
    table = table[:, [list(bench.suite.rewards).index(name) for name in names]]
    there = np.isfinite(table).all(1)
    table = centred(table[there], target[there])
    upper = np.triu_indices(len(names), 1)

    def effective(drawn: Rows) -> float:
        return participation(rank_correlations(table[drawn])) / len(names)

    def most(drawn: Rows) -> float:
        return float(np.abs(rank_correlations(table[drawn])[upper]).max())

    full = rank_correlations(table)
    pair = int(np.abs(full[upper]).argmax())
    closest = [names[upper[0][pair]], names[upper[1][pair]]]
    total = table @ np.array([bench.suite.weights[name] for name in names])
    shares = [bench.suite.weights[n] * float(np.cov(table[:, k], total)[0, 1]) / max(float(total.var(ddof=1)), 1e-12)
              for k, n in enumerate(names)]  # fmt: skip
    details = {
        "sample": sample, "names": names, "correlation": full.tolist(),
        "effective_number": participation(full), "number": len(names), "closest": closest,
        "share_of_total_variance": dict(zip(names, shares, strict=True)),
    }  # fmt: skip
    found = []
    for sentence, statistic, bound, wording, extra in (
        (what, effective, LEAST_SHARE, f">= {LEAST_SHARE}", details),
        (alike, most, MOST_ALIKE, f"<= {MOST_ALIKE}", {"sample": sample, "closest": closest}),
    ):
        figure, low, high = bench.interval_of(statistic, len(table), resamples=200)
        passed = figure >= bound if statistic is effective else figure <= bound
        reason = "" if passed else f"{closest[0]} and {closest[1]} ask nearly one question"
        found.append(Finding(NAME, None, sentence, figure, (low, high), wording, passed, len(table), reason, extra))
    return found


def participation(correlation: Floats) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: K for K unrelated rewards, 1 where all say the same."""
    return float(np.trace(correlation) ** 2 / (correlation**2).sum())
