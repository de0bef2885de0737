"""What a post-training step costs, and its parts: rolling out, scoring, updating.

    python -m benchmarks.rl --threads 1 --json benchmarks/results/rl.json          # the demonstration's size, on a CPU
    python -m benchmarks.rl --full --precision bf16 --json benchmarks/results/rl_gpu.json                  # on a GPU

--full is the paper's size as far as it is known: 56 M parameters, 96 px, 48 groups of 24, 10 Euler steps, 9 training
times. Weights are random (cost does not depend on them; masks of noise hold more objects than masks of cells, so
scoring is rather over- than underestimated); controls are phantom crops. On a CPU times are processor time of this
process, because machines are shared; on a GPU they are by the clock, with the device waited for at every part.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import generators
import rl.scoring
from biorewards.assay import Assay
from biorewards.phantom import render_dataset
from biorewards.rewards import suite
from generators.cellflux import CellFlux
from generators.embeddings import CompoundTable
from rl.nft import Learner, Settings
from rl.pool import Pool
from rl.rewards import Judge

PARTS = ("sample", "score", "train", "step")


def policy_of(args: argparse.Namespace, compounds: list[str]) -> CellFlux:
    """The network that is trained: a checkpoint, the bundled model's size, or the published size."""
    if args.checkpoint:
        loaded = generators.load("cellflux", args.checkpoint)
        assert isinstance(loaded, CellFlux)
        return loaded
    torch.manual_seed(0)
    if not args.full:
        made = CellFlux.create(compounds=compounds, width=32, mult=(1, 2, 3), blocks=1, attention=(4,), noise_level=0.5)
    else:
        rows = torch.randint(0, 3, (len(compounds), 1024)).float()
        table = CompoundTable(compounds, rows, "random counts")
        made = CellFlux.create(compounds=table, width=128, mult=(2, 2, 2), blocks=4, attention=(2,), dropout=0.3)
    for p in made.net.parameters():
        if not p.any():
            p.data = 0.02 * torch.randn_like(p)
    return made


def main() -> None:
    """Time steps and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--checkpoint", help="of a CellFlux, instead of random weights")
    parser.add_argument("--groups", type=int)
    parser.add_argument("--rollouts", type=int)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    accelerator = Accelerator(mixed_precision=args.precision)
    cuda = accelerator.device.type == "cuda"
    if not cuda:
        rl.scoring.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    settings = Settings(
        groups=args.groups or (48 if args.full else 8), rollouts=args.rollouts or (24 if args.full else 12),
        rollout_steps=10 if args.full else 6, times=9 if args.full else 2, micro_batch=args.micro_batch,
        learning_rate=1e-5,
    )  # fmt: skip
    assay = Assay.load("phantom")
    size = 96 if args.full else 48
    crops = render_dataset(65, size=size, seed=1)
    images = torch.from_numpy(crops.images).permute(0, 3, 1, 2).float() / 255
    compounds = [name for name, kind in assay.compounds.items() if kind != assay.classes[0]]
    targets = np.array([assay.classes.index(assay.compounds[name]) for name in compounds])
    policy = policy_of(args, compounds)
    controls = images[(crops.rows["ANNOT"] == assay.classes[0]).to_numpy()]
    pool = Pool(controls, np.zeros(len(controls), np.int64), compounds, targets)
    learner = Learner(policy, Judge(suite(assay), assay, scale=96 / size), pool, settings, accelerator)
    lines = [learner.advance() for _ in range(args.repeats + 1)][1:]
    count = settings.groups * settings.rollouts
    result: dict[str, Any] = {
        "rollouts": count, "parameters": sum(p.numel() for p in policy.net.parameters()), "pixels": size,
        "passes": {"rollout": count * settings.rollout_steps, "training_forward": 3 * count * settings.times,
                   "training_backward": count * settings.times},
        "seconds": {part: summary([line[f"seconds/{part}"] for line in lines]) for part in PARTS},
        "score_share": round(statistics.median(line["score_share"] for line in lines), 4),
        "useful_groups": round(statistics.median(line["useful_groups"] for line in lines), 3),
        "overlap": "scoring runs beside sampling; the parts add up to more than the step" if cuda else "none",
        "clock": "wall" if cuda else "processor time of the process",
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": args.threads, "torch": torch.__version__, "precision": args.precision,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(seconds), 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
    }


if __name__ == "__main__":
    main()
