"""Cutting nuclei and cells out of a crop and putting them back changed: what the lesions are made of.

Light adds up in a fluorescence image. So a nucleus is the light above what the crop would show without it; it is taken
out by filling its place from its surroundings, and put back, moved or reshaped, by adding its light. Works on one crop
at a time, with masks that are known (exact ones of a phantom, or a segmenter's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage, signal

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

#: px beyond its mask to which a nucleus or cell still glows, and width of the soft seam.
GLOW, SEAM = 3, 1.0
#: px to which the faint halo of a nucleus reaches. What is left of it is a ring that segmenters take for a nucleus.
HALO = 8
#: px over which surroundings are averaged to fill a hole.
REACH = 8.0
#: A copy of a nucleus is never smaller than this, px of radius: the segmenters' own limit for debris.
LEAST_RADIUS = 5.0


class Crop(NamedTuple):
    """image: (C, H, W) float32 in [0, 1]; nuclei, cells: (H, W) int32, 0 = background."""

    image: Float
    nuclei: Int
    cells: Int


class Removed(NamedTuple):
    """plane: (H, W) DNA without the nuclei taken out; light: label -> (H, W) light of each, 0 elsewhere."""

    plane: Float
    light: dict[int, Float]


def labels_of(labels: Int) -> list[int]:
    """Labels that occur, in order."""
    return [int(label) for label in np.unique(labels) if label]


def touches_border(mask: Mask) -> bool:
    """Whether a pixel of the mask lies in the outermost row or column."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def whole_first(labels: Int) -> list[int]:
    """Labels, those that the border does not cut first, each kind from the crop's middle outwards."""
    middle = (np.array(labels.shape) - 1) / 2

    def key(label: int) -> tuple[bool, float]:
        mask = labels == label
        return touches_border(mask), float(np.hypot(*(np.argwhere(mask).mean(0) - middle)))

    return sorted(labels_of(labels), key=key)


def fill(plane: Float, hole: Mask, avoid: Mask, rng: np.random.Generator) -> Float:
    """(H, W) with `hole` filled by the mean of its surroundings outside `avoid`, as grainy as they are."""
    known = ~avoid
    if not known.any():
        whole: Float = np.where(hole, plane.min(), plane).astype(np.float32)
        return whole
    # Far from all that is known the level tends to the median, smoothly: a step would look like an object's edge.
    share = ndimage.gaussian_filter(known.astype(np.float32), REACH)
    near = ndimage.gaussian_filter(np.where(known, plane, 0).astype(np.float32), REACH)
    level = (near + 0.02 * np.median(plane[known])) / (share + 0.02)
    grain = plane - ndimage.gaussian_filter(plane, 1.5)
    rough = 1.4826 * float(np.median(np.abs(grain[known])))
    inside = _soft(hole)
    filled = level + rough * rng.standard_normal(plane.shape, dtype=np.float32)
    closed: Float = (plane * (1 - inside) + filled * inside).astype(np.float32)
    return closed


def take_out(crop: Crop, labels: Iterable[int], dna: int, rng: np.random.Generator) -> Removed:
    """Take nuclei out of the DNA channel; what they left behind, and the light of each."""
    labels = list(labels)
    plane = crop.image[dna]
    # Between two nuclei the light belongs to the nearer one.
    nearest = _nearest(crop.nuclei)
    haloes = grown(crop.nuclei > 0, HALO)
    hole = haloes & np.isin(nearest, labels)
    empty = fill(plane, hole, haloes, rng)
    surplus = np.maximum(plane - empty, 0)
    light = {label: surplus * _soft(haloes & (nearest == label)) for label in labels}
    return Removed(empty, light)


