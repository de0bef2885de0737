"""A folder of crops whose labels can be read out of the pixels, and judges with faults, for the tests of `validate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from exact import assay as exact_assay
from exact import disc, image
from torch import Tensor

from biorewards.batch import Batch
from biorewards.io.manifest import read_manifest
from biorewards.reward import Reason, Score
from biorewards.rewards import ReferenceReward
from biorewards.validate import Bench

#: compound -> class, share of the crops
LABELS = {"dmso": "DMSO", "drug-a": "small"}


class Brightness:
    """A classifier of one feature, the mean of channel 2; calibrated enough for a test."""

    classes: ClassVar = ["DMSO", "small", "rare"]
    fingerprint = "brightness"
    net = SimpleNamespace(num_features=1)

    def to(self, device: object) -> Brightness:
        return self

    def embed(self, images: Tensor) -> Tensor:
        return images[:, 2].double().mean((1, 2))[:, None].float()

    def judge(self, embedding: Tensor) -> Tensor:
        return torch.softmax(-40 * (embedding - torch.tensor([[0.28, 0.83, 2.0]])).abs(), 1)

    def __call__(self, images: Tensor) -> Tensor:
        return self.judge(self.embed(images))


def draw(seed: int, compound: str) -> np.ndarray:
    """(3, 64, 64) float32: one to three cells, nuclei inside; brighter under the drug, which the classifier reads."""
    rng = np.random.default_rng(seed)
    nuclei, cells = np.zeros((64, 64), int), np.zeros((64, 64), int)
    for label, (y, x) in enumerate(rng.permutation([(16, 16), (16, 48), (48, 16)])[: int(rng.integers(1, 4))], 1):
        disc(cells, label, y, x, rng.uniform(11, 15))
        disc(nuclei, label, y, x, rng.uniform(6, 9))
    return image(nuclei, cells, {"dmso": 0.25, "drug-a": 0.8}[compound] + rng.normal(0, 0.02)).numpy()


def write_folder(folder: Path, n: int = 40, seed: int = 0) -> Path:
    """n crops on two plates, half of them treated, with an index."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(n):
        compound = list(LABELS)[k % 2]
        np.save(folder / f"{k}.npy", draw(1000 * seed + k, compound).astype(np.float32))
        rows.append({"file": f"{k}.npy", "compound": compound if compound != "dmso" else "", "moa": LABELS[compound],
                     "plate": f"p{k // 2 % 2}", "well": f"B{k % 6:02d}"})  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return folder


def bench(
    folder: Path, rewards: dict[str, object] | None = None, n: int = 12, shelf: Path | None = None, **more: object
) -> Bench:
    """The bench of these crops before the assay that reads their labels."""
    assay = replace(exact_assay(), classifier=Brightness())  # type: ignore[arg-type]
    return Bench.build(assay, read_manifest(folder), rewards, n=n, folder=shelf, **more)  # type: ignore[arg-type]


class Counting:
    """An honest reward that knows how often it was asked and about how many crops."""

    name = "nucleus_count"
    worst = -25.0

    def __init__(self) -> None:
        self.inner, self.calls, self.crops = ReferenceReward("nucleus_count"), 0, 0

    def __call__(self, batch: Batch) -> Score:
        self.calls += 1
        self.crops += len(batch)
        return self.inner(batch)

    def __repr__(self) -> str:
        return "Counting()"


class ZeroOnFailure(Counting):
    """Fault: what has no nucleus scores 0, which is the best value of −z²."""

    def __call__(self, batch: Batch) -> Score:
        score = self.inner(batch)
        return Score(torch.where(score.reason == Reason.NO_NUCLEUS, 0.0, score.value), score.measure, score.reason)

    def __repr__(self) -> str:
        return "ZeroOnFailure()"


class SilentOnFailure(Counting):
    """Fault: what has no nucleus is left without a value."""

    def __call__(self, batch: Batch) -> Score:
        score = self.inner(batch)
        gone = (score.reason == Reason.NO_NUCLEUS) | (score.reason == Reason.BLANK)
        return Score(torch.where(gone, torch.nan, score.value), score.measure, score.reason)

    def __repr__(self) -> str:
        return "SilentOnFailure()"


class LeftHalf:
    """Fault: reads only the left half, and brightness at that."""

    name = "left_half"

    def __call__(self, batch: Batch) -> Score:
        level = batch.images[:, 0, :, : batch.images.shape[3] // 2].mean((1, 2)) * 100
        return Score(level, level, torch.zeros(len(batch), dtype=torch.uint8))

    def __repr__(self) -> str:
        return "LeftHalf()"


class Blind:
    """Fault: says the same of everything."""

    name = "nucleus_count"

    def __call__(self, batch: Batch) -> Score:
        one = torch.ones(len(batch))
        return Score(one, one, torch.zeros(len(batch), dtype=torch.uint8))

    def __repr__(self) -> str:
        return "Blind()"


class Fails:
    """A reward that is not to be asked: what it would say is known already."""

    name = "nucleus_count"
    worst = -25.0

    def __call__(self, batch: Batch) -> Score:
        raise AssertionError("asked again")

    def __repr__(self) -> str:
        return "Counting()"
