"""Nucleus in cytoplasm: is every nucleus inside a cell?"""

from __future__ import annotations

import torch

from biorewards.batch import Batch
from biorewards.regions import counts, nuclear_containment
from biorewards.reward import Reason, Score


class NucleusInCytoplasm:
    """Nuclear pixels inside any cell mask / nuclear pixels, pooled over the crop (CellFluxRL, verifier 2).

    "Cytoplasm" is the whole-cell mask with holes filled: containment in cell minus nucleus would be zero by
    construction. In [0, 1], higher is better; needs no target. The worst value, 0, when there is no contrast
    (BLANK), no nucleus (NO_NUCLEUS) or no cell (NO_CELL).
    """

    name = "nucleus_in_cytoplasm"
    label_free = True
    worst = 0.0

    def __call__(self, batch: Batch) -> Score:
        measure = nuclear_containment(batch.nuclei, batch.cells)
        reason = torch.zeros(len(batch), dtype=torch.uint8, device=measure.device)
        reason[counts(batch.cell_regions) == 0] = Reason.NO_CELL
        reason[counts(batch.nucleus_regions) == 0] = Reason.NO_NUCLEUS
        reason[batch.blank] = Reason.BLANK
        value = torch.where(reason == Reason.OK, measure, torch.zeros_like(measure))
        return Score(value, measure, reason)

    def __repr__(self) -> str:
        return "NucleusInCytoplasm()"
