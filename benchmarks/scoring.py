"""Images per second of `biorewards score`, of its stages, and of the loop that it replaces, in one run.

    python benchmarks/scoring.py --crops 300 --threads 2 --json benchmarks/results/scoring.json
    python benchmarks/scoring.py --profile --json benchmarks/results/profile.json

The naive loop is what one would write today: per image Cellpose 3.1.1.3 `eval` for nuclei and for cells,
`regionprops_table`, and the MoA classifier; `naive.py` says with which networks. Needs `pip install -e ".[bench]"`.

Both sides run in this process with the same number of threads, in turn, `--repeats` times; figures are medians with
their range. Ratios within one run are what counts: machines are shared and noisy.

"score a folder" is `score_folder` in a running process, decoding and tables included; the whole process also starts
Python and imports torch. `--profile` leaves the loop out and gives milliseconds of processor time a crop for every
stage, at batches of 1 to 512 and 1 and 2 threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from naive import naive_loop
from profile_stages import profile, table
from torch import Tensor

from biorewards.assay import Assay
from biorewards.io.images import read_image
from biorewards.io.manifest import read_manifest
from biorewards.memory import keep_freed_memory
from biorewards.phantom import write_dataset
from biorewards.rewards import suite
from biorewards.scoring import score_folder
from biorewards.segmentation import load_segmenter


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of all threads of this process."""
    start, clock = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - clock


def summary(rates: list[float]) -> dict[str, float]:
    return {
        "images_per_s": round(statistics.median(rates), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
    }


def contenders(data: Path, folder: str, assay: Assay, few: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    found = read_manifest(data)
    fast = assay.with_precision("bfloat16")
    command = [sys.executable, "-m", "cli.main", "score", str(data), "--assay", "phantom", "--out"]
    command.append(str(Path(folder) / "scores.parquet"))
    return {
        "score a folder, float32": lambda: score_folder(found, assay, suite(assay)),
        "score a folder, bfloat16": lambda: score_folder(found, fast, suite(fast)),
        "biorewards score, whole process": lambda: subprocess.run(command, check=True, capture_output=True),
        "naive loop, mkldnn on (Cellpose's default)": naive_loop(few, assay, True, folder),
        "naive loop, mkldnn off": naive_loop(few, assay, False, folder),
    }


def judged_by(args: argparse.Namespace) -> Assay:
    assay = Assay.load("phantom")
    if args.segmenter is not None:
        assay = assay.with_segmenter(load_segmenter(args.segmenter))
    return assay.with_precision(args.precision)


def compare(data: Path, files: list[Path], folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of every contender, and ratios of ours to the naive loops within one turn."""
    assay = judged_by(args)
    few = torch.from_numpy(np.stack([read_image(f, 3) for f in files[: args.naive_crops]]))
    runs = contenders(data, folder, assay, few)
    many = {name: len(few) if name.startswith("naive") else len(files) for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats):
        for name, run in runs.items():
            seconds, processor = timed(run)
            wall[name].append(many[name] / seconds)
            cpu[name].append(many[name] / max(processor, 1e-9))
            print(f"{repeat + 1}/{args.repeats} {name}: {wall[name][-1]:.1f} images/s", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"images_per_s": {name: summary(values) for name, values in wall.items()}, "ratios": {}}
    for name, row in result["images_per_s"].items():
        print("{:44s} {images_per_s:9.1f} images/s  [{min:.1f}, {max:.1f}]".format(name, **row))
    for ours in ("score a folder, float32", "score a folder, bfloat16"):
        for loop in (name for name in runs if name.startswith("naive")):
            for unit, rates in (("clock", wall), ("processor time", cpu)):
                ratio = summary([a / b for a, b in zip(rates[ours], rates[loop], strict=True)])
                ratio["ratio"] = ratio.pop("images_per_s")
                result["ratios"][f"{ours}, against {loop}, {unit}"] = ratio
                print("{}, against {}, by {}: {ratio:.1f} x [{min:.1f}, {max:.1f}]".format(ours, loop, unit, **ratio))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--naive-crops", type=int, default=300, help="crops that the naive loop gets (it is slow)")
    parser.add_argument("--profile", action="store_true", help="stages and batch sizes instead of the comparison")
    parser.add_argument("--segmenter", help="weights of a compact network other than the bundled one")
    parser.add_argument("--precision", default="float32", help="of the networks, with --profile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as `biorewards score` does; both sides of the comparison gain from it
    machine = {"processor": platform.machine(), "threads": args.threads, "torch": torch.__version__}
    result: dict[str, Any] = {"machine": machine, "crops": args.crops, "repeats": args.repeats}
    result["segmenter"] = args.segmenter or "bundled"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "crops"
        write_dataset(data, args.crops, 96, 5)
        files = sorted(data.rglob("*.npy"))[: args.crops]
        if args.profile:
            images = torch.from_numpy(np.stack([read_image(f, 3) for f in files]))
            result["profile"] = profile(images, files, judged_by(args), args.repeats)
            print(table(result["profile"]))
        else:
            result |= compare(data, files, folder, args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
