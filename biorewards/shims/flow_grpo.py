"""A scorer of Flow-GRPO and DiffusionNFT: a factory that takes a device, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from biorewards.assay import Assay
from biorewards.reward import Suite
from biorewards.shims.judge import Judge

#: scorer(images, prompts, metadata) -> (scores (N,), reward name -> values)
Scorer = Callable[[Any, Sequence[str], Sequence[Mapping[str, Any]]], tuple[Any, dict[str, Any]]]


def as_flow_grpo(suite: Suite, assay: Assay, *, label: str | None = "moa") -> Callable[[torch.device | str], Scorer]:
    """A factory for the table of `flow_grpo.rewards.multi_score`: factory(device) -> scorer.

    The scorer takes (N, C, H, W) float tensors in [0, 1] or (N, H, W, C) uint8 arrays and gives the total of each
    image as a float32 array, never None or NaN. label: key of every image's metadata with class or compound; None: the
    prompts are the labels.
    """
    judge = Judge(suite, assay)

    def biorewards(device: torch.device | str) -> Scorer:
        def score(
            images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
        ) -> tuple[Any, dict[str, Any]]:
            if label is not None and (bad := [k for k, row in enumerate(metadata) if label not in row]):
                raise ValueError(f"metadata of image {bad[0]} has no {label!r}: as_flow_grpo(..., label=KEY)")
            labels = prompts if label is None else [row[label] for row in metadata]
            values = {name: value.cpu().numpy() for name, value in judge(images, labels, device).items()}
            return values.pop("total"), values

        return score

    return biorewards
