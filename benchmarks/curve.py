"""F1 against speed of the bundled segmenter: working scale, precision, steps of the walks, width of the network.

    python benchmarks/curve.py --data ../shared/data --json benchmarks/results/curve.json --figure docs/curve.png
    python benchmarks/curve.py --student build/fast.safetensors ...          # and points of a faster network

F1 at IoU 0.5 is that of `scripts/segmenter/evaluate.py` on its validation images (automatic diameter; phantom fields
at their own scale). Milliseconds are of processor time a 96 px phantom crop for both masks, networks and walks, one
thread, batches of 16: the median of `--repeats` turns in which every point has its go, so that what else the machine
does hits all alike. F1 that is in the JSON file already, of the same weights, is not worked out again unless `--again`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.phantom import render_dataset
from biorewards.segmentation import compact, flows
from biorewards.segmentation.compact import CompactSegmenter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "segmenter"))
import evaluate

SETS = {"dsb2018": "nuclei", "mnfinder": "nuclei", "jump_u2os": "cells", "phantom": "nuclei", "phantom cells": "cells"}
BATCH = 16


@dataclass(frozen=True)
class Point:
    """One way to run. diameter: of a nucleus at the working scale, px. first, last: unrounded steps of the walks before
    and after they are composed (`flows.FIRST_STEPS`, `LAST_STEPS`), first = 0 for all steps exact. width: whose."""

    diameter: float
    precision: str = "float32"
    first: int = flows.FIRST_STEPS
    last: int = flows.LAST_STEPS
    width: str = "bundled"

    @property
    def name(self) -> str:
        steps = "exact" if not self.first else f"{self.first}+{self.last}"
        return f"{self.width}, {self.diameter:g} px, {self.precision}, steps {steps}"


def points(student: bool) -> list[Point]:
    at = compact.WORKING_DIAMETER
    found = [Point(d) for d in (14, 15, 16, 17, 18, 20, 22)]
    found += [Point(d, "bfloat16") for d in (15, 16, 18)]
    found += [Point(at, first=0), Point(at, first=4), Point(at, first=16), Point(at, last=25)]
    if student:
        found += [Point(d, p, width="student") for d in (15, 16, 18) for p in ("float32", "bfloat16")]
    return found


@contextmanager
def running(point: Point) -> Iterator[None]:
    """Constants of the segmenter set to those of a point; networks run in its precision."""
    walk = compact.masks_from_flows

    def exact(*args: Any, **kwargs: Any) -> Tensor:
        return walk(*args, **kwargs | {"method": "bilinear"})

    with (
        mock.patch.object(compact, "WORKING_DIAMETER", float(point.diameter)),
        mock.patch.object(flows, "FIRST_STEPS", point.first or flows.FIRST_STEPS),
        mock.patch.object(flows, "LAST_STEPS", point.last),
        mock.patch.object(compact, "masks_from_flows", walk if point.first else exact),
        torch.autocast("cpu", torch.bfloat16, enabled=point.precision == "bfloat16"),
        torch.inference_mode(),
    ):
        yield


def scores(segmenter: CompactSegmenter, point: Point, data: Path) -> dict[str, float]:
    """F1 at IoU 0.5 by set."""
    table: dict[str, Any] = {}
    with running(point):
        for name in dict.fromkeys(s.split()[0] for s in SETS):
            table[name] = evaluate.evaluate(segmenter, data, name, "val", False)
    return {name: table[name.split()[0]][what]["f1_50"] for name, what in SETS.items()}


def crop_batches(n: int, assay: Assay) -> list[tuple[Tensor, Tensor]]:
    images = torch.from_numpy(np.moveaxis(render_dataset(n, 96, 5).images, -1, 1).copy()).float() / 255
    scaled = assay.normalised(images)
    bodies = scaled[:, [assay.channels["actin"], assay.channels["tubulin"]]]
    return list(zip(scaled[:, assay.channels["dna"]].split(BATCH), bodies.split(BATCH), strict=True))


def speed(
    segmenters: dict[str, CompactSegmenter], wanted: list[Point], crops: int, repeats: int
) -> dict[Point, list[float]]:
    """Milliseconds of processor time a crop: median, lowest, highest."""
    assay = Assay.load("phantom")
    batches = crop_batches(crops, assay)
    taken: dict[Point, list[float]] = {point: [] for point in wanted}
    for repeat in range(repeats + 1):
        for point in wanted:
            with running(point):
                clock = time.process_time()
                for dna, bodies in batches:
                    segmenters[point.width](dna, bodies, assay.nucleus_diameter)
            if repeat:  # the first turn warms up
                taken[point].append(1000 * (time.process_time() - clock) / crops)
    return {p: [round(v, 2) for v in (statistics.median(t), min(t), max(t))] for p, t in taken.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a point."""
    lines = ["| | ms a crop | " + " | ".join(SETS) + " |", "|---|---|" + "---|" * len(SETS)]
    for row in rows:
        cells = " | ".join(f"{row['f1_50'][name]:.3f}" for name in SETS)
        lines.append(f"| {row['name']} | {row['ms_per_crop'][0]:.2f} | {cells} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SETS), figsize=(3.1 * len(SETS), 3.2), sharex=True)
    for axis, name in zip(axes, SETS, strict=True):
        for row in rows:
            marker = {"bundled": "o", "student": "s"}[row["width"]]
            colour = "tab:blue" if row["precision"] == "float32" else "tab:orange"
            axis.plot(row["ms_per_crop"][0], row["f1_50"][name], marker, color=colour, alpha=0.8)
            steps = "" if (row["first"], row["last"]) == (flows.FIRST_STEPS, flows.LAST_STEPS) else "*"
            axis.annotate(f" {row['diameter']:g}{steps}", (row["ms_per_crop"][0], row["f1_50"][name]), fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("ms a crop")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("F1 at IoU 0.5")
    figure.suptitle(
        "px a nucleus; blue float32, orange bfloat16, squares the faster network, * other steps", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=compact.BUNDLED)
    parser.add_argument("--student", type=Path, help="weights of `scripts/segmenter/distill.py`")
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    segmenters = {"bundled": CompactSegmenter.load(args.weights)}
    if args.student is not None:
        segmenters["student"] = CompactSegmenter.load(args.student)
    weights = {width: segmenter.fingerprint for width, segmenter in segmenters.items()}
    wanted = points(args.student is not None)
    known: dict[str, Any] = {}
    if args.json is not None and args.json.exists() and not args.again:
        old = json.loads(args.json.read_text())
        known = {r["name"]: r["f1_50"] for r in old["points"] if weights.get(r["width"]) == old["weights"][r["width"]]}
    evaluate.cases = cache(evaluate.cases)
    ms = speed(segmenters, wanted, args.crops, args.repeats)
    rows: list[dict[str, Any]] = []
    for point in wanted:
        f1 = known.get(point.name) or scores(segmenters[point.width], point, args.data)
        rows.append({"name": point.name, **asdict(point), "ms_per_crop": ms[point], "f1_50": f1})
        print(point.name, ms[point], f1, file=sys.stderr, flush=True)
        result = {
            "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
            "weights": weights, "crops": args.crops, "repeats": args.repeats, "points": rows,
        }  # fmt: skip
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    if args.figure is not None:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
