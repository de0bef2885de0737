"""A post-training run in a folder: train, evaluate, save, show, resume.

config.json            what was asked for, resolved
metrics.jsonl          every step and evaluation; metrics.parquet is the same as a table
state.safetensors      what a resumed run goes on from
generator.safetensors  the averaged weights (and best.safetensors, of the best evaluation), as the generator saves
samples/               grids of the same controls at every evaluation
report.html            curves and grids
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from biorewards.io.tables import write_text
from rl.evaluation import Drawn, Evaluation, Line, alarms, gained
from rl.lora import merged_state
from rl.monitor import Journal
from rl.nft import Learner, Settings
from rl.policy import FlowPolicy, Sampler, digest_of, digest_tensors, twin
from rl.report import write_grid, write_report
from rl.state import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rl.distribution import Population
    from rl.pool import Data
    from rl.rewards import Judge

STATE, CONFIG, WEIGHTS, BEST = "state.safetensors", "config.json", "generator.safetensors", "best.safetensors"
#: Evaluations with an alarm, one after the other, before a guarded run stops.
PATIENCE = 2


@dataclass(frozen=True)
class Schedule:
    """How often things happen, in rollout sets. guard: stop when unrewarded figures get worse twice running."""

    evaluate: int = 10
    save: int = 10
    images: int = 96
    guard: bool = False

    def __post_init__(self) -> None:
        for name in ("evaluate", "save", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


class Result(NamedTuple):
    """The averaged policy; evaluations of the base, the last, and real images ({} without any); why it ended."""

    policy: FlowPolicy
    first: Line
    last: Line
    real: Line
    ended: str


def train(
    policy: FlowPolicy, judge: Judge, data: Data, settings: Settings, *, out: Path, accelerator: Accelerator,
    schedule: Schedule | None = None, population: Population | None = None, held_out: dict[str, Judge] | None = None,
    sampler: Sampler | None = None, resume: bool = False, about: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Post-train `policy` in the folder `out`. `policy.net` is left as it is; the result has its own.

    population: advantages from credits in a distribution instead of the suite's values. held_out: judges that are only
    watched. sampler: the base as it samples by itself (solver, guidance), shown beside. about: shown in config and
    report. Raises ValueError (StateError when resumed with other settings).
    """
    schedule = schedule or Schedule()
    out.mkdir(parents=True, exist_ok=True)
    learner = Learner(policy, judge, data.train, settings, accelerator, population)
    run = identity(learner, data, settings, population)
    journal = Journal(out, accelerator, settings.steps)
    progress: dict[str, Any] = {"best": -math.inf, "alarmed": 0}
    if resume:
        progress = load_state(out / STATE, learner, run)
    elif (out / STATE).exists():
        raise ValueError(f"{out} holds a run: add --resume to go on with it, or choose another folder")
    journal.begin(learner.step)
    if accelerator.is_main_process:
        config = {"settings": asdict(settings), "schedule": asdict(schedule), "run": run, "about": about or {}}
        write_text(out / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    for warning in settings.warnings:
        journal.say(f"warning: {warning}")
    evaluation = Evaluation(
        data, judge, settings.seed, settings.rollout_steps, schedule.images, settings.micro_batch, held_out or {},
        accelerator.autocast,
    )  # fmt: skip
    judged = Watched(learner, evaluation, journal, out, schedule, progress, {**(about or {}), **asdict(settings)})
    if not learner.step:
        judged.anchors(sampler)
        judged.evaluate()
    ended = f"{settings.steps} steps are done"
    while learner.step < settings.steps:
        line = learner.advance()
        step = int(line.pop("step"))
        journal.log("train", step, line)
        journal.live({"step": step, **line})
        last = step == settings.steps
        if step % schedule.evaluate == 0 or last:
            judged.evaluate()
            if judged.stops():
                ended, last = "stopped: " + "; ".join(judged.last["alarms"]), True
        if step % schedule.save == 0 or last:
            save_state(out / STATE, learner, run, progress)
            if accelerator.is_main_process:
                plain(learner).save(out / WEIGHTS)
        if last:
            break
    journal.write_table()
    if accelerator.is_main_process:
        judged.report()
    accelerator.wait_for_everyone()
    return Result(plain(learner), judged.first, judged.last, judged.real, ended)


def identity(learner: Learner, data: Data, settings: Settings, population: Population | None) -> dict[str, Any]:
    """What a resumed run must share: settings, base weights, rewards with their statistics, controls and compounds."""
    pools = [data.train.controls, data.test.controls, *(torch.from_numpy(p.targets) for p in (data.train, data.test))]
    names = [*data.train.compounds, *data.test.compounds]
    return {
        **asdict(settings), "base": digest_tensors(learner.base.net.state_dict().values()),
        "rewards": learner.judge.fingerprint, "images": digest_of(digest_tensors(pools), *names),
        "population": "" if population is None else population.fingerprint,
        "precision": str(learner.accelerator.mixed_precision),
    }  # fmt: skip


def plain(learner: Learner) -> Any:
    """The policy of the averaged weights, adapters merged: an ordinary generator again."""
    made = twin(learner.base)
    made.net.load_state_dict(merged_state(learner.average.net))
    return made


class Watched:
    """Evaluations of a run: logged, drawn, compared with the base and with real images."""

    def __init__(
        self, learner: Learner, evaluation: Evaluation, journal: Journal, out: Path, schedule: Schedule,
        progress: dict[str, Any], about: dict[str, Any],
    ) -> None:  # fmt: skip
        self.learner, self.evaluation, self.journal, self.out = learner, evaluation, journal, out
        self.schedule, self.progress, self.about = schedule, progress, about
        self.base: Drawn | None = None

    @property
    def first(self) -> Line:
        """Evaluation of the base."""
        return self.journal.first("eval") or {}

    @property
    def last(self) -> Line:
        """The latest evaluation."""
        return self.journal.last("eval") or {}

    @property
    def real(self) -> Line:
        """Real images of the held-out plates, {} without any."""
        return self.journal.first("real") or {}

    def anchors(self, sampler: Sampler | None) -> None:
        """Judge real images, and the base with its own sampler: what results are held against."""
        device = self.learner.accelerator.device
        if not self.learner.accelerator.is_main_process:
            return
        if real := self.evaluation.real(device):
            self.journal.log("real", 0, real)
        if sampler is not None:
            own = self.evaluation.own(sampler, device)
            self.journal.log("own", 0, own)
            self.journal.say(f"the base with its own solver and guidance: total {own['total']:.2f}")

    def evaluate(self) -> None:
        """Judge the averaged weights (the main process does; the others wait), keep them where they are the best."""
        learner, accelerator = self.learner, self.learner.accelerator
        if accelerator.is_main_process:
            line, drawn = self.evaluation(learner.average, accelerator.device)
            line["alarms"] = alarms(line, self.first, self.real) if self.first else []
            if learner.step:
                line |= self.evaluation.gains(drawn, self._of_the_base(drawn))
            self.journal.log("eval", learner.step, line)
            self.progress["alarmed"] = self.progress["alarmed"] + 1 if line["alarms"] else 0
            if line["total"] > self.progress["best"]:
                self.progress |= {"best": line["total"], "best_step": learner.step}
                plain(learner).save(self.out / BEST)
            self.journal.say(_told(learner.step, line, self.first, self.real))
            for text in line["alarms"]:
                self.journal.say(f"  watch: {text}")
            self._picture(drawn)
            self.journal.write_table()
            self.report()
        accelerator.wait_for_everyone()

    def stops(self) -> bool:
        """A guarded run whose unrewarded figures have got worse often enough; equal on all processes."""
        a = self.learner.accelerator
        mine = self.schedule.guard and self.progress["alarmed"] >= PATIENCE
        flag = torch.tensor(float(mine and a.is_main_process), device=a.device)
        return float(a.reduce(flag, "sum")) > 0

    def report(self) -> None:
        """Write the HTML page."""
        write_report(self.out, self.journal.lines, self.evaluation.judge, self.about)

    def _of_the_base(self, drawn: Drawn) -> Drawn:
        """The evaluation images of the base, drawn again in a resumed run."""
        if self.base is None:
            device = self.learner.accelerator.device
            self.base = self.evaluation(self.learner.base, device)[1] if self.learner.step else drawn
        return self.base

    def _picture(self, drawn: Drawn) -> None:
        write_grid(self.out, self.learner.step, self.evaluation, self._of_the_base(drawn), drawn)


def _told(step: int, line: Line, first: Line, real: Line) -> str:
    parts = [f"evaluation at step {step}: total {line['total']:.2f}"]
    if step:
        parts.append(
            f"({gained(line, 'total')} to base {first['total']:.2f}" + (f", real {real['total']:.2f})" if real else ")")
        )
    elif real:
        parts.append(f"(real images {real['total']:.2f})")
    if math.isfinite(line["distance"]):
        parts.append(f"distance to real {line['distance']:.3g}")
    spreads = [v for k, v in line.items() if k.startswith("spread/") and math.isfinite(v)]
    if spreads:
        parts.append(f"spread ratios {min(spreads):.2f} to {max(spreads):.2f}")
    parts += [
        f"{k.removeprefix('held_out/')} (not rewarded) {v:.2f}" for k, v in line.items() if k.startswith("held_out/")
    ]
    return "  ".join(parts)
