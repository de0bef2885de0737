"""Train the bundled mini CellFlux on the phantom and ship it: python scripts/mini_cellflux.py --work mini

Draws 12,000 phantom crops of 48 px (`biorewards phantom`), pre-trains a 1.7 M-parameter CellFlux on its training plates
and writes the averaged weights, float16, to generators/assets/. Some 70 minutes on a CPU core of its own, minutes
on a GPU. Kill it and start it again as often as needed: it goes on from its last save and ends at the same weights.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch

from biorewards.phantom import write_dataset
from generators.cellflux import CellFlux
from generators.pairs import read_pairs
from generators.pretrain import LOG, Run, accelerator_of
from generators.solvers import Solver
from generators.steps import Settings

SIZE, DATA_SEED, IMAGES = 48, 2026, 12_000
SETTINGS = Settings(
    batch=32, rate=1.5e-3, betas=(0.9, 0.99), warmup=100, cooldown=0.25, clip=1.0, ema=0.998, drop=0.15, noise=1.0,
    augment=0.5, seed=7, bfloat16=True,
)  # fmt: skip
ASSETS = Path(__file__).parents[1] / "generators" / "assets"
RESULTS = Path(__file__).parent / "mini_cellflux"


def main() -> None:
    """Draw, train, ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the images and the run")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--threads", type=int, default=1, help="results are those of the log with 1")
    parser.add_argument("--ship", action="store_true", help="also write generators/assets/ and scripts/mini_cellflux/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = args.work / "phantom"
    if not (data / "index.csv").exists():
        write_dataset(data, IMAGES, SIZE, DATA_SEED)
    pairs, validation = read_pairs(data), read_pairs(data, split="val")
    torch.manual_seed(SETTINGS.seed)
    generator = CellFlux.create(
        compounds=pairs.names, width=32, mult=(1, 2, 3), blocks=1, attention=(4,), noise_level=0.5, guidance=1.0,
        solver=Solver("euler", "edm", 16),
    )  # fmt: skip
    settings = Settings(**{**SETTINGS.__dict__, "steps": args.steps})
    run = Run(
        generator, pairs, validation, settings, args.work / "run", accelerator_of(settings), validate=300, save=100,
        snapshots=True,
    )  # fmt: skip
    trained = run.train(lambda step, line: print(f"step {step}: " + " ".join(f"{k} {v:.4g}" for k, v in line.items())))
    if args.ship:
        half = copy.copy(trained)
        half.net = copy.deepcopy(trained.net).half()
        half.save(ASSETS / "mini_cellflux.safetensors")
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(args.work / "run" / LOG, RESULTS / LOG)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
