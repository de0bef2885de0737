"""Nuclei of all forms, and the cells that have rounded up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label as connected

from biorewards.phantom.cells import REACH, Float, Int, Real, Window, outlines, polar, window
from biorewards.phantom.classes import FORMS, NUCLEUS_AREA
from biorewards.phantom.population import Population
from biorewards.phantom.textures import Grain

#: px: radius of a cell that has rounded up, its brightness, and how bright its chromatin is.
ROUND_RADIUS = {"mitotic": 20.0, "monopolar": 23.0, "pyknotic": 14.0, "floating": 21.0}
ROUND_LIGHT = {"mitotic": 1.35, "monopolar": 1.45, "pyknotic": 1.5, "floating": 1.25}


class Patch(NamedTuple):
    """A nucleus on its own square: light, mask and depth below its outline in px, each (2 half + 1, 2 half + 1)."""

    light: Float
    mask: NDArray[np.bool_]
    depth: Float

    def at(self, grid: Window) -> Patch:
        """The part that lies on `grid`, a window of the polar grid as `window` gives it."""
        half = len(self.mask) // 2
        cut = tuple(slice(part.start - REACH + half, part.stop - REACH + half) for part in grid)
        return Patch(self.light[cut], self.mask[cut], self.depth[cut])


class Canvas(NamedTuple):
    """labels (H, W) int32; light (2, H, W), in focus and out of it; cover (H, W), 1 where a nucleus lies; depth (H, W)
    px of the labelled nucleus, negative without one."""

    labels: Int
    light: Float
    cover: Float
    depth: Float

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Canvas:
        """A canvas without nuclei."""
        return cls(
            np.zeros(shape, np.int32), np.zeros((2, *shape), np.float32), np.zeros(shape, np.float32),
            np.full(shape, -np.inf, np.float32),
        )  # fmt: skip


def draw(
    rng: np.random.Generator, people: Population, grain: Grain, blurred: Float, cells: Int, canvas: Canvas
) -> None:
    """Draw the nuclei of the cells in the layer on `canvas`.

    Where two nuclei lie on one another their light adds up, and no image shows which is the upper one: the overlap is
    parted along the line that is as deep in the one as in the other, through the points where their outlines cross.
    A nucleus that reaches beyond its cell's territory takes the pixel with it: `cells` (H, W) is written, too.
    blurred (H, W): share of light that is out of focus.
    """
    n = len(people.centre)
    radius = np.sqrt(NUCLEUS_AREA * people.nucleus_area / np.pi)
    oval = outlines(rng, people.nucleus_elongation, people.nucleus_irregular, None, people.axis + rng.normal(0, 0.4, n))
    twin = outlines(rng, people.nucleus_elongation, people.nucleus_irregular)
    chromatin = 0.35 * grain.mid + 0.85 * grain.fine
    place = people.centre + rng.normal(0, 2.0, (n, 2))
    count = 0
    for i in range(n):
        form = FORMS[people.form[i]]
        r = float(radius[i])
        depth = min(float(people.nucleoli[i]), 0.9)
        if form == "lobed":
            parts = [(place[i], _lobed(rng, r))]
        elif form == "honeycomb":
            parts = [(place[i], _honeycomb(rng, r))]
        elif form == "binucleate":
            turn = people.axis[i]
            apart = np.array([np.sin(turn), np.cos(turn)]) * r * rng.uniform(0.78, 1.0)
            parts = [
                (place[i] + apart, _smooth(rng, oval[i] * (0.85 * r), depth)),
                (place[i] - apart, _smooth(rng, twin[i] * (0.82 * r), depth)),
            ]
        else:
            parts = [(place[i], _smooth(rng, oval[i] * r, depth))]
        for at, patch in parts:
            count += 1
            y, x = (int(v) for v in np.rint(at))
            places = window(y, x, len(patch.mask) // 2, cells.shape)
            if places is None:
                continue
            here, grid = places
            light, mask, deep = patch.at(grid)
            mine = mask & (deep > canvas.depth[here])
            np.copyto(canvas.depth[here], deep, where=mine)
            np.copyto(canvas.labels[here], count, where=mine)
            np.copyto(cells[here], i + 1, where=mine)
            np.maximum(canvas.cover[here], np.minimum(light, 1), out=canvas.cover[here])
            light = light * np.maximum(1 + people.chromatin[i] * chromatin[here], 0.25) * people.dapi[i]
            out = float(blurred[min(max(y, 0), cells.shape[0] - 1), min(max(x, 0), cells.shape[1] - 1)])
            canvas.light[0][here] += light * (1 - out)
            canvas.light[1][here] += light * out


def draw_rounded(
    rng: np.random.Generator, people: Population, grain: Grain, light: Float, nuclei: Int, cells: Int
) -> None:
    """Draw cells that lie higher than the rest (dividing, arrested, dying, floating), over everything there.

    Adds to light (2, 3, H, W) and writes their masks over both label images.
    """
    distance, direction = polar()
    n_cell, n_nucleus = int(cells.max()), int(nuclei.max())
    flat = np.full(len(people.centre), 0.03, np.float32)
    outline = outlines(rng, 2 * flat, flat)
    for i in range(len(people.centre)):
        form = FORMS[people.form[i]]
        radius = ROUND_RADIUS[form] * float(rng.uniform(0.88, 1.12))
        half = int(outline[i].max() * radius) + 2
        y, x = (int(v) for v in people.centre[i])
        places = window(y, x, half, cells.shape)
        if places is None:
            continue
        here, grid = places
        q = distance[grid] * (1 / (outline[i] * radius))[direction[grid]]
        body = q < 1
        height = np.sqrt(np.clip(1 - q * q, 0, 1))
        soft = np.clip((1 - q) * radius + 0.5, 0, 1)
        chromatin, mask, _ = _condensed(rng, form, half).at(grid)
        actin = soft * (0.5 + 0.55 * height) + 0.9 * np.exp(-(((1 - q) / 0.14) ** 2)) * float(rng.uniform(0.5, 1.5))
        tubulin = soft * (0.35 + 0.8 * height)
        if form == "monopolar":  # one aster in the middle
            tubulin += 1.6 * np.exp(-((q * radius / 5.5) ** 2)) + 0.7 * np.exp(-((q * radius / 11) ** 2))
        elif form == "mitotic":  # a spindle
            tubulin += 1.2 * np.exp(-((q * radius / 8.0) ** 2))
        tubulin *= 1 - 0.3 * np.minimum(chromatin, 1)
        patch = np.stack(
            [
                actin * (ROUND_LIGHT[form] * people.actin[i]),
                tubulin * (ROUND_LIGHT[form] * people.tubulin[i]),
                chromatin * people.dapi[i] * (1 + 0.1 * grain.fine[here]) + 0.05 * tubulin,
            ]
        )
        out = 1.0 if form == "floating" else float(rng.uniform(0, 0.5))
        light[(0, slice(None), *here)] *= 1 - 0.35 * soft
        light[(0, slice(None), *here)] += patch * (1 - out)
        light[(1, slice(None), *here)] += patch * out
        n_cell, n_nucleus = n_cell + 1, n_nucleus + 1
        np.copyto(cells[here], n_cell, where=body)
        np.copyto(nuclei[here], 0, where=body)
        np.copyto(nuclei[here], n_nucleus, where=mask & body)


def _smooth(rng: np.random.Generator, radii: Float, nucleoli: float) -> Patch:
    """One smooth nucleus with outline `radii` (N_ANGLES,) px and up to three dark nucleoli of depth `nucleoli`."""
    distance, direction = polar()
    half = int(radii.max()) + 2
    grid = slice(REACH - half, REACH + half + 1)
    r = distance[grid, grid]
    outline = radii[direction[grid, grid]]
    light = np.clip(outline - r + 0.5, 0, 1) * (0.72 + 0.28 * np.sqrt(np.clip(1 - (r / outline) ** 2, 0, 1)))
    if nucleoli:
        spots = int(rng.integers(1, 4))
        axis = np.arange(-half, half + 1, dtype=np.float32)
        mean = float(radii.mean())
        at = rng.normal(0, 0.33 * mean, (2, spots, 1)).astype(np.float32)
        width = rng.uniform(0.09, 0.17, (spots, 1)).astype(np.float32) * mean
        down, right = np.exp(-0.5 * ((axis - at) / width) ** 2)
        light *= 1 - nucleoli * np.minimum(down.T @ right, 1)
    return Patch(light, r < outline, outline - r)


def _lobed(rng: np.random.Generator, radius: float) -> Patch:
    n = int(rng.integers(3, 7))
    at, size = _packed(rng, n, 1.12 * radius, float(rng.uniform(1, 1.25)), 0.98)
    return _discs(at, size, rng.uniform(0.85, 1.15, n), int(1.7 * radius) + 3, 1.2)


def _honeycomb(rng: np.random.Generator, radius: float) -> Patch:
    n = int(rng.integers(10, 46))
    at, size = _packed(rng, n, 1.08 * radius, float(rng.uniform(1, 1.35)), 0.96)
    return _discs(at, size, rng.uniform(0.7, 1.3, n), int(1.8 * radius) + 3, 1.5)


def _condensed(rng: np.random.Generator, form: str, half: int) -> Patch:
    """The chromatin of a rounded cell."""
    if form == "monopolar":  # a rosette of chromosome arms round one pole
        n = int(rng.integers(11, 17))
        turn = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
        at = np.stack([np.sin(turn), np.cos(turn)], 1) * rng.uniform(9.5, 13.5, (n, 1))
        return _discs(at, rng.uniform(3.6, 5.0, n), rng.uniform(1.5, 2.3, n), half, 1.5)
    if form == "mitotic":  # a plate, seen from the side
        length, width = float(rng.uniform(10, 15)), float(rng.uniform(3.4, 5))
        direction = rng.random() * np.pi
        step = np.linspace(-length, length, 9) + rng.normal(0, 0.5, 9)
        at = step[:, None] * np.array([np.sin(direction), np.cos(direction)]) + rng.normal(0, 0.8, (9, 2))
        return _discs(at, width * rng.uniform(0.8, 1.15, 9), rng.uniform(1.7, 2.3, 9), half, 1.5)
    low, high, bright = (7, 10, 2.3) if form == "pyknotic" else (12.5, 16, 1.9)
    outline = outlines(rng, np.array([0.1]), np.array([0.03]))[0] * np.float32(rng.uniform(low, high))
    ball = _smooth(rng, outline, 0.0)
    light, mask, deep = (np.pad(plane, half) for plane in (ball.light * np.float32(bright), ball.mask, ball.depth))
    cut = slice(len(mask) // 2 - half, len(mask) // 2 + half + 1)
    return Patch(light[cut, cut], mask[cut, cut], deep[cut, cut])


def _discs(centres: Real, radii: Real, light: Real, half: int, seam: float) -> Patch:
    """A nucleus made of discs (lobes, micronuclei, chromosome arms) with ONE filled, connected mask.

    centres (n, 2) px from the middle, radii and light (n,). Gaps narrower than 2 `seam` px belong to the mask.
    """
    axis = np.arange(-half, half + 1, dtype=np.float32)
    centres, radii, light = (a.astype(np.float32) for a in (centres, radii, light))
    down, right = (axis - centres[:, :1]) ** 2, (axis - centres[:, 1:]) ** 2
    depth = radii[:, None, None] - np.sqrt(down[:, :, None] + right[:, None, :])
    nearest = depth.argmax(0)
    inside = depth.max(0)
    dome = np.sqrt(np.clip(inside / radii[nearest], 0, 1))
    level = np.clip(inside + 0.5, 0, 1) * (0.6 + 0.4 * dome) * light[nearest]
    mask = ndimage.binary_fill_holes(inside > -seam)
    parts = connected(mask, connectivity=1)
    if parts.max() > 1:
        mask = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        # Out of the mask, out of the picture: a stray micronucleus would be a nucleus without a label.
        level *= mask
    return Patch(level, mask, inside + np.float32(seam))


def _packed(rng: np.random.Generator, n: int, radius: float, stretch: float, size: float) -> tuple[Real, Real]:
    """Centres (n, 2) and radii (n,) of n discs packed in an ellipse of mean radius `radius`: Vogel's spiral, shaken."""
    i = np.arange(n) + 0.5
    turn = i * 2.399963 + rng.random() * 2 * np.pi
    away = radius * (1 - 0.8 / np.sqrt(n)) * np.sqrt(i / n) + rng.normal(0, 0.05 * radius, n)
    at = np.stack([away * np.sin(turn) * stretch, away * np.cos(turn) / stretch], 1)
    c, s = np.cos(axis := rng.random() * np.pi), np.sin(axis)
    return at @ np.array([[c, s], [-s, c]]), size * radius / np.sqrt(n) * rng.uniform(0.72, 1.28, n)
