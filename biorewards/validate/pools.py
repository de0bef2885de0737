"""Candidates for best-of-N without a generator: real images, mixtures and damaged ones, of every quality."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.audit.lesions import LESIONS, apply
from biorewards.segmentation.segmenter import Masks
from biorewards.validate.bench import Bench
from biorewards.validate.second import halves

#: Kind of candidate -> its share of a pool. Mixtures are what a half-trained generator draws: between its source and
#: its goal. Empty images are what an optimiser finds where failure is paid.
SHARES = {"real": 0.10, "other class": 0.14, "control": 0.10, "mixture": 0.30, "damaged": 0.30, "empty": 0.06}
#: Candidates for each class that is asked for: half as many again as the largest N, so that no N takes them all.
CANDIDATES = 96
#: Classes that are asked for, at least and at most; with `bench.n` in between, one for every four images.
GOALS = 2, 12


class Pool(NamedTuple):
    """images: (G * M, C, H, W), M candidates for each of G goals; goal: (G * M,) class asked for; kind: of `SHARES`."""

    images: Tensor
    goal: npt.NDArray[np.int64]
    kind: list[str]


def candidates(bench: Bench) -> Pool:
    """The same pool for every check: `CANDIDATES` for each of some treated classes (any classes where none is treated).

    Made of the real images that second judges were not fitted to. Deterministic by the bench's seed.
    """
    made: Pool = bench.once("candidates", lambda: _candidates(bench))
    return made


def _candidates(bench: Bench) -> Pool:
    rng = bench.rng("candidates")
    _, rows = halves(bench)
    present = np.unique(bench.target[rows])
    goals = present[present != 0] if (present != 0).any() else present
    wanted = int(np.clip(bench.n // 4, *GOALS))
    goals = goals[np.unique(np.linspace(0, len(goals) - 1, wanted).astype(int))]
    images, kinds = [], []
    for goal in goals:
        chosen = list(rng.choice(list(SHARES), CANDIDATES, p=list(SHARES.values())))
        # One of each kind at least.
        chosen[: len(SHARES)] = list(SHARES)
        images += [_one(bench, kind, int(goal), rows, rng) for kind in chosen]
        kinds += chosen
    return Pool(torch.stack(images), np.repeat(goals, CANDIDATES), [str(kind) for kind in kinds])


def _one(bench: Bench, kind: str, goal: int, rows: npt.NDArray[np.intp], rng: np.random.Generator) -> Tensor:
    own = rows[bench.target[rows] == goal]
    others = rows[bench.target[rows] != goal]
    controls = rows[bench.target[rows] == 0]
    others, controls = (one if len(one) else own for one in (others, controls))
    if kind == "empty":
        return _empty(bench, int(rng.choice(own)), rng)
    first = int(rng.choice({"other class": others, "control": controls}.get(kind, own)))
    image = bench.images([first])
    if kind == "mixture":
        share = float(rng.uniform(0.1, 0.9))
        return torch.lerp(image, bench.images([int(rng.choice(np.concatenate([others, controls])))]), share)[0]
    if kind == "damaged":
        return _damaged(bench, first, image, int(rng.choice(others)), rng)
    return image[0]


def _damaged(bench: Bench, row: int, image: Tensor, other: int, rng: np.random.Generator) -> Tensor:
    """One or two lesions at any of their doses; a lesion that these channels do not allow leaves the image alone."""
    masks: Masks = bench.masks([row])
    for name in rng.choice(list(LESIONS), int(rng.integers(1, 3)), replace=False):
        dose = float(rng.choice(LESIONS[name].doses))
        try:
            image, masks = apply(
                str(name), image, masks, dose, channels=bench.assay.channels, seed=int(rng.integers(2**31)),
                others=bench.images([other]),
            )  # fmt: skip
        except ValueError:
            continue
    return image[0]


def _empty(bench: Bench, row: int, rng: np.random.Generator) -> Tensor:
    """One grey level, white noise, or noise with the levels of a real image."""
    image = bench.images([row])[0]
    form = int(rng.integers(3))
    if form == 0:
        return torch.full_like(image, float(rng.uniform(0, 1)))
    white = torch.from_numpy(rng.random(image.shape, dtype=np.float32))
    if form == 1:
        return white
    mean, spread = image.mean((1, 2), keepdim=True), image.std((1, 2), keepdim=True)
    return (mean + spread * (white - 0.5) * 12**0.5).clamp(0, 1)
