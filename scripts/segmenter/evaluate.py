"""Scores of a segmenter on the validation images: F1 at IoU 0.5 and 0.75, count error, beside the classical one.

    python scripts/segmenter/evaluate.py --data ../shared/data [--weights FILE] [--classical] [--true-diameter]

Objects of all images of a set are pooled. A micronucleus in mnfinder is no nucleus; a prediction on it counts as
false. In cell_bodies the labels are incomplete, so an unmatched prediction that lies under 30 % in labelled area is
not counted. Phantoms: fresh fields of every class, at their own scale (35 px nuclei).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage import io

from biorewards.phantom import CLASSES, render_field
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.compact import CompactSegmenter
from biorewards.segmentation.diameter import estimate_diameter, median_diameter
from biorewards.segmentation.matching import match
from biorewards.segmentation.segmenter import normalise, percentile_range

Case = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]


def cases(data: Path, which: str, split: str) -> list[Case]:
    """(dna, cytoplasm, true nuclei, true cells) per image."""
    found: list[Case] = []
    if which in ("dsb2018", "mnfinder"):
        table = pd.read_csv(data / which / "images.csv")
        folder = {"dsb2018": "labels", "mnfinder": "nuclei"}[which]
        for name in table.file[table.split == split]:
            dna, nuclei = (io.imread(data / which / part / name) for part in ("images", folder))
            found.append((dna[None], None, nuclei.astype(int), None))
    elif which == "phantom":
        for i in range(26):
            image, nuclei, cells = render_field(
                np.random.default_rng([991, i]), (256, 256), list(CLASSES)[i % len(CLASSES)]
            )
            found.append((image[None, ..., 2], np.moveaxis(image[..., :2], -1, 0), nuclei, cells))
    else:
        table = pd.read_csv(data / "cell_bodies" / "images.csv")
        for row in table[(table.split == split) & (table.set == which)].itertuples():
            raw = io.imread(data / "cell_bodies" / "images" / row.file)
            cells = io.imread(data / "cell_bodies" / "cells" / row.file).astype(int)
            if raw.ndim == 2:
                found.append((None, raw[None], None, cells))
            else:
                nuclei = io.imread(data / "cell_bodies" / "nuclei" / row.file).astype(int)
                found.append((raw[None, ..., 0], np.moveaxis(raw[..., 1:], -1, 0), nuclei, cells))
    return found


def stretched(channels: np.ndarray | None) -> torch.Tensor | None:
    if channels is None:
        return None
    x = torch.from_numpy(channels.astype(np.float32))[None]
    low, high = percentile_range(x, 1.0, 99.8)
    return normalise(x, low, high)


def drop_unlabelled(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    total = np.bincount(predicted.ravel())
    inside = np.bincount(predicted.ravel(), weights=(truth > 0).ravel())
    return np.where((inside / np.maximum(total, 1) >= 0.3)[predicted], predicted, 0)


def evaluate(segmenter, data: Path, which: str, split: str, true_diameter: bool) -> dict[str, dict[str, float]]:
    tallies: dict[str, dict[str, list]] = {}
    for dna, cyto, nuclei, cells in cases(data, which, split):
        nucleus, cytoplasm = stretched(dna), stretched(cyto)
        nucleus = None if nucleus is None else nucleus[:, 0]
        if which == "phantom":
            diameter = 35.0
        elif true_diameter:
            diameter = median_diameter(torch.from_numpy(nuclei if nuclei is not None else cells)[None])
        else:
            try:
                diameter = estimate_diameter(segmenter, nucleus, cytoplasm)
            except ValueError:
                diameter = 24.0
        masks = segmenter(nucleus, cytoplasm, diameter)
        for what, truth, mask in (("nuclei", nuclei, masks.nuclei), ("cells", cells, masks.cells)):
            if truth is None:
                continue
            predicted = mask[0].cpu().numpy()
            if which not in ("dsb2018", "mnfinder", "phantom"):
                predicted = drop_unlabelled(truth, predicted)
            tally = tallies.setdefault(what, {"m50": [], "m75": []})
            tally["m50"].append(match(truth, predicted, 0.5))
            tally["m75"].append(match(truth, predicted, 0.75))
    result = {}
    for what, tally in tallies.items():
        row = {}
        for key in ("m50", "m75"):
            tp, fp, fn = (sum(m[i] for m in tally[key]) for i in range(3))
            row[f"f1_{key[1:]}"] = round(2 * tp / max(1, 2 * tp + fp + fn), 4)
            if key == "m50":
                row |= {"false": fp, "missed": fn}
        truth = sum(m.true_positive + m.false_negative for m in tally["m50"])
        off = sum(abs(m.false_positive - m.false_negative) for m in tally["m50"])
        bias = sum(m.false_positive - m.false_negative for m in tally["m50"])
        result[what] = row | {
            "count_error": round(off / truth, 4),
            "count_bias": round(bias / truth, 4),
            "objects": truth,
            "images": len(tally["m50"]),
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--classical", action="store_true")
    parser.add_argument("--true-diameter", action="store_true")
    parser.add_argument("--split", default="val")
    parser.add_argument("--sets", default="dsb2018,mnfinder,jump_u2os,pediatric,vampire_mef,phantom")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = (
        load_segmenter("classical")
        if args.classical
        else CompactSegmenter.load(args.weights)
        if args.weights
        else load_segmenter("compact")
    )
    table = {}
    for which in args.sets.split(","):
        table[which] = evaluate(chosen, args.data, which, args.split, args.true_diameter)
        for what, row in table[which].items():
            print(f"{which:12s} {what:7s}", " ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"segmenter": chosen.fingerprint, "sets": table}, indent=1) + "\n")
