"""All tables of the reproduction, from the pools that are there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.reproduction import pools
from benchmarks.reproduction.setting import Setting, Where
from benchmarks.reproduction.statistics import (
    Floats,
    along,
    columns,
    draws,
    interval,
    kept,
    reference_of,
    spreads,
    totals,
    weights,
)

#: Row of Table 1 -> (pools that it is made of: a name, or a stem of the seeds), best of how many.
ROWS = {
    "copy-control": ("copy-control", 1),
    "base": ("base", 1),
    "base, own solver and guidance": ("base-own", 1),
    "base + best-of-4": ("base", 4),
    "base pre-trained further": ("more-*", 1),
    "RL": ("rl-*", 1),
    "RL + best-of-4": ("rl-*", 4),
    "RL, distribution preset": ("distribution-*", 1),
    "real": ("real", 1),
}
#: Differences that are reported: first minus second.
PAIRS = [
    ("RL", "base"),
    ("RL", "base pre-trained further"),
    ("base pre-trained further", "base"),
    ("RL + best-of-4", "RL"),
    ("RL + best-of-4", "base + best-of-4"),
    ("RL", "base + best-of-4"),
    ("RL, distribution preset", "base"),
]


class Tables:
    """Reads pools; every mean uses the same resampling, so that differences are paired."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.names = setting, setting.judge.names
        reference = self.pool("reference")
        assert reference is not None
        self.reference = reference_of(reference["features"][:, 0], reference["pixels"][:, 0])
        self.weight = {id(where): weights(where, 0) for where in (setting.where, setting.real_where)}
        self.columns: list[str] = []
        self.found: dict[tuple[str, int], tuple[Floats, list[dict[str, float]]] | None] = {}

    def pool(self, name: str) -> pools.Arrays | None:
        """A pool, None where it is not there yet."""
        path = self.setting.work / "pools" / f"{name}.npz"
        return pools.load(path) if path.exists() else None

    def seeds(self, stem: str) -> list[pools.Arrays]:
        """The pools of a name or, where it ends in a star, of all its seeds."""
        names = [stem] if not stem.endswith("*") else [stem[:-1] + str(k) for k in range(100)]
        return [pool for name in names if (pool := self.pool(name)) is not None]

    def values(self, stem: str, n: int) -> tuple[Floats, list[dict[str, float]]] | None:
        """(S, P, K) columns of the best of n, averaged over the blocks of n samples of a pool; spread ratios."""
        if (stem, n) not in self.found:
            self.found[stem, n] = self._values(stem, n)
        return self.found[stem, n]

    def _values(self, stem: str, n: int) -> tuple[Floats, list[dict[str, float]]] | None:
        target = self.setting.real.target if stem == "real" else self.setting.prompts.target
        every, ratios = [], []
        for pool in self.seeds(stem):
            blocks = []
            for first in range(0, pool["value"].shape[1] - n + 1, n):
                part = {key: value[:, first : first + n] for key, value in pool.items()}
                one = kept(part, totals(self.setting, part), n)
                self.columns, found = columns(self.setting, self.names, one, self.reference)
                blocks.append(found)
                ratios.append(spreads(self.setting, one, target))
            if blocks:
                every.append(np.mean(blocks, 0))
        return (np.stack(every), ratios) if every else None

    def where(self, stem: str) -> Where:
        """Plates and controls of a row."""
        return self.setting.real_where if stem == "real" else self.setting.where

    def row(self, stem: str, n: int) -> dict[str, Any] | None:
        """metric -> [value, low, high]; spread: measure -> ratio; seeds."""
        if (found := self.values(stem, n)) is None:
            return None
        every, ratios = found
        told = interval(draws(every, self.weight[id(self.where(stem))], stem))
        known = {key: [r[key] for r in ratios if np.isfinite(r[key])] for key in ratios[0]}
        spread = {key: round(float(np.mean(values)), 3) for key, values in known.items() if values}
        return {**dict(zip(self.columns, told, strict=True)), "spread": spread, "seeds": len(every),
                "images": every.shape[1]}  # fmt: skip

    def difference(self, first: str, second: str) -> dict[str, Any] | None:
        """metric -> [difference, low, high], paired over plates and controls."""
        (a, n), (b, m) = ROWS[first], ROWS[second]
        one, two = self.values(a, n), self.values(b, m)
        if one is None or two is None:
            return None
        weight = self.weight[id(self.setting.where)]
        # Rows of the same policies keep their seeds together, too.
        return dict(zip(self.columns, interval(draws(one[0], weight, a) - draws(two[0], weight, b)), strict=True))

    def curve(self, stem: str) -> list[dict[str, Any]] | None:
        """Best-of-N: every reward at N = 1, 2, 4, ..., over all subsets of the pool."""
        found = self.seeds(stem)
        if not found:
            return None
        size = found[0]["value"].shape[1]
        rows = []
        for n in (2**k for k in range(size.bit_length()) if 2**k <= size):
            values = np.stack([along(self.setting, pool, n) for pool in found])
            told = interval(draws(values, self.weight[id(self.setting.where)], stem))
            rows.append({"n": n, **dict(zip([*self.names, "total"], told, strict=True))})
        return rows

    def some(self, prefix: str) -> dict[str, Any]:
        """Rows of the pools whose name begins so, by the rest of it."""
        folder = self.setting.work / "pools"
        found = {}
        for path in sorted(folder.glob(f"{prefix}-*.npz")):
            if (row := self.row(path.stem, 1)) is not None:
                found[path.stem.removeprefix(f"{prefix}-")] = row
        return found


