"""Each verifier's statistic by the bundled segmenter against exact phantom masks, and what flips and turns do.

    python scripts/agreement.py [--n 1000] [--seed 4711] [--json FILE]

Spearman's correlation over images, with a bootstrap 95 % interval; the median change of each reward under flips and
quarter turns, in units of its standard deviation over real held-out images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bbbc021_assay import ExactMasks
from scipy import stats
from torch import Tensor

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.fitting import measure_images
from biorewards.phantom import render_dataset
from biorewards.rewards import suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    assay = Assay.load("phantom")
    crops = render_dataset(args.n, 96, args.seed)
    images = torch.from_numpy(np.moveaxis(crops.images, -1, 1).copy()).float() / 255
    silent = lambda what, done, total: None  # noqa: E731
    seen = measure_images(assay, images, silent)
    exact = ExactMasks(torch.from_numpy(crops.nuclei), torch.from_numpy(crops.cells))
    true = measure_images(replace(assay, segmenter=exact), images, silent)
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    for name in seen.columns.drop("nucleus_in_cytoplasm"):
        both = seen[name].notna() & true[name].notna()
        a, b = seen[name][both].to_numpy(), true[name][both].to_numpy()
        draws = [stats.spearmanr(a[i], b[i]).statistic for i in (rng.integers(len(a), size=len(a)) for _ in range(200))]
        low, high = np.percentile(draws, [2.5, 97.5])
        found[name] = {"spearman": float(stats.spearmanr(a, b).statistic), "low": low, "high": high, "n": len(a)}
        print(f"{name:18s} Spearman {found[name]['spearman']:.3f} [{low:.3f}, {high:.3f}]  n {len(a)}")
    few = images[:256]
    target = torch.tensor([assay.classes.index(c) for c in crops.rows["ANNOT"][:256]])

    def rewards(x: Tensor) -> dict[str, Tensor]:
        scores = [suite(assay)(Batch(p, t, assay)).scores for p, t in zip(x.split(64), target.split(64), strict=True)]
        return {name: torch.cat([s[name].value for s in scores]) for name in scores[0]}

    plain = rewards(few)
    turns = {"left-right": few.flip(3), "up-down": few.flip(2), "quarter turn": torch.rot90(few, 1, (2, 3))}
    moved = {title: rewards(x.contiguous()) for title, x in turns.items()}
    for name in plain:
        sd = assay.card["real_scores"][name]["sd"]
        change = max(float((m[name] - plain[name]).abs().nanmedian()) / sd for m in moved.values())
        found.setdefault(name, {})["turn_change_in_sd"] = change
        print(f"{name:22s} largest median change under flips and turns: {change:.3f} real sd")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
