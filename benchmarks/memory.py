"""Memory and cost per image of a long run: one folder of hard links, scored in one process.

    python benchmarks/memory.py --files 100000 --json benchmarks/results/memory.json

Resident memory is read as the run passes each checkpoint; seconds an image are those between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from biorewards.assay import Assay
from biorewards.io.manifest import read_manifest
from biorewards.memory import keep_freed_memory
from biorewards.phantom import write_dataset
from biorewards.rewards import suite
from biorewards.scoring import score_folder

#: Different images that the links point to.
IMAGES = 1000


def hard_links(folder: Path, n: int) -> Path:
    """n file names, IMAGES different images, in sub-folders by class as a user would have them."""
    write_dataset(folder / "images", IMAGES, 96, 5)
    sources = sorted((folder / "images").rglob("*.npy"))[:IMAGES]
    many = folder / "many"
    for k in range(n):
        target = many / "DMSO" / f"{k // 5000:04d}"
        if k % 5000 == 0:
            target.mkdir(parents=True)
        os.link(sources[k % IMAGES], target / f"{k:07d}.npy")
    return many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    process = psutil.Process()
    marks = sorted({min(args.files, m) for m in (1000, 3000, 10_000, 20_000, 50_000, 100_000, 150_000, 200_000)})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = hard_links(Path(temporary), args.files)
        assay = Assay.load("phantom")
        found = read_manifest(folder)
        start = time.perf_counter()
        last = [0, start]

        def progress(done: int, total: int) -> None:
            while len(rows) < len(marks) and done >= marks[len(rows)]:
                now = time.perf_counter()
                rows.append(
                    {
                        "images": done,
                        "resident_mb": round(process.memory_info().rss / 2**20, 1),
                        "ms_per_image": round(1000 * (now - last[1]) / max(1, done - last[0]), 3),
                        "ms_per_image_so_far": round(1000 * (now - start) / done, 3),
                    }
                )
                last[:] = [done, now]
                print(rows[-1], file=sys.stderr, flush=True)

        score_folder(found, assay, suite(assay), resume_dir=Path(temporary) / "partial", progress=progress)
    result = {
        "machine": {"processor": platform.machine(), "threads": args.threads, "torch": torch.__version__},
        "files": args.files,
        "different_images": IMAGES,
        "checkpoints": rows,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
