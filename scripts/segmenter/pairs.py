"""Touching and overlapping nuclei: how many drawn pairs are split, and how many single or honeycomb nuclei are.

    python scripts/segmenter/pairs.py --data ../shared/data

Pairs: two nuclei of one real validation image (dsb2018), cut out and laid down with their centres 0.6 to 1.0 of the
summed radii apart, brightness added, on the image's own background; the overlap parted half-way between the outlines.
Split: two objects, each with IoU > 0.5 with one of the two. Singles: the same nuclei alone. Honeycomb: phantom fields
of the class with multi-micronucleated nuclei; a nucleus counts as split when two objects cover 15 % of it each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import sources
import torch
from evaluate import stretched
from scipy import ndimage

from biorewards.phantom import CLASSES, render_field
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.compact import CompactSegmenter
from biorewards.segmentation.matching import match
from biorewards.segmentation.segmenter import Segmenter

SIDE = 96


def cut_outs(sample: sources.Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """(light, mask) of every nucleus that lies whole in the image, 12 px across or more."""
    dna, found = sample.image[2], []
    background = float(np.median(dna[sample.nuclei == 0]))
    alone = ndimage.maximum_filter(sample.nuclei, 5)
    for label, box in enumerate(ndimage.find_objects(sample.nuclei), 1):
        if (
            box is None
            or min(box[0].start, box[1].start) < 3
            or box[0].stop > dna.shape[0] - 3
            or box[1].stop > dna.shape[1] - 3
        ):
            continue
        wide = tuple(slice(s.start - 3, s.stop + 3) for s in box)
        mask = sample.nuclei[wide] == label
        # Only nuclei with nothing beside them: a neighbour's light would be cut out with them.
        if mask.sum() > 113 and not ((alone[wide] != label) & (alone[wide] > 0)).any():
            found.append((np.clip(dna[wide] - background, 0, None) * ndimage.binary_dilation(mask, iterations=2), mask))
    return found


def lay(canvas: np.ndarray, depths: np.ndarray, item: tuple[np.ndarray, np.ndarray], y: float, x: float) -> None:
    """Add the light to the canvas (H, W) and write the depth below the outline, px, to `depths` (H, W)."""
    light, mask = item
    y0, x0 = round(y - mask.shape[0] / 2), round(x - mask.shape[1] / 2)
    area = (slice(y0, y0 + mask.shape[0]), slice(x0, x0 + mask.shape[1]))
    canvas[area] += light
    depths[area] = ndimage.distance_transform_edt(mask)


def dsb_trials(data: Path, segmenter: Segmenter, rng: np.random.Generator, trials: int) -> dict[str, tuple[int, int]]:
    donors = [c for s in sources.dsb2018(data, "val") if len(c := cut_outs(s)) >= 2]
    split = whole = n_pairs = n_single = 0
    while n_pairs < trials:
        items = donors[int(rng.integers(len(donors)))]
        a, b = (items[i] for i in rng.choice(len(items), 2, replace=False))
        if max(*a[1].shape, *b[1].shape) > 40:
            continue
        radii = [float(np.sqrt(m.sum() / np.pi)) for _, m in (a, b)]
        theta, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0) * sum(radii)
        offset = np.array([np.sin(theta), np.cos(theta)]) * reach / 2
        for pair in (True, False):
            canvas, depths = np.zeros((SIDE, SIDE)), np.zeros((2, SIDE, SIDE))
            lay(canvas, depths[0], a, 48 - offset[0] * pair, 48 - offset[1] * pair)
            if pair:
                lay(canvas, depths[1], b, 48 + offset[0], 48 + offset[1])
            labels = np.where(depths.max(0) > 0, depths.argmax(0) + 1, 0)
            canvas += rng.normal(0, 0.01, canvas.shape)
            dna = stretched(canvas[None].astype(np.float32))
            assert dna is not None
            found = segmenter(dna[:, 0], None, sources.DIAMETER).nuclei[0].numpy()
            if pair:
                split += match(labels, found, 0.5).true_positive == 2
                n_pairs += 1
            else:
                whole += len(np.unique(found)) > 2
                n_single += 1
    return {"overlapping pairs split": (split, n_pairs), "single nuclei split": (whole, n_single)}


def honeycombs(segmenter: Segmenter, name: str, fields: int) -> tuple[int, int]:
    broken = total = 0
    for i in range(fields):
        image, nuclei, _ = render_field(np.random.default_rng([77, i]), (256, 256), name)
        planes = stretched(np.moveaxis(image, -1, 0))
        assert planes is not None
        found = segmenter(planes[:, 2], planes[:, :2], 35.0).nuclei[0].numpy()
        for label in range(1, nuclei.max() + 1):
            inside = found[nuclei == label]
            if len(inside) < 200:
                continue
            share = np.bincount(inside, minlength=2)[1:] / len(inside)
            broken += (share > 0.15).sum() > 1
            total += 1
    return broken, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--trials", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    segmenter = CompactSegmenter.load(args.weights) if args.weights else load_segmenter("compact")
    results = dsb_trials(args.data, segmenter, np.random.default_rng(5), args.trials)
    for name in [c for c, effect in CLASSES.items() if effect.nuclei.get("honeycomb", 0) > 0.2]:
        results[f"honeycomb nuclei split ({name})"] = honeycombs(segmenter, name, 20)
    for title, (k, n) in results.items():
        print(f"{title:56s} {k}/{n} = {k / n:.3f}")


if __name__ == "__main__":
    main()
