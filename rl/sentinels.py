"""What is watched and never rewarded: signs that rewards rise because images get worse.

Features here are plain pixel statistics: the classifier and the masks that rewards are made of have no part in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.audit.distances import Moments, frechet, moments
from biorewards.audit.pixels import pixel_features
from biorewards.rewards import MEASURES

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from rl.pool import Real
    from rl.rewards import Judged

#: A pixel is dark when no channel exceeds this share of the assay's range.
DARK = 0.1


@dataclass(frozen=True)
class Yardstick:
    """What real images are like. names: of the measures; sd: class -> (R,) spread of each; mean, scale: (D,) that
    features are standardised by; reference: their moments; ceiling: distance of other real images to the reference."""

    names: list[str]
    sd: dict[int, Tensor]
    mean: Tensor
    scale: Tensor
    reference: Moments | None
    ceiling: float
    dark: float

    @classmethod
    def of(cls, assay: Assay, names: list[str], real: Real, judged: Judged | None) -> Yardstick:
        """From real images and their scores; without any, spreads are the assay's and there is no distance."""
        if judged is None or len(real.images) < 4:
            every = torch.arange(len(assay.classes))
            sd = torch.stack([assay.reference(name, every)[1] for name in names], 1)
            none = torch.zeros(0)
            return cls(names, dict(enumerate(sd)), none, none, None, math.nan, math.nan)
        spreads = {k: judged.measure[real.target == k].std(0) for k in sorted(set(real.target.tolist()))}
        features = pixel_features(real.images)
        mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
        z = ((features - mean) / scale).double().numpy()
        order = np.random.default_rng(0).permutation(len(z))
        half = len(z) // 2
        ceiling = frechet(z[order[:half]], moments(z[order[half:]])).value
        return cls(names, spreads, mean, scale, moments(z), ceiling, dark(assay, real.images))

    def spread_ratios(self, judged: Judged, target: Tensor) -> dict[str, float]:
        """Standard deviation of each measure within classes over that of real images; NaN where it cannot be had."""
        found = {}
        for r, name in enumerate(self.names):
            if name not in MEASURES:
                continue
            ours = theirs = 0.0
            for k in sorted(set(target.tolist())):
                x = judged.measure[(target == k) & ~judged.nothing, r]
                real = self.sd.get(k)
                if len(x) < 2 or real is None or not bool(torch.isfinite(real[r])):
                    continue
                ours += (len(x) - 1) * float(x.var()) / max(float(real[r]) ** 2, 1e-12)
                theirs += len(x) - 1
            found[name] = math.sqrt(ours / theirs) if theirs else math.nan
        return found

    def distance(self, images: Tensor) -> float:
        """Frechet distance in standardised pixel features; biased by the number of images: compare equal numbers."""
        if self.reference is None:
            return math.nan
        z: npt.NDArray[np.float64] = ((pixel_features(images.cpu()) - self.mean) / self.scale).double().numpy()
        return float(frechet(z, self.reference).value)


def dark(assay: Assay, images: Tensor) -> float:
    """Share of pixels that are dark in every channel, on the assay's range."""
    return float((assay.normalised(images.cpu()).amax(1) < DARK).float().mean())


def diversity(images: Tensor, group: npt.NDArray[np.int64]) -> float:
    """Root mean square difference between images of a group, averaged over groups; NaN where none has two."""
    found = []
    for g in np.unique(group):
        x = images[torch.from_numpy(np.flatnonzero(group == g))].flatten(1).float()
        if len(x) > 1:
            found.append(float((2 * x.var(0).mean()).sqrt()))
    return float(np.mean(found)) if found else math.nan


def class_entropy(probabilities: Tensor) -> float:
    """Entropy, nats, of the classes that a classifier sees over all images: 0 when it sees one class only."""
    if not probabilities.numel():
        return math.nan
    p = probabilities.double().mean(0)
    return float(-(p * p.clamp(min=1e-12).log()).sum())
