"""The reproduction's tables from pools that are known: means, paired differences, intervals, what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.reproduction import page, pools
from benchmarks.reproduction.setting import Where, teachable
from benchmarks.reproduction.sizes import CANDIDATES, SIZES
from benchmarks.reproduction.statistics import draws, interval, weights
from benchmarks.reproduction.tables import results_of
from biorewards.rewards import PAPER_WEIGHTS
from rl.nft import Settings

NAMES = list(PAPER_WEIGHTS)
SIX = [name for name in NAMES if name != "moa"]
PROMPTS = 24
ABOUT: dict[str, Any] = {
    "command": "python -m benchmarks.reproduce", "seconds": {"base": 60.0}, "unfinished_from": "",
    "size": {"pixels": 48, "steps": 3, "groups": 2, "rollouts": 4, "rollout_steps": 2, "choice": 1, "compounds": 1},
    "machine": {"device": "cpu", "threads": 1}, "passes_of_a_run": 800,
}  # fmt: skip


def pool(seed: int, shift: float = 0.0, samples: int = 4, count: int = PROMPTS) -> pools.Arrays:
    """Rewards with an effect of the prompt that is far larger than what differs between policies."""
    prompt = np.random.default_rng(99).normal(size=(count, 1, 7)) * 3
    rng = np.random.default_rng(seed)
    shape = (count, samples)
    return {
        "value": prompt + shift + 0.3 * rng.normal(size=(*shape, 7)), "measure": rng.normal(size=(*shape, 7)),
        "nothing": np.zeros(shape, bool), "correct": rng.random(shape) < 0.5, "second": rng.random(shape),
        "second_correct": rng.random(shape) < 0.5, "classical": rng.normal(size=(*shape, 6)),
        "features": rng.normal(size=(*shape, 5)) + 0.1 - shift, "pixels": rng.normal(size=(*shape, 4)),
    }  # fmt: skip


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    """Four plates of three controls, two prompts each."""
    rows = np.arange(PROMPTS)
    where = Where(rows % 4, rows % 12)
    weight = torch.tensor([PAPER_WEIGHTS[name] for name in NAMES])
    made = SimpleNamespace(
        work=tmp_path, judge=SimpleNamespace(names=NAMES, weights=weight),
        classical=SimpleNamespace(names=SIX, weights=weight[1:]), second_accuracy=0.9,
        yardstick=SimpleNamespace(spread_ratios=lambda judged, target: dict.fromkeys(SIX[1:], 1.0)),
        prompts=SimpleNamespace(compounds=["a"] * PROMPTS, target=torch.ones(PROMPTS, dtype=torch.int64)),
        real=SimpleNamespace(target=torch.ones(PROMPTS, dtype=torch.int64)), where=where, real_where=where,
    )  # fmt: skip
    (tmp_path / "pools").mkdir()
    for name, one in {
        "reference": pool(1, samples=1, count=80), "real": pool(2, 1.0, 1), "copy-control": pool(3, -1.0, 1),
        "base": pool(4), "rl-0": pool(5, 0.5), "rl-1": pool(6, 0.5), "base-3": pool(7, samples=2),
        "kl-0.1": pool(8, samples=2), "only-moa": pool(9, samples=2),
    }.items():  # fmt: skip
        pools.save(tmp_path / "pools" / f"{name}.npz", one)
    return made


def test_tables_of_known_pools(setting: Any) -> None:
    found = results_of(setting, ABOUT)
    rows = found["table1"]
    assert {"base", "base + best-of-4", "RL", "RL + best-of-4", "real", "base, 3 Euler steps"} <= set(rows)
    # What no pool is there for is left out, and so are the differences to it.
    assert not any("distribution" in name or "further" in name for name in (*rows, *found["differences"]))
    assert rows["RL"]["seeds"] == 2 and rows["base"]["seeds"] == 1
    gain = found["differences"]["RL - base"]
    for name in NAMES:
        # Prompts differ by 3; only because they are paired does the interval tell 0.5 from 0.
        assert gain[name][0] == pytest.approx(0.5, abs=0.15) and gain[name][1] > 0.2
        assert rows["RL"][name][2] - rows["RL"][name][1] > 1
    assert gain["total"][0] == pytest.approx(0.5 * 12, abs=1.2)
    assert rows["base + best-of-4"]["total"][0] > rows["base"]["total"][0]
    assert rows["RL"]["frechet"][0] > rows["base"]["frechet"][0] > 0
    assert set(found["verdict"]["RL - base: rewards"]["interval above 0"]) == set(NAMES)
    assert found["verdict"]["way of the total from base to real"] == pytest.approx(0.5, abs=0.15)
    assert found["verdict"]["best-of-N rises with every doubling: base"] is True
    assert [row["n"] for row in found["curves"]["RL"]] == [1, 2, 4]
    assert found["curves"]["base"][0]["total"][0] == pytest.approx(rows["base"]["total"][0], abs=1e-4)
    assert list(found["kl_weight"]) == ["0.1"] and list(found["single"]) == ["moa"]
    text = page.markdown({**found, "about": {**found["about"]}})
    assert "| RL + best-of-4 |" in text and "CellFluxRL + best-of-4" in text and "Not finished" not in text
    drawing = page.figures(found)["reproduction_n.svg"]
    assert drawing.count("<polyline") == 2 and drawing.startswith("<svg") and drawing.endswith("</svg>\n")


def test_plates_are_drawn_before_controls() -> None:
    where = Where(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2]))
    found = weights(where, 0)
    assert np.allclose(found.sum(1), 1) and np.allclose(found[0], 0.25)
    assert np.allclose(found[:, 0], found[:, 1]), "images of one control come together"
    values = np.array([[[0.0], [0.0], [0.0], [1.0]]])
    ((value, low, high),) = interval(draws(values, found))
    # Whole plates are left out in a quarter of the draws each.
    assert (value, low, high) == (0.25, 0.0, 1.0)


def test_sizes_and_candidates_are_settings() -> None:
    for size in SIZES.values():
        for changes in CANDIDATES.values():
            made = Settings(steps=size.steps, groups=size.groups, rollouts=size.rollouts, times=size.times, **changes)
            assert not made.warnings


def test_what_can_be_taught_is_one_compound_of_a_class_that_the_base_hits_every_other_time(tmp_path: Path) -> None:
    path = tmp_path / "compounds.json"
    told = {"always": 0.98, "never": 0.01, "often": 0.7, "halves": 0.52, "too": 0.47}
    path.write_text(json.dumps(told))
    pool = SimpleNamespace(compounds=list(told), targets=np.array([1, 2, 3, 4, 4]))
    data: Any = SimpleNamespace(test=pool)

    def chosen(count: int) -> list[str]:
        size = replace(SIZES["small"], compounds=count)
        return teachable(size, path, None, data, cast(Any, None), None)

    assert chosen(1) == ["halves"] and chosen(2) == ["halves", "often"], "its second compound is of the same class"
    assert chosen(9) == ["always", "halves", "never", "often"] and chosen(0) == list(told)
