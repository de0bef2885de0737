"""One full-size Cellpose 3 network pair, the same masks: the batched engine against Cellpose's own loop, in one run.

    python benchmarks/cpnet.py --crops 64 --threads 2 --json benchmarks/results/cpnet.json

Both sides run two networks of the official size (6.6 M parameters each) on the same crops, recover the masks with
Cellpose's settings and measure every object (`naive.py` says why the weights are seeded and the outputs stored). The
ceiling is what the two bare forward passes of our side alone would allow. Sides take turns `--repeats` times; ratios
are within one turn, by the clock and in processor time of all threads (which a busy machine moves less), given as
median, lowest, highest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from naive import full_size_weights, naive_loop, run_for_its_cost, stored_outputs
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import Assay
from biorewards.memory import keep_freed_memory
from biorewards.phantom import render_dataset
from biorewards.regions import measure_regions
from biorewards.segmentation.cpnet import CHUNK, NUCLEUS_DIAMETER, CPnetSegmenter, cellpose_normalise, load_cpnet
from biorewards.segmentation.matching import match

BATCH = 64


def ours(images: Tensor, assay: Assay, folder: str) -> Callable[[], list[Any]]:
    """Both masks of every crop and their region measures, in batches."""
    nets = [load_cpnet(path) for path, _ in full_size_weights(folder, True)]
    for net, stored in zip(nets, stored_outputs(images, assay), strict=True):
        run_for_its_cost(net, stored)
    segmenter = CPnetSegmenter(*nets, max_size_fraction=0.4)
    dna, actin = images[:, assay.channels["dna"]], images[:, [assay.channels["actin"]]]

    def run() -> list[Any]:
        found = []
        with torch.inference_mode():
            for d, a in zip(dna.split(BATCH), actin.split(BATCH), strict=True):
                masks = segmenter(d, a, NUCLEUS_DIAMETER)
                found.append((masks, measure_regions(masks.nuclei), measure_regions(masks.cells)))
        return found

    return run


def bare_passes(images: Tensor, folder: str) -> Callable[[], None]:
    """The two forward passes of the engine and nothing else."""
    nets = [load_cpnet(path) for path, _ in full_size_weights(folder, True)]
    x = F.pad(cellpose_normalise(images[:, :2]), (8, 8, 8, 8)).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for part in x.split(CHUNK):
                for net in nets:
                    net(part)

    return run


def in_bfloat16(run: Callable[[], Any]) -> Callable[[], Any]:
    def inner() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return inner


def agreement(batches: list[Any], loop: list[tuple[Any, Any]]) -> dict[str, float]:
    """Share of crops with equal counts, and mean IoU over matched objects is 1 where masks are equal pixel by pixel."""
    nuclei = torch.cat([b[0].nuclei for b in batches]).numpy()
    cells = torch.cat([b[0].cells for b in batches]).numpy()
    result = {}
    for what, mine, theirs in (("nuclei", nuclei, [m[0] for m in loop]), ("cells", cells, [m[1] for m in loop])):
        equal = [int(a.max()) == int(b.max()) for a, b in zip(mine, theirs, strict=True)]
        same = [match(b.astype(int), a, 0.99) for a, b in zip(mine, theirs, strict=True)]
        total = sum(m.true_positive + m.false_negative for m in same)
        result[f"{what}_equal_counts"] = round(float(np.mean(equal)), 4)
        result[f"{what}_matched_at_0.99"] = round(sum(m.true_positive for m in same) / max(total, 1), 4)
    return result


def spread(values: list[float], digits: int = 2) -> list[float]:
    return [round(v, digits) for v in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides
    assay = Assay.load("phantom")
    images = torch.from_numpy(np.moveaxis(render_dataset(args.crops, 96, 5).images, -1, 1).copy()).float() / 255
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "naive, mkldnn on (Cellpose's default)": naive_loop(images, assay, True, folder, classify=False),
            "naive, mkldnn off": naive_loop(images, assay, False, folder, classify=False),
        }
        engine, passes = ours(images, assay, folder), bare_passes(images, folder)
        masks = agreement(engine(), loops["naive, mkldnn on (Cellpose's default)"]())
        runs: dict[str, Callable[[], Any]] = {
            **loops,
            "engine, float32": engine,
            "engine, bfloat16": in_bfloat16(engine),
            "two bare passes, float32": passes,
            "two bare passes, bfloat16": in_bfloat16(passes),
        }
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        wall: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(args.repeats):
            for name, run in runs.items():
                start, clock = time.perf_counter(), time.process_time()
                run()
                wall[name].append(args.crops / (time.perf_counter() - start))
                cpu[name].append(time.process_time() - clock)
                print(f"{repeat + 1}/{args.repeats} {name}: {wall[name][-1]:.1f} crops/s", file=sys.stderr, flush=True)
    ratios: dict[str, dict[str, list[float]]] = {}
    seconds = {"clock": {name: [args.crops / rate for rate in rates] for name, rates in wall.items()}, "processor": cpu}
    for unit, taken in seconds.items():
        for precision in ("float32", "bfloat16"):
            engine_seconds, bare = taken[f"engine, {precision}"], taken[f"two bare passes, {precision}"]
            for name in loops:
                pairs = zip(taken[name], engine_seconds, strict=True)
                ratios.setdefault(f"engine, {precision}, against {name}", {})[unit] = spread([a / b for a, b in pairs])
            pairs = zip(bare, engine_seconds, strict=True)
            title = f"share of what two bare passes allow, {precision}"
            ratios.setdefault(title, {})[unit] = spread([a / b for a, b in pairs], 3)
    result = {
        "machine": {"processor": platform.machine(), "threads": args.threads, "torch": torch.__version__},
        "crops": args.crops, "repeats": args.repeats, "masks": masks,
        "crops_per_s": {name: spread(values) for name, values in wall.items()},
        "cpu_ms_per_crop": {name: spread([1000 * v / args.crops for v in values]) for name, values in cpu.items()},
        "ratios": ratios,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
