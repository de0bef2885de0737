"""Images and labels, as trainers hand them over, to a number for every image: what all shims share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.io.targets import assign_targets
from biorewards.reward import UNSCORED, Reason, Score, Suite

#: Float images beyond this are on another scale, -1 to 1 or 0 to 255, and would be judged clipped.
LEAST, MOST = -0.5, 1.5


class Judge:
    """A suite that never leaves a value out.

    A missing nucleus or cell, a blank image and pixels that are no number have the worst value of each reward, as
    everywhere: a trainer that skips a missing term would reward its absence. A question that cannot be asked (no label,
    an unknown one, a class without a reference) is an error. As the worst value it would be the same for every image
    and teach nothing, unnoticed.
    """

    def __init__(self, suite: Suite, assay: Assay) -> None:
        self.suite = suite
        self.assay = assay

    def __call__(
        self, images: Any, labels: Sequence[Any], device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Reward name, and "total", to (B,) float32, all finite.

        images: see `as_tensor`; channels and pixel size are the assay's. labels: a compound or a class each.
        device: where to judge; default: where the images are.

        Raises ValueError for images on another scale and for a label with which a reward cannot judge.
        """
        pixels = as_tensor(images)
        pixels = pixels if device is None else pixels.to(device)
        names = ["" if label is None else str(label) for label in labels]
        if len(names) != len(pixels):
            raise ValueError(f"{len(pixels)} images, but {len(names)} labels")
        table = pd.DataFrame({"Metadata_Compound": names, "Metadata_MoA": ""}, dtype=object)
        found = assign_targets(table, self.assay.classes, self.assay.compounds)
        self.assay.to(pixels.device)
        with torch.no_grad():
            scores = self.suite(Batch(pixels, torch.from_numpy(found.target), self.assay)).scores
        values = {name: self._filled(name, score, names, found.notes) for name, score in scores.items()}
        total = sum(
            (self.suite.weights[name] * value for name, value in values.items()), torch.zeros_like(pixels[:, 0, 0, 0])
        )
        return values | {"total": total}

    def _filled(self, name: str, score: Score, labels: list[str], notes: list[str]) -> Tensor:
        unasked = torch.isin(score.reason, torch.tensor(UNSCORED, dtype=torch.uint8, device=score.reason.device))
        missing = ~score.value.isfinite()
        worst = getattr(self.suite.rewards[name], "worst", None)
        if unasked.any() or (worst is None and missing.any()):
            row = int((unasked | missing).nonzero()[0])
            why = Reason(int(score.reason[row])).name if unasked[row] else "it has no `worst` value"
            raise ValueError(
                f"reward {name!r} has no value for image {row}, labelled {labels[row]!r} ({'; '.join([why, *notes])}): "
                "give labels that the assay knows, or a suite of rewards that it can judge, suite(assay, names=[...])"
            )
        return score.value if worst is None else torch.where(missing, torch.full_like(score.value, worst), score.value)


def as_tensor(images: Any) -> Tensor:
    """(B, C, H, W) float32 in [0, 1] of tensors (channels first), NumPy arrays or PIL images (channels last).

    One tensor or array of all images, or a list of equally large ones. Integers are 8-bit; floats are in [0, 1].
    Raises ValueError for other types and scales.
    """
    if isinstance(images, Tensor):
        pixels = images
    elif isinstance(images, np.ndarray):
        pixels = torch.from_numpy(images).movedim(-1, 1)
    else:
        one = [
            image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images
        ]
        if len(shapes := {tuple(image.shape) for image in one}) != 1:
            raise ValueError(f"images of one size are judged together; these are {sorted(shapes) or 'none'}")
        pixels = torch.stack(one)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"images are {pixels.dtype}; pass uint8, or float32 in [0, 1]")
    finite = pixels[pixels.isfinite()]
    if len(finite) and (finite.min() < LEAST or finite.max() > MOST):
        low, high = float(finite.min()), float(finite.max())
        raise ValueError(
            f"images lie in [{low:.3g}, {high:.3g}]; pass [0, 1]: (x + 1) / 2 of [-1, 1], x / 255 of 8 bits"
        )
    return pixels.float()
