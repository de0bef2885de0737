"""Mechanism of action: does the crop look like its target class to the assay's classifier?"""

from __future__ import annotations

import torch

from biorewards.batch import Batch
from biorewards.reward import Reason, Score


class MechanismOfAction:
    """Calibrated probability of the target class (CellFluxRL, verifier 1).

    Measure and value: p(target class given the crop), in [0, 1], higher is better. The worst value, 0, for a crop
    without contrast (BLANK) or without a nucleus (NO_NUCLEUS): a classifier answers anything with something, and
    texture without a cell has no mechanism. NaN without a target, or when the classifier does not cover the class.
    """

    name = "moa"
    label_free = False
    worst = 0.0

    def __call__(self, batch: Batch) -> Score:
        target = batch.target
        reason = torch.zeros_like(target, dtype=torch.uint8)
        known = target >= 0
        probabilities = batch.class_probabilities
        if probabilities is None:
            measure = torch.full(target.shape, torch.nan, device=target.device)
            reason[known] = Reason.NO_REFERENCE
        else:
            column = batch.assay.classifier_columns.to(target.device)[target.clamp_min(0)]
            measure = probabilities.gather(1, column.clamp_min(0)[:, None])[:, 0]
            reason[known & (column < 0)] = Reason.NO_REFERENCE
        scored = known & (reason == 0)
        empty = torch.bincount(batch.nucleus_regions.image, minlength=len(batch)) == 0
        reason[scored & empty] = Reason.NO_NUCLEUS
        reason[scored & batch.blank] = Reason.BLANK
        reason[target == -1] = Reason.NO_TARGET
        reason[target < -1] = Reason.UNKNOWN_TARGET
        measure = torch.where(scored, measure, torch.nan)
        value = torch.where(scored & (empty | batch.blank), torch.full_like(measure, self.worst), measure)
        return Score(value, measure, reason)

    def __repr__(self) -> str:
        return "MechanismOfAction()"
