"""Does containment see? Share of nuclear pixels inside cells on real crops, untouched and with four lesions.

    python scripts/segmenter/lesions.py --data ../shared/data

Real BBBC021 crops (96 px): untouched; actin and tubulin set to their background; DNA shifted by half a crop; and bare
nuclei: the central nucleus of a crop on empty background.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bbbc021_assay import pairs96

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.rewards import suite


def containment(assay: Assay, images: Tensor) -> Tensor:
    """(B,) value of the reward; 0 where there is no nucleus or no cell."""
    return suite(assay, ["nucleus_in_cytoplasm"])(Batch(images, None, assay)).scores["nucleus_in_cytoplasm"].value


def bare_nuclei(assay: Assay, images: Tensor, rng: np.random.Generator) -> Tensor:
    """The object in the middle of each crop's nucleus mask, alone on a dim noisy background."""
    nuclei = assay.segment(images).nuclei
    found = []
    for image, labels in zip(images, nuclei, strict=True):
        middle = labels[48, 48]
        if middle == 0:
            continue
        soft = torch.from_numpy(ndimage.gaussian_filter((labels == middle).numpy().astype(np.float32), 1.0))
        floor = image.flatten(1).quantile(0.01, 1)[:, None, None]
        crop = floor + 0.01 * torch.from_numpy(rng.standard_normal(image.shape)).float()
        crop[2] += (image[2] - floor[2]) * soft
        found.append(crop.clamp(0, 1))
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    assay = Assay.load("bbbc021")
    images, _ = pairs96(args.data)
    whole = containment(assay, images)
    dark = images.clone()
    dark[:, :2] = images[:, :2].flatten(2).quantile(0.01, 2)[..., None, None]
    zero = images.clone()
    zero[:, :2] = 0
    shifted = images.clone()
    shifted[:, 2] = torch.roll(images[:, 2], (48, 48), (1, 2))
    bare = bare_nuclei(assay, images, np.random.default_rng(0))
    masks = assay.segment(bare)
    inside = ((masks.nuclei > 0) & (masks.cells > 0)).sum() / (masks.nuclei > 0).sum()
    print(f"real crops, untouched: mean {whole.mean():.4f}, sd {whole.std():.4f}, n {len(whole)}")
    print(f"actin and tubulin at their background: {containment(assay, dark).mean():.4f}")
    print(f"actin and tubulin at zero: {containment(assay, zero).mean():.4f}")
    moved = containment(assay, shifted).mean()
    print(f"DNA shifted by half a crop: {moved:.4f}, a fall of {(whole.mean() - moved) / whole.std():.2f} real sd")
    print(f"bare nuclei: {inside:.4f} of their pixels called cell, n {len(bare)}")


if __name__ == "__main__":
    main()
