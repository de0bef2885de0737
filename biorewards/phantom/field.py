"""A field of cells: image and exact masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from biorewards.phantom import cells as geometry
from biorewards.phantom import cytoplasm, nuclei, optics, textures
from biorewards.phantom.cells import REACH, Float, Int
from biorewards.phantom.classes import CELL_AREA, CLASSES, NUCLEUS_AREA, Effect
from biorewards.phantom.population import Population, populate

#: Rendered beyond the field on every side, so that light and cells come in from outside.
MARGIN = 12
#: Grey levels above the offset of a typical untreated cell: actin, tubulin, DAPI.
LEVEL = np.array([72.0, 70.0, 105.0], np.float32)
#: What shows less than this many pixels (of the 96 px crop) is not labelled: slivers that another cell leaves visible.
MIN_PIXELS = 15


class Field(NamedTuple):
    """image (H, W, 3) uint8 in the order actin, tubulin, DAPI; nuclei and cells (H, W) int32, 0 = background.

    Labels run from 1 without gaps. A cell's mask holds its nuclei. Where nuclei lie on one another the light of both
    adds up, and the line half-way between their outlines parts them; rounded cells lie over all others.
    """

    image: NDArray[np.uint8]
    nuclei: Int
    cells: Int


def render_field(
    rng: np.random.Generator,
    shape: tuple[int, int] = (360, 360),
    effect: str | Effect | None = "DMSO",
    plate: optics.Plate | None = None,
    *,
    strength: float = 1.0,
    density: float | None = None,
    spread: float = 1.0,
    touching: float = 0.10,
    pixel: float = 1.0,
) -> Field:
    """Draw a field of cells.

    shape: (H, W) px of the result. effect: a name in `CLASSES`, an `Effect`, or None for a class chosen at random.
    plate: staining and optics; None draws a plate. strength: of the effect (share of responding cells and size of
    their response; 1 = the middle dose). density: cells per 10,000 px of 0.32 um (untreated: 1.8); None takes the
    effect's own. spread: factor on cell area before neighbours cut it (1.5 gives confluent, 0.6 lonely cells).
    touching: share of cells so close to another that nuclei touch or overlap. pixel: size of a pixel in units of
    the 96 px crop's (1.5 and 2 for crops of 64 and 48 px).

    Returns a `Field`. Raises ValueError for an unknown effect. The same generator state gives the same field; with
    another `pixel` it gives the same cells.
    """
    if effect is None:
        effect = list(CLASSES)[rng.integers(len(CLASSES))]
    if isinstance(effect, str):
        if effect not in CLASSES:
            raise ValueError(f"no effect {effect!r}; there are {list(CLASSES)}")
        effect = CLASSES[effect]
    if plate is None:
        plate = optics.draw_plate(rng)
    height, width = (round(n * pixel) for n in shape)
    canvas = next_fast_len(height + 2 * MARGIN, real=True), next_fast_len(width + 2 * MARGIN, real=True)
    people = populate(rng, canvas, effect, plate, strength=strength, density=density, spread=spread, touching=touching)
    light, nucleus_labels, cell_labels = _draw(rng, canvas, people, plate, spread)
    focus = plate.sigma * float(np.exp(rng.normal(0, 0.12)))
    image = optics.spread(light, [focus, focus + float(rng.uniform(1.6, 3.0))], plate.haze)
    here = slice(MARGIN, MARGIN + height), slice(MARGIN, MARGIN + width)
    image = image[(slice(None), *here)] * (LEVEL * np.asarray(plate.gain, np.float32))[:, None, None]
    image = optics.coarser(image * _shading((height, width), plate), pixel)
    labels = [renumber(_nearest(a[here], shape, pixel), MIN_PIXELS / pixel**2) for a in (nucleus_labels, cell_labels)]
    return Field(optics.camera(rng, image, plate), *labels)


def renumber(labels: Int, least: float) -> Int:
    """Labels 1..n without gaps, in the old order; objects of fewer than `least` px become background."""
    flat = labels.ravel()
    present = np.bincount(flat) >= max(least, 1)
    present[0] = False
    number = (np.cumsum(present) * present).astype(np.int32)
    renumbered: Int = number.take(flat).reshape(labels.shape)
    return renumbered


def _shading(shape: tuple[int, int], plate: optics.Plate) -> Float:
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    slope_y, slope_x = plate.shading
    lamp: Float = (1 + slope_y * y)[:, None] * (1 + slope_x * x)[None]
    return lamp


def _nearest(labels: Int, shape: tuple[int, int], pixel: float) -> Int:
    if pixel == 1:
        return labels
    rows, columns = (((np.arange(n) + 0.5) * pixel).astype(int) for n in shape)
    nearest: Int = labels[rows][:, columns]
    return nearest


def _draw(
    rng: np.random.Generator, canvas: tuple[int, int], people: Population, plate: optics.Plate, spread: float
) -> tuple[Float, Int, Int]:
    """Light (2, 3, H, W) in focus and out of focus, labels of nuclei, labels of cells."""
    grain = textures.Grain(*(textures.noise(rng, name, canvas) for name in textures.Grain._fields))
    # Cells lie at different heights: the share of light that is out of focus varies smoothly over the field.
    blurred = np.clip(0.08 + 0.3 * textures.noise(rng, "coarse", canvas), 0, 0.9)
    layer = people.where(~people.rounded)
    radius = np.sqrt(CELL_AREA * spread * plate.cell_area * layer.cell_area / np.pi)
    outline = geometry.outlines(rng, layer.cell_elongation, layer.cell_irregular, layer.cell_concave, layer.axis)
    # However far a cell retracts, a rim of cytoplasm stays round its nucleus.
    rim = 1.15 * np.sqrt(NUCLEUS_AREA * layer.nucleus_area / np.pi)
    outline = np.clip(outline * radius[:, None], rim[:, None], REACH - 1)
    cells, score = geometry.territories(layer.centre, outline, canvas, 0.022 * grain.mid + 0.02 * grain.coarse)

    nucleus = nuclei.Canvas.empty(canvas)
    nuclei.draw(rng, layer, grain, blurred, cells, nucleus)
    actin, tubulin = cytoplasm.draw(rng, layer, grain, cells, score, nucleus.cover)
    # Staining is patchy over a field, too.
    tubulin *= np.clip(1 + 0.25 * textures.noise(rng, "coarse", canvas), 0.4, 2)
    nucleus.light[0] += 0.035 * tubulin  # DAPI glows faintly in the cytoplasm

    light = np.empty((2, 3, *canvas), np.float32)
    for i, weight in enumerate((1 - blurred, blurred)):
        light[i, 0] = actin * weight
        light[i, 1] = tubulin * weight
        light[i, 2] = nucleus.light[i]
    nuclei.draw_rounded(rng, people.where(people.rounded), grain, light, nucleus.labels, cells)
    return light, nucleus.labels, cells
