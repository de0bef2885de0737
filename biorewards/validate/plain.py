"""Classifiers of plain pixel statistics, in the place of an assay's network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from biorewards.audit.pixels import pixel_features, ring_features, texture_features
from biorewards.classifier import Classifier

#: (B, C, H, W) normalised by the assay -> (B, D)
Describe = Callable[[Tensor], Tensor]


def appearance(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, D): all that `biorewards.audit.pixels` knows."""
    return torch.cat([pixel_features(images), ring_features(images), texture_features(images)], 1)


def discriminant() -> Any:
    """Linear discriminant analysis, the covariance shrunk by Ledoit and Wolf (2004): right for few images, too."""
    return make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))


class PlainClassifier(Classifier):
    """p(class | crop) by a scikit-learn classifier of plain features; stands where an assay has its network.

    describe: what is seen of a crop. model: an unfitted classifier. images: (N, C, H, W), normalised by the assay;
    labels: (N,) place in `classes`, each class at least once.
    """

    def __init__(
        self, describe: Describe, model: Any, images: Tensor, labels: npt.NDArray[np.int64], classes: list[str]
    ) -> None:
        self.describe = describe
        self.classes = classes
        seen = describe(images).cpu().numpy().astype(np.float64)
        self.model = model.fit(seen, labels)
        self.net = SimpleNamespace(num_features=seen.shape[1])  # type: ignore[assignment]
        self.temperature = 1.0
        self.settings = {"features": describe.__name__, "model": repr(model)}
        digest = hashlib.sha256(repr((self.settings, classes, labels.tolist())).encode() + seen.tobytes())
        self.fingerprint = f"plain-{digest.hexdigest()[:12]}"

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D) features."""
        return self.describe(images).float()

    def judge(self, embedding: Tensor) -> Tensor:
        """(B, D) of `embed` to (B, n) probabilities."""
        found = np.zeros((len(embedding), len(self.classes)))
        if len(embedding):
            # float64 as in training: neighbours at distance zero are found at distance zero.
            found[:, self.model.classes_] = self.model.predict_proba(embedding.cpu().numpy().astype(np.float64))
        return torch.from_numpy(found).float().to(embedding.device)

    def to(self, device: torch.device | str) -> PlainClassifier:
        """Nothing to move."""
        return self
