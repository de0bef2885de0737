"""The five rewards that hold a measure of the crop against real images of the target class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from biorewards.batch import Batch
from biorewards.regions import Regions, image_max, image_mean
from biorewards.reward import Reason, Score

#: |z| is limited to this, so that one outlier cannot rule a group: the worst value is -25.
Z_LIMIT = 5.0
#: An object counts when it shows at least this share of a nucleus's area. What a crop's border leaves of a cell can
#: be a sliver that nobody could call a cell: one in five cell labels of exact phantom masks.
NUCLEUS_SHOWS, CELL_SHOWS = 0.05, 0.5


class Measure(NamedTuple):
    """How a crop's statistic is taken, whether it is an area (px^2, to um^2), and what is missing when it is NaN."""

    of: Callable[[Batch], Tensor]
    is_area: bool
    missing: Reason


def roundness(batch: Batch) -> Tensor:
    """(B,) mean form factor of the nuclei not cut by the border; over all where every one is cut; NaN where none."""
    regions = batch.nucleus_regions
    whole = image_mean(regions, regions.form_factor, ~regions.touches_border)
    return torch.where(whole.isnan(), image_mean(regions, regions.form_factor), whole)


def visible(batch: Batch, regions: Regions, share: float) -> Tensor:
    """(B,) float32 number of objects that show at least `share` of the area of a nucleus of the assay's diameter."""
    least = share * math.pi / 4 * batch.assay.nucleus_diameter**2
    return torch.bincount(regions.image[regions.area >= least], minlength=regions.n_images).float()


MEASURES: dict[str, Measure] = {
    "nucleus_roundness": Measure(roundness, False, Reason.NO_NUCLEUS),
    "nucleus_size": Measure(lambda b: image_max(b.nucleus_regions, b.nucleus_regions.area), True, Reason.NO_NUCLEUS),
    "cytoplasm_size": Measure(lambda b: image_max(b.cell_regions, b.cell_regions.area), True, Reason.NO_CELL),
    "nucleus_count": Measure(lambda b: visible(b, b.nucleus_regions, NUCLEUS_SHOWS), False, Reason.NO_NUCLEUS),
    "cytoplasm_count": Measure(lambda b: visible(b, b.cell_regions, CELL_SHOWS), False, Reason.NO_CELL),
}


class ReferenceReward:
    """-z^2 with z = (measure - mean) / sd over REAL images of the target's class (CellFluxRL, verifiers 3 to 7).

    value: in [-25, 0], higher is better (|z| limited to 5); -25 when there is nothing to measure, since 0 is the
        maximum here and "no object" would win. Real images average about -1.
    measure: form factor (no unit), area of the largest object (um^2 where the assay knows its pixel size, else
        px^2), or number of objects.
    NaN without a target, or where the assay has no statistics for it.
    """

    label_free = False
    worst = -(Z_LIMIT**2)

    def __init__(self, name: str) -> None:
        if name not in MEASURES:
            raise ValueError(f"no measure {name!r}; choose from {sorted(MEASURES)}")
        self.name = name

    def __call__(self, batch: Batch) -> Score:
        how = MEASURES[self.name]
        measure = how.of(batch)
        if how.is_area:
            measure = measure * batch.assay.pixel_area
        mean, sd, reference = batch.assay.reference(self.name, batch.target)
        z = ((measure - mean) / sd).clamp(-Z_LIMIT, Z_LIMIT)
        reason = reference.clone()
        scored = ~torch.isin(
            reason, torch.tensor([Reason.NO_TARGET, Reason.UNKNOWN_TARGET, Reason.NO_REFERENCE], device=reason.device)
        )
        nothing = scored & (measure.isnan() | (measure == 0))
        reason[nothing] = how.missing
        reason[scored & batch.blank] = Reason.BLANK
        value = torch.where(nothing | batch.blank, torch.full_like(z, self.worst), -z.square())
        value = torch.where(scored, value, torch.full_like(value, torch.nan))
        return Score(value, measure, reason)

    def __repr__(self) -> str:
        return f"ReferenceReward({self.name!r})"
