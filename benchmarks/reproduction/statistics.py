"""From pools to rows of a table: means, distances, hierarchical intervals, paired differences."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.reproduction.pools import Arrays
from benchmarks.reproduction.setting import Setting, Where
from biorewards.audit.distances import Strata, frechet, kernel, moments, self_similarity
from biorewards.audit.selection import selection_weights
from rl.rewards import Judged

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000


class Reference(NamedTuple):
    """Real training images, in the encoder's features and in pixel statistics."""

    features: Any
    features_self: float
    encoder: Any
    pixels: Any


def reference_of(features: Floats, pixels: Floats) -> Reference:
    """Moments and self-similarity of the real images that distances are taken to."""
    x = torch.from_numpy(features).float()
    one = Strata(np.zeros(len(x), dtype=np.intp), np.ones(1))
    return Reference(x, float(self_similarity(x, one).mean()), moments(features), moments(pixels))


def columns(setting: Setting, names: list[str], chosen: Arrays, reference: Reference) -> tuple[list[str], Floats]:
    """Names, and (P, K) values whose means are the figures of a row; distances by the influence of each image."""
    value = chosen["value"]
    total = (value * setting.judge.weights.double().numpy()).sum(1)
    classical = chosen["classical"]
    one = Strata(np.zeros(len(value), dtype=np.intp), np.ones(1))
    weight = np.full(len(reference.features), 1 / len(reference.features))
    far = frechet(chosen["features"], reference.encoder)
    apart = kernel(
        torch.from_numpy(chosen["features"]).float(), one, reference.features, weight, reference.features_self
    )
    pixels = frechet(chosen["pixels"], reference.pixels)
    every = {
        **{name: value[:, k] for k, name in enumerate(names)},
        "total": total,
        "moa_accuracy": chosen["correct"].astype(float),
        "frechet": far.value + far.influence,
        "kernel": apart.value + apart.influence,
        "held-out moa": chosen["second"],
        "held-out moa accuracy": chosen["second_correct"].astype(float),
        **{f"classical {name}": classical[:, k] for k, name in enumerate(setting.classical.names)},
        "classical total": (classical * setting.classical.weights.double().numpy()).sum(1),
        "pixel distance": pixels.value + pixels.influence,
        "nothing found": chosen["nothing"].astype(float),
    }
    return list(every), np.stack(list(every.values()), 1)


def kept(pool: Arrays, total: Floats, n: int) -> Arrays:
    """The best of the first n samples of each prompt: (P, ...)."""
    place = total[:, :n].argmax(1)
    return {key: value[np.arange(len(place)), place] for key, value in pool.items()}


def totals(setting: Setting, pool: Arrays) -> Floats:
    """(P, M) weighted totals."""
    return np.asarray((pool["value"] * setting.judge.weights.double().numpy()).sum(-1))


def along(setting: Setting, pool: Arrays, n: int) -> Floats:
    """(P, 8) rewards and total of the best of n, over all subsets of the pool."""
    total = totals(setting, pool)
    weight = selection_weights(total, n)
    both = np.concatenate([pool["value"], total[..., None]], 2)
    return np.asarray((weight[..., None] * both).sum(1))


def weights(where: Where, seed: int) -> Floats:
    """(B + 1, P) weights of the images, row 0 equal: plates are drawn with replacement, then controls within them."""
    rng = np.random.default_rng(seed)
    plates = [np.flatnonzero(where.plate == p) for p in np.unique(where.plate)]
    units = [[rows[where.control[rows] == c] for c in np.unique(where.control[rows])] for rows in plates]
    out = np.zeros((RESAMPLES + 1, len(where.plate)))
    out[0] = 1
    for b in range(1, RESAMPLES + 1):
        for p in rng.integers(len(plates), size=len(plates)):
            for c in rng.integers(len(units[p]), size=len(units[p])):
                out[b, units[p][c]] += 1
    return out / out.sum(1, keepdims=True)


def draws(values: Floats, weight: Floats, name: str = "") -> Floats:
    """(B + 1, K) means of (S, P, K) values: images by `weight`, and the S seeds of a row drawn with replacement."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    seeds = len(values)
    share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(weight)) / seeds
    share[0] = 1 / seeds
    means = np.stack([weight @ one for one in values])  # (S, B + 1, K)
    return np.asarray(np.einsum("bs,sbk->bk", share, means))


def interval(found: Floats) -> list[list[float]]:
    """(B + 1, K) draws to K times [value, low, high]: 95 %, percentiles."""
    low, high = np.percentile(found[1:], [2.5, 97.5], axis=0)
    return [[round(float(v), 5) for v in one] for one in zip(found[0], low, high, strict=True)]


def spreads(setting: Setting, chosen: Arrays, target: torch.Tensor) -> dict[str, float]:
    """Standard deviation of each measure within classes over that of real images."""
    measure = torch.from_numpy(chosen["measure"])
    none = torch.zeros(0)
    reason = torch.zeros(measure.shape, dtype=torch.uint8)
    ok = torch.from_numpy(~chosen["nothing"].astype(bool))
    ratios = setting.yardstick.spread_ratios(Judged(none, measure[ok], reason[ok], none), target[ok])
    return {name: round(value, 3) for name, value in ratios.items()}
