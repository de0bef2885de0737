"""A run in its folder: resume to the bit, a kill at any moment, two processes, what is written, when it stops."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rl.evaluation import alarms
from rl.monitor import Journal, read_lines
from rl.run import Schedule, train
from rl.state import StateError, random_state, set_random_state
from tests.rl_toys import Line, data, judge, settings
from tests.rl_worker import losses, train_in

ROOT = Path(__file__).resolve().parents[1]


def go(out: Path, steps: int = 4, resume: bool = False, **options: Any) -> Any:
    schedule = options.pop("schedule", Schedule(evaluate=2, save=1, images=8))
    return train(
        options.pop("policy", None) or Line(), options.pop("judge", judge()), data(), settings(steps=steps, **options),
        out=out, accelerator=Accelerator(cpu=True), schedule=schedule, resume=resume,
    )  # fmt: skip


def same(a: Path, b: Path) -> None:
    """The states of two runs, and all that was logged but times, are equal to the bit."""
    one, other = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert one.keys() == other.keys() and len(one) > 10
    for key, value in one.items():
        if key != "random":
            assert torch.equal(value, other[key]), key
    logs = [
        [{k: v for k, v in line.items() if not k.startswith(("seconds", "samples", "score_share"))} for line in lines]
        for lines in (read_lines(a / "metrics.jsonl"), read_lines(b / "metrics.jsonl"))
    ]
    assert json.dumps(logs[0]) == json.dumps(logs[1])


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    train_in(tmp_path / "whole", 4, False)
    train_in(tmp_path / "parts", 2, False)
    # What another program drew in between must not matter.
    torch.rand(7), random.random(), np.random.rand()  # noqa: NPY002
    train_in(tmp_path / "parts", 4, True)
    # The shorter run evaluated at its end, where the longer one did not.
    lines = read_lines(tmp_path / "parts" / "metrics.jsonl")
    kept = [line for line in lines if not (line["kind"] == "eval" and line["step"] == 2)]
    assert len(kept) == len(lines) - 1
    (tmp_path / "parts" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    same(tmp_path / "whole", tmp_path / "parts")


def worker(*args: object) -> list[str]:
    return [sys.executable, "-m", "tests.rl_worker", *map(str, args)]


def test_killed_run_goes_on_from_its_last_save(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(worker("train", killed, 40), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    log = killed / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while sum(line["kind"] == "train" for line in read_lines(log)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with log.open("a") as file:
        file.write('{"kind": "train", "st')  # as a kill leaves it at the worst moment
    (killed / ".state.safetensors.123.tmp").write_bytes(b"half")
    done = max(line["step"] for line in read_lines(log))
    train_in(killed, done + 2, True)
    train_in(tmp_path / "whole", done + 2, False)
    same(tmp_path / "whole", killed)


def test_two_processes_give_the_loss_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    losses(tmp_path / "1.json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launch, "tests.rl_worker", "losses", tmp_path / "2.json"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400, capture_output=True)
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-7)
    for a, b in zip(one["lines"], two["lines"], strict=True):
        assert a["unscored"] > 0
        for key, value in a.items():
            if not key.startswith(("seconds", "samples", "score_share")):
                assert value == pytest.approx(b[key], rel=1e-4, abs=1e-7), key


def test_folder_of_a_run(tmp_path: Path) -> None:
    result = go(tmp_path, steps=4)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("real", 0), ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4),
    ]  # fmt: skip
    table = pd.read_parquet(tmp_path / "metrics.parquet")
    assert len(table) == len(lines) and {"reward/near", "share/near", "total", "alarms"} <= set(table)
    for file in ("generator.safetensors", "best.safetensors", "state.safetensors", "samples/step_000004.png"):
        assert (tmp_path / file).stat().st_size > 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["mix_beta"] == 0.1 and config["run"]["rewards"]
    page = (tmp_path / "report.html").read_text()
    assert "Total on held-out controls" in page and page.count("<svg") > 8 and "http" not in page.split("</style>")[1]
    assert torch.equal(load_file(tmp_path / "generator.safetensors")["by"], result.policy.net.by.detach())
    assert result.last["total"] > result.first["total"] and result.ended == "4 steps are done"
    # Gains are paired: the same sources, so that their interval is far narrower than that of a mean.
    gain = [result.last[f"{kind}/total"] for kind in ("gain_low", "gain", "gain_high")]
    assert 0 < gain[0] <= gain[1] <= gain[2] and "gain/total" not in result.first
    assert gain[1] == pytest.approx(result.last["total"] - result.first["total"], rel=0.2)


def test_best_is_the_best_evaluation(tmp_path: Path) -> None:
    """One step that is far too long: the base stays the best."""
    worse = go(tmp_path / "b", steps=1, policy=Line(WANTED_SHIFT), learning_rate=1.0)
    assert worse.last["total"] < worse.first["total"]
    assert load_file(tmp_path / "b" / "best.safetensors")["by"].tolist() == pytest.approx([WANTED_SHIFT] * 2)


WANTED_SHIFT = 0.39


def test_what_may_not_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no state to resume"):
        go(tmp_path / "none", resume=True)
    go(tmp_path, steps=2)
    with pytest.raises(ValueError, match="--resume"):
        go(tmp_path, steps=2)
    with pytest.raises(StateError, match=r"mix_beta 0\.1, now it is 0\.5"):
        go(tmp_path, steps=3, resume=True, mix_beta=0.5)
    with pytest.raises(StateError, match="rewards"):
        go(tmp_path, steps=3, resume=True, judge=judge(-1.0))
    with pytest.raises(StateError, match="base"):
        go(tmp_path, steps=3, resume=True, policy=Line(0.1))
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(StateError, match="is no state"):
        go(tmp_path, steps=3, resume=True)


def test_random_streams_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), random.random(), float(np.random.rand())  # noqa: NPY002

    random.gauss(), np.random.standard_normal()  # noqa: NPY002 (each keeps a second number)
    row = random_state()
    first = draw(), random.gauss()
    draw()
    set_random_state(row)
    assert (draw(), random.gauss()) == first


def test_guard_stops_on_what_is_not_rewarded(tmp_path: Path) -> None:
    """Away from real images on purpose: the reward falls for being near them."""
    options = {"judge": judge(-1.0), "learning_rate": 0.2, "policy": Line(WANTED_SHIFT)}
    guarded = go(tmp_path / "a", steps=12, schedule=Schedule(evaluate=1, save=5, images=8, guard=True), **options)
    assert guarded.ended.startswith("stopped: ") and "distance" in guarded.ended and guarded.last["step"] < 12
    free = go(tmp_path / "b", steps=4, schedule=Schedule(evaluate=1, save=5, images=8), **options)
    assert free.last["step"] == 4 and free.ended == "4 steps are done"
    assert any(line.get("alarms") for line in read_lines(tmp_path / "b" / "metrics.jsonl"))


def test_alarms() -> None:
    first = {
        "spread/nucleus_size": 1.0, "distance": 10.0, "class_entropy": 2.0, "diversity": 1.0, "nothing_found": 0.0,
        "held_out/other": -1.0,
    }  # fmt: skip
    assert not alarms(first, first, {})
    for key, value, text in (
        ("spread/nucleus_size", 0.4, "collapses"), ("distance", 16.0, "distance"), ("class_entropy", 0.5, "lock-in"),
        ("diversity", 0.3, "alike"), ("nothing_found", 0.2, "no nucleus"), ("held_out/other", -2.0, "other fell"),
    ):  # fmt: skip
        assert [text in one for one in alarms({**first, key: value}, first, {})] == [True]


def test_live_line_shows_what_matters(tmp_path: Path) -> None:
    stream = io.StringIO()
    journal = Journal(tmp_path, Accelerator(cpu=True), 9, stream)
    journal.live({
        "step": 3, "total": -1.5, "reward/moa": 0.5, "kl": 0.01, "r_sd": 0.1, "useful_groups": 1.0,
        "samples_per_s": 12.0, "score_share": 0.2,
    })  # fmt: skip
    text = stream.getvalue()
    assert all(piece in text for piece in ("step 3/9", "total -1.50", "moa 0.50", "kl 0.01", "r ±0.10", "scoring 20 %"))
