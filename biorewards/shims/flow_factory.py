"""A pointwise reward of Flow-Factory, named in its configuration; importing this module needs Flow-Factory.

rewards:
  - name: biology
    reward_model: biorewards.shims.flow_factory.BiologicalReward
    assay: phantom        # or the folder of an assay
    label: moa            # key of the data set's metadata; without it the prompts are the labels
"""

from __future__ import annotations

import json
from typing import Any

import torch
from flow_factory.rewards import PointwiseRewardModel, RewardModelOutput

from biorewards.assay import Assay
from biorewards.rewards import suite
from biorewards.shims.judge import Judge


class BiologicalReward(PointwiseRewardModel):
    """Total of the rewards of an assay for each image; missing biology has the worst value."""

    required_fields: tuple[str, ...] = ("prompt", "image")
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        given = config.extra_kwargs
        if "assay" not in given:
            raise ValueError("reward BiologicalReward: name an assay in its configuration, `assay: phantom`")
        assay = Assay.load(given["assay"])
        self.judge = Judge(suite(assay, given.get("rewards")), assay)
        self.label = given.get("label")
        if self.label is not None:
            self.required_fields = ("prompt", "image", "metadata")

    @torch.no_grad()
    def __call__(
        self, prompt: list[str], image: Any = None, metadata: list[str] | None = None, **others: Any
    ) -> RewardModelOutput:
        """image: (C, H, W) tensors in [0, 1]. metadata: a JSON object of each image."""
        labels = prompt if self.label is None else [json.loads(row)[self.label] for row in metadata or []]
        return RewardModelOutput(rewards=self.judge(image, labels, self.device)["total"])