def put_back(
    canvas: Float, labels: Int, light: Float, mask: Mask, label: int, matrix: npt.NDArray[np.float64] | None = None,
    to: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Add a nucleus's light to `canvas` and its mask to `labels`, in place, reshaped and moved.

    matrix: (2, 2) acting on (y, x); None leaves the shape. to: new place (y, x) of the centroid; None scales about
    the `anchor` instead. Where nuclei overlap the light adds up and the pixel keeps the label that it had.
    """
    fixed = np.array(anchor(mask) if to is None else np.argwhere(mask).mean(0))
    target = fixed if to is None else np.array(to)
    canvas += warp(light, matrix, fixed, target)
    labels[(warp(mask.astype(np.float32), matrix, fixed, target) >= 0.5) & (labels == 0)] = label


def anchor(mask: Mask) -> tuple[float, float]:
    """The point about which an object is scaled: its centroid, moved to the border where the border cuts it.

    What lies beyond the border is unknown; scaled about the border, the cut edge stays there.
    """
    y, x = np.nonzero(mask)
    height, width = mask.shape
    place = [float(y.mean()), float(x.mean())]
    for axis, (at, last) in enumerate(((y, height - 1), (x, width - 1))):
        if at.min() == 0 and at.max() < last:
            place[axis] = 0.0
        elif at.max() == last and at.min() > 0:
            place[axis] = float(last)
    return place[0], place[1]


def warp(
    plane: Float,
    matrix: npt.NDArray[np.float64] | None,
    fixed: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
) -> Float:
    """(H, W) of p -> target + matrix (p - fixed), linear interpolation, 0 from outside."""
    inverse = np.eye(2) if matrix is None else np.linalg.inv(matrix)
    moved: Float = ndimage.affine_transform(plane, inverse, fixed - inverse @ target, order=1, output=np.float32)
    return moved


def way_out(nucleus: Mask, cells: Mask, others: Mask, outside: float) -> tuple[int, int]:
    """The shortest shift (dy, dx) in px that brings `outside` of a nucleus's pixels out of all cells.

    The nucleus stays in the frame and, where it can, off other nuclei. Where there is no such place: the shift that
    brings out the most.
    """
    y, x = np.nonzero(nucleus)
    height, width = nucleus.shape
    dy = np.arange(-y.min(), height - y.max())
    dx = np.arange(-x.min(), width - x.max())
    kernel = nucleus.astype(np.float32)

    def overlap(what: Mask) -> Float:
        full = signal.fftconvolve(what.astype(np.float32), kernel[::-1, ::-1])
        found: Float = full[np.ix_(dy + height - 1, dx + width - 1)] / kernel.sum()
        return found

    out = 1 - overlap(cells)
    free = overlap(others) < 0.05
    score = np.where(free, out, -1.0) if free.any() else out
    length = np.hypot(dy[:, None], dx[None, :])
    good = score >= min(outside, float(score.max())) - 1e-3
    place = np.unravel_index(np.argmin(np.where(good, length, np.inf)), length.shape)
    return int(dy[place[0]]), int(dx[place[1]])


def roomiest(free: Mask) -> tuple[int, int, float]:
    """Centre (y, x) and radius in px of the largest disc in `free` (border of the crop included)."""
    depth = ndimage.distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return int(y), int(x), float(depth[y, x])


def scale_cells(
    crop: Crop, labels: Iterable[int], factor: float, channels: Mapping[str, int], rng: np.random.Generator
) -> Crop:
    """Scale the area of cells by `factor` about their nuclei in every channel but DNA.

    Shrunken cells leave background behind and keep their nucleus inside; grown ones cover their neighbours.
    """
    chosen = list(labels)
    image, cells = crop.image.copy(), crop.cells.copy()
    planes = [index for role, index in channels.items() if role != "dna"]
    floor = {index: _background(crop.image[index], crop.cells > 0, rng) for index in planes}
    body = np.isin(crop.cells, chosen)
    for index in planes:
        inside = _soft(grown(body))
        image[index] = image[index] * (1 - inside) + floor[index] * inside
    cells[body] = 0
    for label in chosen:
        mask = crop.cells == label
        own = mask & (crop.nuclei > 0)
        fixed = np.array(np.argwhere(own).mean(0) if own.any() else anchor(mask))
        matrix = np.eye(2) * np.sqrt(factor)
        # The cytoplasm round the nucleus stays where it is: sizes change, containment does not.
        kept = mask & grown(own) if own.any() else own
        scaled = warp(mask.astype(np.float32), matrix, fixed, fixed) >= 0.5
        alpha = warp(_soft(mask), matrix, fixed, fixed)
        for index in planes:
            light = crop.image[index] - floor[index]
            moved = floor[index] + warp((light * mask).astype(np.float32), matrix, fixed, fixed)
            moved = np.where(kept & ~scaled, crop.image[index], moved)
            over = np.maximum(alpha, _soft(kept)) if own.any() else alpha
            image[index] = image[index] * (1 - over) + moved * over
        cells[(scaled | kept) & ((cells == 0) | (factor > 1))] = label
    return Crop(image.clip(0, 1), crop.nuclei, cells)


def erase_cells(crop: Crop, labels: Iterable[int], channels: Mapping[str, int], rng: np.random.Generator) -> Crop:
    """Background in place of cells, in every channel but DNA: their nuclei stay and lie bare."""
    gone = np.isin(crop.cells, list(labels))
    image = crop.image.copy()
    # What glows beyond a cell goes with it, but not what belongs to a neighbour.
    inside = _soft(gone | (grown(gone) & (crop.cells == 0)))
    for role, index in channels.items():
        if role != "dna":
            floor = _background(crop.image[index], crop.cells > 0, rng)
            image[index] = image[index] * (1 - inside) + floor * inside
    return Crop(image.clip(0, 1), crop.nuclei, np.where(gone, 0, crop.cells).astype(np.int32))


def _background(plane: Float, inside: Mask, rng: np.random.Generator) -> Float:
    """A plane of background: the median of what is no cell, or the darkest percentile of a crop that is full."""
    beyond = ~grown(inside)
    dark = plane[beyond] if beyond.sum() >= 64 else plane[plane <= np.quantile(plane, 0.02)]
    noise = rng.standard_normal(plane.shape, dtype=np.float32)
    floor: Float = (np.median(dark) + min(float(dark.std()), 0.02) * noise).astype(np.float32)
    return floor


def grown(mask: Mask, by: int = GLOW) -> Mask:
    """The mask and what glows around it, to `by` px."""
    wider: Mask = ndimage.binary_dilation(mask, iterations=by)
    return wider


def _soft(mask: Mask) -> Float:
    """1 inside the mask, falling to 0 over a pixel or two."""
    soft: Float = ndimage.gaussian_filter(mask.astype(np.float32), SEAM)
    return np.where(mask, 1, soft).astype(np.float32)


def _nearest(labels: Int) -> Int:
    where = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    nearest: Int = labels[tuple(where)]
    return nearest
