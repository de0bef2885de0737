"""An assay whose segmenter reads exact labels out of the image, so that rewards are tested against known masks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import TREATED, Assay
from biorewards.segmentation.segmenter import Masks

CLASSES = ["DMSO", "small", "rare", "unmeasured"]
MEAN_SD = {
    "nucleus_roundness": (0.9, 0.05),
    "nucleus_size": (900.0, 150.0),
    "cytoplasm_size": (3000.0, 600.0),
    "nucleus_count": (3.0, 1.2),
    "cytoplasm_count": (3.0, 1.2),
}


class LabelReader:
    """Channel 0 holds nucleus labels, channel 1 cell labels, both as label / 255."""

    name = "labels"
    fingerprint = "labels"

    def to(self, device: torch.device | str) -> LabelReader:
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        assert nucleus is not None and cytoplasm is not None
        return Masks((nucleus * 255).round().int(), (cytoplasm[:, 0] * 255).round().int())


class ByBrightness:
    """A classifier whose probability of class k grows with the mean of channel 2; calibrated enough for a test."""

    classes: ClassVar = ["DMSO", "small", "rare"]
    fingerprint = "brightness"

    def to(self, device: torch.device | str) -> ByBrightness:
        return self

    def __call__(self, images: Tensor) -> Tensor:
        level = images[:, 2].double().mean((1, 2)).float()
        return torch.stack([1 - level, 0.7 * level, 0.3 * level], 1)


def statistics() -> pd.DataFrame:
    rows = []
    for name, n in (("DMSO", 200), ("small", 60), ("rare", 5), (TREATED, 65)):
        for measure, (mean, sd) in MEAN_SD.items():
            factor = 0.8 if name == "small" else 1.0
            rows.append(
                {"class": name, "measure": measure, "mean": factor * mean, "sd": sd, "n": n, "origin": "images"}
            )
    return pd.DataFrame(rows)


def assay(pixel_size: float | None = None, classifier: bool = True) -> Assay:
    return Assay(
        name="exact",
        channels={"dna": 0, "actin": 1, "tubulin": 2},
        pixel_size=pixel_size,
        crop_size=None,
        intensity={"dna": (0.0, 1.0), "actin": (0.0, 1.0), "tubulin": (0.0, 1.0)},
        classes=list(CLASSES),
        compounds={"drug-a": "small", "drug-b": "rare"},
        nucleus_diameter=8.0,
        statistics=statistics(),
        segmenter=LabelReader(),
        classifier=ByBrightness() if classifier else None,  # type: ignore[arg-type]
        fingerprint="exact",
    )


def disc(canvas: np.ndarray, label: int, y: float, x: float, radius: float) -> None:
    yy, xx = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    canvas[(yy - y) ** 2 + (xx - x) ** 2 <= radius**2] = label


def image(nuclei: np.ndarray, cells: np.ndarray, brightness: float = 0.5) -> Tensor:
    """(3, H, W) float32 that `LabelReader` turns back into these labels."""
    third = np.full(nuclei.shape, brightness) + np.linspace(0, 0.05, nuclei.shape[1])
    return torch.from_numpy(np.stack([nuclei / 255, cells / 255, third])).float()


def random_crop(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Two to four cells with a nucleus each, some cut by the border."""
    rng = np.random.default_rng(seed)
    nuclei, cells = np.zeros((size, size), int), np.zeros((size, size), int)
    for label in range(1, int(rng.integers(2, 5)) + 1):
        y, x = rng.uniform(5, size - 5, 2)
        disc(cells, label, y, x, rng.uniform(20, 32))
        disc(nuclei, label, y + rng.uniform(-3, 3), x + rng.uniform(-3, 3), rng.uniform(11, 18))
    return nuclei, cells
