"""Where the milliseconds of `biorewards score` go: processor time a crop, by stage, batch size and thread count."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.io.images import read_image
from biorewards.regions import measure_regions
from biorewards.rewards import suite
from biorewards.segmentation.compact import WORKING_DIAMETER, CompactSegmenter

BATCHES = (1, 4, 16, 64, 256, 512)


def stages(images: Tensor, files: list[Path], assay: Assay, batch: int) -> dict[str, Callable[[], Any]]:
    """The stages of a call in its order, each on the whole set in batches, from inputs made beforehand."""
    segmenter = assay.segmenter
    assert isinstance(segmenter, CompactSegmenter)
    parts = list(images.split(batch))
    size = (images.shape[-2], images.shape[-1])
    side = round(size[0] * WORKING_DIAMETER / assay.nucleus_diameter)
    bodies = [assay.channels["actin"], assay.channels["tubulin"]]
    target = torch.ones(batch, dtype=torch.int64)
    judge = suite(assay)
    with torch.inference_mode(), assay.autocast(images.device):
        scaled = [assay.normalised(p) for p in parts]
        inputs = [(x[:, assay.channels["dna"]][:, None], x[:, bodies]) for x in scaled]
        raw = [segmenter._run((side, side), *pair) for pair in inputs]
        masks = [assay.segment(p) for p in parts]
    pairs = list(zip(parts, inputs, strict=True))
    small = [
        torch.cat([F.pixel_unshuffle(F.interpolate(d, (2 * side, 2 * side)), 2), F.interpolate(b, (side, side))], 1)
        for d, b in inputs
    ]
    small = [x.contiguous(memory_format=torch.channels_last) for x in small]

    return {
        "decode": lambda: [read_image(f, images.shape[1]) for f in files],
        "scale and resize": lambda: [(assay.normalised(p), _resized(x, side)) for p, x in pairs],
        "segmentation networks": lambda: [segmenter._forward(x) for x in small],
        "nuclei from flows": lambda: [segmenter._label(r[0], r[1], r[2], size, 135, 29) for r in raw],
        "cells from flows": lambda: [segmenter._cells(r[3], r[4], size, 385, 96) for r in raw],
        "regions": lambda: [(measure_regions(m.nuclei), measure_regions(m.cells)) for m in masks],
        "classifier": lambda: [assay.class_probabilities(p) for p in parts],
        "all seven rewards, images in memory": lambda: [judge(Batch(p, target[: len(p)], assay)) for p in parts],
    }  # fmt: skip


def _resized(pair: tuple[Tensor, Tensor], side: int) -> tuple[Tensor, Tensor]:
    from biorewards.segmentation.compact import resize

    return resize(pair[0], (2 * side, 2 * side)), resize(pair[1], (side, side))


def profile(
    images: Tensor, files: list[Path], assay: Assay, repeats: int, threads: tuple[int, ...] = (1, 2)
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """threads -> batch -> stage -> {"cpu_ms": median, "min": ..., "max": ..., "wall_ms": median}, all a crop."""
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for count in threads:
        torch.set_num_threads(count)
        for batch in BATCHES:
            rows: dict[str, dict[str, float]] = {}
            for name, run in stages(images, files, assay, batch).items():
                cpu, wall = [], []
                with torch.inference_mode(), assay.autocast(images.device):
                    run()
                    for _ in range(repeats):
                        clock, start = time.process_time(), time.perf_counter()
                        run()
                        cpu.append(1000 * (time.process_time() - clock) / len(images))
                        wall.append(1000 * (time.perf_counter() - start) / len(images))
                rows[name] = {
                    "cpu_ms": round(statistics.median(cpu), 3),
                    "min": round(min(cpu), 3),
                    "max": round(max(cpu), 3),
                    "wall_ms": round(statistics.median(wall), 3),
                }
            result.setdefault(str(count), {})[str(batch)] = rows
            print(f"{count} threads, batch {batch}: {rows['all seven rewards, images in memory']}", file=sys.stderr)
    return result


def table(profiled: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """The profile as a table for people: a row a stage, a column a batch size, ms of processor time a crop."""
    lines = []
    for threads, by_batch in profiled.items():
        lines.append(f"{threads} thread{'s' * (threads != '1')}, ms of processor time a crop at a batch of")
        lines.append(f"{'':38s}" + "".join(f"{batch:>8s}" for batch in by_batch))
        lines += [
            f"{stage:38s}" + "".join(f"{rows[stage]['cpu_ms']:8.2f}" for rows in by_batch.values())
            for stage in next(iter(by_batch.values()))
        ]
    return "\n".join(lines)