def results_of(setting: Setting, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page shows, as JSON. Tables whose pieces are not there yet are left out."""
    tables = Tables(setting)
    rows = {name: row for name, (stem, n) in ROWS.items() if (row := tables.row(stem, n)) is not None}
    for name, row in tables.some("base").items():
        if name.isdigit():
            rows[f"base, {name} Euler steps"] = row
    pairs = {f"{a} - {b}": d for a, b in PAIRS if (d := tables.difference(a, b)) is not None}
    choice = setting.work / "choice.json"
    curves = {name: c for name, stem in (("base", "base"), ("RL", "rl-*"), ("RL, distribution preset",
              "distribution-*")) if (c := tables.curve(stem)) is not None}  # fmt: skip
    found = {
        "about": {
            **about, "prompts": len(setting.prompts.compounds), "plates": len(np.unique(setting.where.plate)),
            "controls": len(np.unique(setting.where.control)), "compounds": sorted(set(setting.prompts.compounds)),
            "second_accuracy": round(setting.second_accuracy, 3),
            "weights": dict(zip(setting.judge.names, setting.judge.weights.tolist(), strict=True)),
        },
        "choice": json.loads(choice.read_text()) if choice.exists() else None,
        "table1": rows, "differences": pairs, "curves": curves, "kl_weight": tables.some("kl"),
        "mix_beta": tables.some("mix"), "single": tables.some("only"),
    }  # fmt: skip
    return {**found, "verdict": verdict(found, setting.judge.names)}


def verdict(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What was asked for, and whether it is so. Missing pieces leave their question out."""
    rows, pairs, told = found["table1"], found["differences"], {}

    def above(pair: str, metrics: list[str]) -> dict[str, list[str]]:
        difference = pairs[pair]
        return {
            "interval above 0": [m for m in metrics if difference[m][1] > 0],
            "higher": [m for m in metrics if difference[m][0] > 0 and difference[m][1] <= 0],
            "not higher": [m for m in metrics if difference[m][0] <= 0],
        }

    held = ["held-out moa", *(m for m in next(iter(rows.values())) if m.startswith("classical ") and m[10:] != "total")]
    for pair in ("RL - base", "RL - base pre-trained further"):
        if pair in pairs:
            told[f"{pair}: rewards"] = above(pair, names)
            told[f"{pair}: held-out verifiers"] = above(pair, held)
    if "RL" in rows and "real" in rows:
        base, now, real = (rows[name]["total"][0] for name in ("base", "RL", "real"))
        told["way of the total from base to real"] = round((now - base) / (real - base), 3) if real != base else None
        told["frechet of RL over that of the base"] = round(rows["RL"]["frechet"][0] / rows["base"]["frechet"][0], 3)
    for name, curve in found["curves"].items():
        totals_ = [row["total"][0] for row in curve]
        told[f"best-of-N rises with every doubling: {name}"] = bool(np.all(np.diff(totals_) > 0))
    if {"base", "RL"} <= set(found["curves"]):
        both = zip(found["curves"]["RL"], found["curves"]["base"], strict=True)
        told["RL above base at every N"] = all(a["total"][0] > b["total"][0] for a, b in both)
        told |= equal_compute(found)
    if (row := rows.get("RL, distribution preset")) is not None:
        told["spread ratios, distribution preset, outside [0.7, 1.4]"] = [
            k for k, v in row["spread"].items() if not 0.7 <= v <= 1.4
        ]
        told["distribution preset: total on the paper's suite"] = pairs["RL, distribution preset - base"]["total"]
    return told


def equal_compute(found: dict[str, Any]) -> dict[str, Any]:
    """Selection with the compute of a run: best of which N the base can afford over so many images."""
    steps = found["about"]["size"]["rollout_steps"]
    curve = found["curves"]["base"]
    told = {}
    for images in (100, 1000, 10_000):
        n = 1 + found["about"]["passes_of_a_run"] / (steps * images)
        row = max((row for row in curve if row["n"] <= n), key=lambda row: row["n"])
        told[f"base, best of {n:.1f}, costs as much as RL over {images} images"] = {
            "measured at": row["n"], "total": row["total"], "RL": found["curves"]["RL"][0]["total"],
        }  # fmt: skip
    return told
