"""A torchmetrics metric. Importing this module needs torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from biorewards.assay import Assay
from biorewards.reward import Suite
from biorewards.shims.judge import Judge


class BiologicalRewards(Metric):
    """Mean of every reward and of the total over all images of all processes; see `as_metric`.

    Print what real held-out images score beside it: -z^2 is best for images that are all the same.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, suite: Suite, assay: Assay, **settings: Any) -> None:
        super().__init__(**settings)
        self.judge = Judge(suite, assay)
        self.names = [*suite.rewards, "total"]
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Any, labels: Sequence[Any]) -> None:
        """images, labels: as for `Judge`; judged on the metric's device."""
        values = self.judge(images, labels, self.device)
        self.sums = self.sums + torch.stack([values[name].double().sum() for name in self.names])
        self.count = self.count + len(values["total"])

    def compute(self) -> dict[str, Tensor]:
        """Reward name, and "total", to its mean; NaN before the first image."""
        return dict(zip(self.names, self.sums / self.count, strict=True))
