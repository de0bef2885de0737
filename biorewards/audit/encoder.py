"""What the audit keeps of every image beside its scores: a place in feature space, class probabilities, a thumbnail."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.regions import nuclear_containment
from biorewards.rewards import MEASURES

Floats = npt.NDArray[np.float32]
#: Pixels a side of a thumbnail. A translation by a few px, noise, blur and JPEG hardly change it.
SIDE = 8
#: Spread of a thumbnail's channel, [0, 1] units, below which it is noise: half a grey level of an 8-bit file.
LEAST_CONTRAST = 0.002
#: Numbers that stand in for an embedding where the assay has no classifier: six measures, three a channel.
_OF_CHANNEL = 3


class Encoded(NamedTuple):
    """embedding: (N, D). probabilities: (N, n) over the classifier's classes, n = 0 without one.

    thumbnail: (N, C, 8, 8), each channel centred, scaled so that the scalar product of two is their correlation.
    NaN in the rows of files that could not be read.
    """

    embedding: Floats
    probabilities: Floats
    thumbnail: Floats


class Encoder:
    """Features of a batch, for `score_folder(features=...)`.

    embedding: what the assay's classifier decides by (its pooled features). Without a classifier: measures of the
        crop (roundness, log areas, counts, containment; mean, spread and bright end of each channel), which are
        standardised by the reference images before distances are taken.

    `what` names the feature space for reports. It is the assay's own, so distances in it are no FID.
    """

    def __init__(self, assay: Assay) -> None:
        classifier = assay.classifier
        self.channels = assay.n_channels
        if classifier is None:
            self.depth, self.classes = len(MEASURES) + 1 + _OF_CHANNEL * assay.n_channels, 0
            self.what = f"{self.depth} measures of the crop (assay {assay.name} has no classifier)"
            self.standardise = True
        else:
            self.depth, self.classes = int(classifier.net.num_features), len(classifier.classes)  # type: ignore[arg-type]
            self.what = f"{self.depth} features of the classifier of assay {assay.name}"
            self.standardise = False
        self.width = self.depth + self.classes + self.channels * SIDE**2
        self.fingerprint = hashlib.sha256(
            f"{self.what} {self.width} {LEAST_CONTRAST} {assay.fingerprint}".encode()
        ).hexdigest()[:16]

    def __call__(self, batch: Batch) -> Tensor:
        """(B, width) float32."""
        classifier = batch.assay.classifier
        parts = [_measures(batch)]
        if classifier is not None:
            embedding = classifier.embed(batch.assay.normalised(batch.images))
            # The moa reward asks the batch for these next: the network runs once.
            batch.class_probabilities = classifier.judge(embedding)
            parts = [embedding, batch.class_probabilities]
        return torch.cat([*(part.float() for part in parts), thumbnails(batch.images).flatten(1)], 1)

    def split(self, features: Floats) -> Encoded:
        """Take (N, width) apart."""
        embedding, probabilities, thumbnail = np.split(features, [self.depth, self.depth + self.classes], axis=1)
        return Encoded(embedding, probabilities, thumbnail.reshape(-1, self.channels, SIDE, SIDE))


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 8, 8): means over blocks, each channel centred and scaled; of norm 1, or 0 if blank."""
    small = F.adaptive_avg_pool2d(images.float(), (SIDE, SIDE))
    small = small - small.mean((2, 3), keepdim=True)
    # A channel without contrast stays near zero instead of showing its noise.
    small = small / small.square().mean((2, 3), keepdim=True).sqrt().clamp(min=LEAST_CONTRAST)
    unit: Tensor = F.normalize(small.flatten(1), dim=1).view_as(small)
    return unit


def _measures(batch: Batch) -> Tensor:
    if batch.assay.classifier is not None:
        return torch.empty(len(batch), 0)
    values = [how.of(batch) for how in MEASURES.values()]
    values = [torch.log1p(v) if how.is_area else v for v, how in zip(values, MEASURES.values(), strict=True)]
    values.append(nuclear_containment(batch.nuclei, batch.cells))
    flat = batch.assay.normalised(batch.images).flatten(2)
    levels = torch.cat([flat.mean(2), flat.std(2), flat.quantile(0.99, 2)], 1)
    # Nothing found lies far from every real crop, which is right.
    return torch.cat([torch.stack(values, 1).nan_to_num(0.0), levels], 1)
