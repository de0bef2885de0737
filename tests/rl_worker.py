"""Run in processes of their own: `train FOLDER STEPS [resume]`, or `losses FILE` under torch.distributed.run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from generators.cellflux import CellFlux
from rl.nft import Learner
from rl.run import Schedule, train
from tests.rl_toys import COMPOUNDS, data, judge, settings


def flux() -> CellFlux:
    torch.manual_seed(0)
    made = CellFlux.create(compounds=COMPOUNDS, channels=1, width=8, mult=(1, 2), blocks=1, attention=(), dropout=0.3)
    for p in made.net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return made


def train_in(folder: Path, steps: int, resume: bool) -> None:
    made = settings(steps=steps, rollouts=3, kl_weight=0.1, learning_rate=2e-3)
    train(
        flux(), judge(), data(), made, out=folder, accelerator=Accelerator(cpu=True),
        schedule=Schedule(evaluate=3, save=1, images=4), resume=resume,
    )  # fmt: skip


def losses(file: Path) -> None:
    """Three steps; some rollouts have no score, so that the processes differ in their useful ones."""
    accelerator = Accelerator(cpu=True)
    made = settings(rollouts=3, groups=4, kl_weight=0.1, learning_rate=2e-3, micro_batch=5)
    learner = Learner(flux(), judge(silent=(2,)), data().train, made, accelerator)
    lines = [learner.advance() for _ in range(3)]
    if accelerator.is_main_process:
        total = sum(float(p.detach().double().square().sum()) for p in learner.parameters)
        file.write_text(json.dumps({"lines": lines, "weights": total, "processes": accelerator.num_processes}))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "losses":
        losses(Path(sys.argv[2]))
    else:
        train_in(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["resume"])
