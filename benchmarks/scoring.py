"""Images per second of `biorewards score`, of its stages, and of the loop that it replaces, in one run.

    python benchmarks/scoring.py --crops 300 --threads 2 --json benchmarks/results/scoring.json

The naive loop is what one would write today: per image Cellpose 3.1.1.3 `eval` for nuclei and for cells,
`regionprops_table`, and the MoA classifier. The networks have the official size and layout (6.6 M parameters) with
seeded weights, since the official ones cannot be shipped; so that mask recovery and measuring see realistic masks, the
output handed on is the bundled segmenter's for the same crop. Needs `pip install -e ".[bench]"`.

Both sides run in this process with the same number of threads, in turn, `--repeats` times; figures are medians with
their range. Ratios within one run are what counts: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import itertools
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
from torch import Tensor, nn

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.io.images import read_image
from biorewards.phantom import write_dataset
from biorewards.regions import measure_regions
from biorewards.rewards import suite
from biorewards.segmentation.compact import WORKING_DIAMETER, CompactSegmenter

BATCH = 64


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run_for_its_cost(net: nn.Module, stored: list[Tensor]) -> None:
    """Make a full-size CPnet compute as ever and then return stored outputs, one crop after the other."""
    full, calls = net.forward, itertools.count()

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        full(x)
        out = torch.full((len(x), 3, *x.shape[-2:]), -5.0)
        planes = stored[next(calls) % len(stored)]
        top, left = (x.shape[-2] - planes.shape[-2]) // 2, (x.shape[-1] - planes.shape[-1]) // 2
        out[:, :, top : top + planes.shape[-2], left : left + planes.shape[-1]] = planes
        return out, torch.zeros(len(x), 256), None  # type: ignore[return-value]

    net.forward = forward  # type: ignore[method-assign]


def stored_outputs(images: Tensor, assay: Assay) -> tuple[list[Tensor], list[Tensor]]:
    """The bundled networks' flows and logits at the crops' own resolution: (3, H, W) per crop for nuclei and cells."""
    segmenter = assay.segmenter
    assert isinstance(segmenter, CompactSegmenter)
    scaled = assay.normalised(images)
    dna = scaled[:, assay.channels["dna"]][:, None]
    bodies = scaled[:, [assay.channels["actin"], assay.channels["tubulin"]]]
    side = round(images.shape[-1] * WORKING_DIAMETER / assay.nucleus_diameter)
    raw = torch.cat(segmenter._run((side, side), dna, bodies), 1)
    full = nn.functional.interpolate(raw, images.shape[-2:], mode="bilinear", align_corners=False)
    return list(full[:, :3]), list(full[:, 3:])


def naive_loop(images: Tensor, assay: Assay, mkldnn: bool, folder: str) -> Callable[[], None]:
    """Per image: two Cellpose 3 evaluations, region measures of both, the classifier."""
    from cellpose import models
    from cellpose.resnet_torch import CPnet
    from skimage.measure import regionprops_table

    torch.manual_seed(0)
    nuclei, cells = stored_outputs(images, assay)
    judges = []
    for stored, diameter in ((nuclei, 17.0), (cells, 30.0)):
        net = CPnet([2, 32, 64, 128, 256], nout=3, sz=3, mkldnn=mkldnn, diam_mean=diameter).eval()
        weights = Path(folder) / f"{diameter:g}.pth"
        net.save_model(str(weights))
        model = models.CellposeModel(pretrained_model=str(weights), device=torch.device("cpu"), mkldnn=mkldnn)
        run_for_its_cost(model.net, stored)
        judges.append((model, diameter))
    arrays = (images * 65535).round().to(torch.int32).numpy().astype(np.uint16)
    dna, actin = assay.channels["dna"], assay.channels["actin"]
    wanted = ("label", "area", "centroid", "bbox", "perimeter_crofton", "eccentricity")

    def loop() -> None:
        for crop, picture in zip(arrays, images, strict=True):
            pair = np.stack([crop[actin], crop[dna]], -1)
            for (model, diameter), channels in zip(judges, ([2, 0], [1, 2]), strict=True):
                masks = model.eval(pair, channels=channels, diameter=diameter)[0]
                regionprops_table(masks.astype(np.int32), properties=wanted)
            if assay.classifier is not None:
                with torch.inference_mode():
                    assay.classifier(assay.normalised(picture[None]))

    return loop


def stages(images: Tensor, files: list[Path], assay: Assay) -> dict[str, Callable[[], Any]]:
    """The parts of a batched call, each on the whole set in batches of 64."""
    parts = list(images.split(BATCH))
    masks = [assay.segment(p) for p in parts]
    judge = suite(assay)
    target = torch.ones(BATCH, dtype=torch.int64)

    def in_memory() -> None:
        for p in parts:
            judge(Batch(p, target[: len(p)], assay))

    return {
        "decode": lambda: [read_image(f, 3) for f in files],
        "segment": lambda: [assay.segment(p) for p in parts],
        "regions": lambda: [(measure_regions(m.nuclei), measure_regions(m.cells)) for m in masks],
        "classify": lambda: [assay.classifier(assay.normalised(p)) for p in parts] if assay.classifier else None,
        "all seven rewards, images in memory": in_memory,
    }


def summary(seconds: list[float], n: int) -> dict[str, float]:
    rates = sorted(n / s for s in seconds)
    return {"images_per_s": round(statistics.median(rates), 2), "min": round(rates[0], 2), "max": round(rates[-1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--naive-crops", type=int, default=300, help="crops that the naive loop gets (it is slow)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": args.threads, "torch": torch.__version__},
        "crops": args.crops, "repeats": args.repeats, "stages": {}, "ratio_to_naive": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "crops"
        write_dataset(data, args.crops, 96, 5)
        files = sorted(data.rglob("*.npy"))[: args.crops]
        assay = Assay.load("phantom")
        images = torch.from_numpy(np.stack([read_image(f, 3) for f in files]))
        runs: dict[str, Callable[[], Any]] = stages(images, files, assay)
        few = images[: args.naive_crops]
        runs["naive loop, mkldnn on (Cellpose's default)"] = naive_loop(few, assay, True, folder)
        runs["naive loop, mkldnn off"] = naive_loop(few, assay, False, folder)
        command = [
            sys.executable,
            "-m",
            "cli.main",
            "score",
            str(data),
            "--assay",
            "phantom",
            "--out",
            str(Path(folder) / "s.parquet"),
        ]
        runs["biorewards score, whole process"] = lambda: subprocess.run(command, check=True, capture_output=True)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(args.repeats):
            for name, run in runs.items():
                seconds[name].append(timed(run))
                n = len(few) if name.startswith("naive") else args.crops
                print(
                    f"{repeat + 1}/{args.repeats} {name}: {n / seconds[name][-1]:.1f} images/s",
                    file=sys.stderr,
                    flush=True,
                )
    for name, times in seconds.items():
        n = len(few) if name.startswith("naive") else args.crops
        result["stages"][name] = summary(times, n)
        print("{:44s} {images_per_s:9.1f} images/s  [{min:.1f}, {max:.1f}]".format(name, **result["stages"][name]))
    ours = seconds["all seven rewards, images in memory"]
    for name in ("naive loop, mkldnn on (Cellpose's default)", "naive loop, mkldnn off"):
        ratios = sorted((b / len(few)) / (a / args.crops) for a, b in zip(ours, seconds[name], strict=True))
        result["ratio_to_naive"][name] = {
            "median": round(statistics.median(ratios), 1),
            "min": round(ratios[0], 1),
            "max": round(ratios[-1], 1),
        }
        print(
            f"all seven rewards against {name}: {statistics.median(ratios):.1f} x [{ratios[0]:.1f}, {ratios[-1]:.1f}]"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
