"""Who lives in a field: where each cell is, how it responds, and which form it takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biorewards.phantom.cells import Float, Int, scatter
from biorewards.phantom.classes import (
    AREA_PER_CELL,
    CELL_AREA,
    CLASSES,
    FORMS,
    NUCLEUS_AREA,
    NUMBERS,
    ROUNDED,
    Effect,
    form_shares,
    numbers,
)
from biorewards.phantom.optics import Plate

_COLUMN = {name: i for i, name in enumerate(NUMBERS)}
#: px beyond the canvas in which cells are placed, so that the edge of a field is as full as its middle.
_BEYOND = 45.0
#: An area or a stain never falls below this share of an untreated cell's.
_LEAST = {"cell_area": 0.3, "nucleus_area": 0.4, "dapi": 0.3, "actin": 0.3, "tubulin": 0.3}
#: Cells of one clone differ: size through the cycle, stain from cell to cell (log sd).
_SCATTER = {"nucleus_area": 0.15, "cell_area": 0.22, "dapi": 0.20, "actin": 0.18, "tubulin": 0.22}


class Population(NamedTuple):
    """The cells of a field, one row a cell. The numbers of `Effect` are read by name: `cells.nucleus_area` (n,)."""

    centre: Int  # (n, 2) canvas px
    number: Float  # (n, len(NUMBERS))
    form: NDArray[np.intp]  # (n,) index into FORMS
    axis: Float  # (n,) direction of the long axis, radians

    def __getattr__(self, name: str) -> Float:
        if name in _COLUMN:
            return self.number[:, _COLUMN[name]]
        raise AttributeError(name)

    def where(self, keep: NDArray[np.bool_]) -> Population:
        """The cells for which `keep` (n,) is true."""
        return Population(self.centre[keep], self.number[keep], self.form[keep], self.axis[keep])

    @property
    def rounded(self) -> NDArray[np.bool_]:
        """(n,) the cells that have left the layer and lie, round, on top."""
        return np.isin(self.form, [FORMS.index(form) for form in ROUNDED])


def populate(
    rng: np.random.Generator,
    canvas: tuple[int, int],
    effect: Effect,
    plate: Plate,
    *,
    strength: float,
    density: float | None,
    spread: float,
    touching: float,
) -> Population:
    """Draw the cells of a canvas (H, W). The arguments are those of `render_field`."""
    if density is None:
        density = 1e4 / AREA_PER_CELL * effect.density**strength * plate.density * float(np.exp(rng.normal(0, 0.2)))
    high = np.array(canvas, float) + _BEYOND
    expected = density * 1e-4 * float(np.prod(high + _BEYOND))
    typical = 1 + (effect.cell_area - 1) * effect.affected
    spacing = max(
        0.66 * float(np.sqrt(0.55 * CELL_AREA * typical * spread)),
        0.82 * float(np.sqrt(NUCLEUS_AREA * effect.nucleus_area)),
    )
    centre = scatter(rng, -_BEYOND, high, max(1, round(expected)), spacing, touching)
    n = len(centre)
    responds = rng.random(n) < min(effect.affected * strength, 0.97)
    amount = responds * strength * np.exp(rng.normal(0, 0.15, n))
    base, goal = numbers(CLASSES["DMSO"]), numbers(effect)
    number = np.maximum(base + amount[:, None] * (goal - base), 0).astype(np.float32)
    for name, least in _LEAST.items():
        number[:, _COLUMN[name]] = np.maximum(number[:, _COLUMN[name]], least)
    for name, sd in _SCATTER.items():
        number[:, _COLUMN[name]] *= np.exp(rng.normal(0, sd, n))
    number[:, _COLUMN["filaments"]] *= plate.ratio
    shares = np.where(responds[:, None], form_shares(effect), form_shares(CLASSES["DMSO"]))
    form = (rng.random((n, 1)) > np.cumsum(shares, 1)[:, :-1]).sum(1)
    axis = (rng.random(n) * np.pi).astype(np.float32)
    return Population(np.rint(centre).astype(np.int32), number, form, axis)
