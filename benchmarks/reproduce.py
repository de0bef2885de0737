"""CellFluxRL reproduced in kind, on the phantom: python -m benchmarks.reproduce --work reproduction --size small

Draws an experiment of phantom crops, chooses settings on validation plates, post-trains a CellFlux (several seeds, the
paper's preset and the one for populations, one reward at a time, KL weights and mixing betas), pre-trains it further
with the same compute, draws the same prompts on test plates by all of them, and judges by the verifiers that were
rewarded and by ones that were not. Prints the tables; writes them to the work folder, and with --ship to
benchmarks/results/reproduction.json and docs/reproduction.md.

Kill it and start it again as often as needed: finished pieces are kept, runs go on from their last save. --minutes
stops before a new piece once so much time has passed; the tables then hold what there is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.reproduction import page, pools
from benchmarks.reproduction.setting import Setting, prepare
from benchmarks.reproduction.sizes import CANDIDATES, KL_WEIGHTS, MIX_BETAS, SIZES, SOLVER_STEPS, Size
from benchmarks.reproduction.tables import results_of
from biorewards.assay import MIN_IMAGES
from biorewards.io.tables import write_text
from biorewards.rewards import PAPER_WEIGHTS, suite
from cli.rl import load_policy
from generators.pairs import read_pairs
from generators.pretrain import Run
from generators.steps import Settings as Pretraining
from rl.distribution import Population
from rl.monitor import read_lines
from rl.nft import Settings
from rl.rewards import Judge
from rl.run import STATE, WEIGHTS, Schedule, train

BATCH = 32
RESULTS = Path(__file__).parent / "results" / "reproduction.json"
DOCS = Path(__file__).parents[1] / "docs"


class OutOfTime(Exception):
    """No new piece is begun."""


@dataclass
class Bench:
    """Pieces of work, each kept in a file of its own and done once. only: no others than whose names begin so."""

    setting: Setting
    checkpoint: str | None
    seeds: int
    device: str
    until: float
    base: Any
    policy: Any
    accelerator: Accelerator
    only: tuple[str, ...] = ()
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> Size:
        """Of the reproduction."""
        return self.setting.size

    def piece(self, name: str, make: Callable[[], pools.Arrays]) -> None:
        """Make a pool unless it is there."""
        path = self.setting.work / "pools" / f"{name}.npz"
        if path.exists():
            return
        if self.only and not name.startswith(self.only):
            self.left_out.append(name)
            return
        if time.monotonic() > self.until:
            raise OutOfTime(name)
        began = time.monotonic()
        say(f"--- {name}")
        try:
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            pools.save(path, made)
        finally:
            # Read anew: another process may do other pieces of the same work.
            seconds = seconds_of(self.setting.work)
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 1)
            write_text(self.setting.work / "seconds.json", json.dumps(seconds, indent=1) + "\n")

    # ---- pieces ------------------------------------------------------------------------------------------------

    def everything(self) -> None:
        """All pieces, what matters most first."""
        s, size = self.setting, self.size
        own, pool = size.rollout_steps, size.pool
        self.piece("reference", partial(pools.bare, s, s.reference, self.device))
        self.piece("real", partial(pools.given, s, s.real.control, s.real.target, self.device))
        self.piece("copy-control", partial(pools.given, s, s.prompts.control, s.prompts.target, self.device))
        self.piece("base", partial(self.draw, self.policy, pool, own))
        chosen = self.choice()
        short, seeds = replace(chosen, steps=size.sweep), range(self.seeds)

        def post_trained(name: str, settings: Settings, samples: int = pool, **more: Any) -> None:
            self.piece(name, partial(self.after, name, samples, settings, **more))

        for k in seeds:
            post_trained(f"rl-{k}", replace(chosen, seed=k))
            if k == 0:
                for steps in SOLVER_STEPS:
                    self.piece(f"base-{steps}", partial(self.draw, self.policy, 2, steps))
                self.piece("base-own", partial(self.draw, self.base, 2, None))
                post_trained("distribution-0", chosen, preset="distribution")
        for k in seeds:
            self.piece(f"more-{k}", partial(self.after_more, f"more-{k}", pool, k))
        for w in KL_WEIGHTS:
            post_trained(f"kl-{w:g}", replace(short, kl_weight=w), 2)
        for b in MIX_BETAS:
            post_trained(f"mix-{b:g}", replace(short, mix_beta=b), 2)
        for reward in PAPER_WEIGHTS:
            post_trained(f"only-{reward}", replace(chosen, steps=size.single), 2, rewards=[reward])
        for k in seeds[1:]:
            post_trained(f"distribution-{k}", replace(chosen, seed=k), preset="distribution")

    def after(self, name: str, samples: int, settings: Settings, **more: Any) -> pools.Arrays:
        """The pool after post-training."""
        return self.draw(self.trained(name, settings, **more), samples, settings.rollout_steps)

    def after_more(self, name: str, samples: int, seed: int) -> pools.Arrays:
        """The pool after more pre-training."""
        return self.draw(self.pretrained(name, seed), samples, self.size.rollout_steps)

    def draw(self, sampler: Any, samples: int, steps: int | None) -> pools.Arrays:
        """The pool of a policy."""
        return pools.drawn(self.setting, sampler, samples, self.device, steps=steps, tell=say)

    def settings(self, **more: Any) -> Settings:
        """Of a main run, before the choice."""
        size = self.size
        return Settings(**{
            "steps": size.steps, "groups": size.groups, "rollouts": size.rollouts, "times": size.times,
            "rollout_steps": size.rollout_steps, **more,
        })  # fmt: skip

    def choice(self) -> Settings:
        """The candidate with the highest total on validation plates after a short run."""
        path = self.setting.work / "choice.json"
        if not path.exists():
            if time.monotonic() > self.until:
                raise OutOfTime("choice")
            found = {}
            for name, changes in CANDIDATES.items():
                folder = "choice-" + name.replace(", ", "-")
                self.trained(folder, self.settings(steps=self.size.choice, **changes))
                lines = read_lines(self.setting.work / "runs" / folder / "metrics.jsonl")
                last = [line for line in lines if line["kind"] == "eval"][-1]
                first = next(line for line in lines if line["kind"] == "eval")
                found[name] = {"total": last["total"], "base": first["total"], "distance": last["distance"]}
            best = max(found, key=lambda name: found[name]["total"])
            write_text(path, json.dumps({"chosen": best, "candidates": found}, indent=1) + "\n")
        return self.settings(**CANDIDATES[json.loads(path.read_text())["chosen"]])

    def trained(self, name: str, settings: Settings, *, preset: str = "paper", rewards: list[str] | None = None) -> Any:
        """The policy after post-training; the run is gone on with where it stopped."""
        s, out = self.setting, self.setting.work / "runs" / name
        judge = s.judge if rewards is None else Judge(suite(s.assay, rewards), s.assay, scale=s.data.scale)
        train(
            copy.copy(self.policy), judge, s.data, settings, out=out, accelerator=self.accelerator,
            schedule=Schedule(max(1, settings.steps // 4), 5, self.size.evaluated), resume=(out / STATE).exists(),
            population=self.population() if preset == "distribution" else None,
        )  # fmt: skip
        return load_policy("cellflux", str(out / WEIGHTS), {}, settings.rollout_steps)[1]

    def population(self) -> Population:
        """Real images of the training plates as a population; the assay's quantiles where a class has too few."""
        s = self.setting
        real = s.data.real
        least = min(int((real.target == k).sum()) for k in set(s.data.train.targets.tolist()))
        if least < MIN_IMAGES:
            return Population.from_assay(s.judge.names, s.assay)
        return Population.from_real(s.judge.names, s.judge(*real), real.target, s.assay.classes)

    def passes(self) -> int:
        """Network passes of one image in a main run, a backward pass counted as two forward ones."""
        size = self.size
        return size.steps * size.groups * size.rollouts * (size.rollout_steps + 5 * size.times)

    def pretrained(self, name: str, seed: int) -> Any:
        """The base, pre-trained further on the same training plates with the passes of a main run."""
        pairs = read_pairs(self.setting.work / "phantom")
        steps = max(1, self.passes() // (3 * BATCH))
        settings = Pretraining(
            steps=steps, batch=BATCH, rate=3e-4, betas=(0.9, 0.99), warmup=20, cooldown=0.5, clip=1.0, ema=0.99,
            drop=0.15, noise=1.0, augment=0.5, seed=100 + seed, bfloat16=self.size.precision == "bf16",
        )  # fmt: skip
        out = self.setting.work / "runs" / name
        if not (out / STATE).exists():
            shutil.rmtree(out, ignore_errors=True)  # killed before its first save
        begun, _ = load_policy("cellflux", self.checkpoint, {}, self.size.rollout_steps)
        run = Run(begun, pairs, None, settings, out, self.accelerator, validate=10**9, save=50)
        run.train(lambda step, line: say(f"{name}: step {step}/{steps} loss {line['loss']:.4f}"))
        return load_policy("cellflux", str(out / WEIGHTS), {}, self.size.rollout_steps)[1]


def seconds_of(work: Path) -> dict[str, float]:
    """What each piece took, over all starts."""
    path = work / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return found


def say(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


def check_same(work: Path, asked: dict[str, Any]) -> None:
    """Raise SystemExit where the folder holds another reproduction."""
    path = work / "asked.json"
    asked = json.loads(json.dumps(asked))
    if path.exists():
        kept = json.loads(path.read_text())
        changed = [key for key in asked if kept.get(key) != asked[key]]
        if changed:
            raise SystemExit(f"{work} was begun with another {', '.join(changed)}; give that again, or another --work")
    write_text(path, json.dumps(asked, indent=1) + "\n")


def main() -> None:
    """Do what is left, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; the same again goes on")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=N", help="of the size")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoint", help="a CellFlux that knows the phantom; default: the bundled mini model")
    parser.add_argument("--assay", default="phantom")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no new piece after so long")
    parser.add_argument("--pieces", help="only those whose names begin so, e.g. rl-1,more-1: for a second process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help=f"also write {RESULTS.name} and docs/reproduction.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes: dict[str, Any] = {key: int(value) for key, value in (text.split("=") for text in args.changes)}
    size = replace(SIZES[args.size], **changes)
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, policy = load_policy("cellflux", args.checkpoint, {}, size.rollout_steps)
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {"size": asdict(size), "base": base.describe()["digest"], "assay": args.assay}
    check_same(args.work, asked)
    setting = prepare(size, args.work, base, policy, args.assay, say)
    for note in setting.notes:
        say(f"note: {note}")
    made = Accelerator(cpu=device == "cpu", mixed_precision=size.precision)
    bench = Bench(setting, args.checkpoint, args.seeds, device, began + 60 * args.minutes, base, policy, made,
                  tuple(args.pieces.split(",")) if args.pieces else ())  # fmt: skip
    missing = ""
    try:
        bench.everything()
    except OutOfTime as stopped:
        missing = str(stopped)
        say(f"out of time before {missing}; the same command goes on from there")
    about = {
        "command": "python -m benchmarks.reproduce " + " ".join(
            [f"--size {args.size}", *(f"--set {text}" for text in args.changes), f"--seeds {args.seeds}"]),
        "size": asdict(size), "base": asked["base"], "assay": args.assay, "fingerprint": setting.judge.fingerprint,
        "seconds": seconds_of(args.work), "unfinished_from": missing or (bench.left_out or [""])[0],
        "passes_of_a_run": bench.passes(),
        "machine": {"device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
                    "threads": args.threads, "torch": torch.__version__},
    }  # fmt: skip
    found = results_of(setting, about)
    write_text(args.work / "reproduction.json", json.dumps(found, indent=1) + "\n")
    text = page.markdown(found)
    write_text(args.work / "reproduction.md", text)
    print(text)
    if args.ship:
        write_text(RESULTS, json.dumps(found, indent=1) + "\n")
        write_text(DOCS / "reproduction.md", text)
        for name, drawing in page.figures(found).items():
            write_text(DOCS / name, drawing)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
