"""Training images for the bundled segmenter: real masks, real nuclei with drawn bodies, composites, phantoms, noise.

Every source yields `Sample`s at one scale (median nucleus `DIAMETER` px; phantoms at their own, 35 px). A sample knows
what it does not know: weights are zero where an annotation is missing (cells cut at the field's edge, bright unlabelled
areas).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage import filters, io, measure, segmentation, transform

from biorewards.phantom import CLASSES, render_field

#: Scale of the stored training images, px across a median nucleus; augmentation scales from here.
DIAMETER = 24.0
#: A cell body without a visible nucleus (MEF, actin only) is brought to this diameter.
BODY_DIAMETER = 48.0


@dataclass
class Sample:
    """image (3, H, W) float32, actin, tubulin, DNA, 0 background and 1 bright; labels (H, W) int32; weights (H, W)."""

    kind: str
    image: np.ndarray
    nuclei: np.ndarray
    cells: np.ndarray
    nucleus_weight: np.ndarray
    cell_weight: np.ndarray
    diameter: float = DIAMETER


def stretch(channel: np.ndarray) -> np.ndarray:
    """Percentiles 1 and 99.8 to 0 and 1, as `percentile_range` does at inference; a constant channel becomes 0."""
    low, high = np.percentile(channel, [1, 99.8])
    return ((channel - low) / (high - low)).astype(np.float32) if high > low else np.zeros(channel.shape, np.float32)


def median_diameter(labels: np.ndarray) -> float:
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    return float(np.sqrt(4 * np.median(areas) / np.pi)) if len(areas) else DIAMETER


def rescale(image: np.ndarray, labels: list[np.ndarray], factor: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Resize (C, H, W) and its label images; enlarging beyond 3 adds no detail, so it stops there."""
    factor = min(factor, 3.0)
    size = tuple(max(16, round(s * factor)) for s in image.shape[-2:])
    resized = np.stack([transform.resize(c, size, order=1, anti_aliasing=factor < 1) for c in image]).astype(np.float32)
    nearest = [
        transform.resize(x, size, order=0, preserve_range=True, anti_aliasing=False).astype(np.int32) for x in labels
    ]
    return resized, nearest


def dsb2018(data: Path, split: str) -> Iterator[Sample]:
    """Nuclei of many kinds (CC0)."""
    table = pd.read_csv(data / "dsb2018" / "images.csv")
    for name in table.file[table.split == split]:
        dna = stretch(io.imread(data / "dsb2018" / "images" / name).astype(np.float32))
        yield nuclei_only("dsb2018", dna, io.imread(data / "dsb2018" / "labels" / name).astype(np.int32))


def mnfinder(data: Path, split: str) -> Iterator[Sample]:
    """Nuclei and micronuclei (MIT). A micronucleus is not a nucleus: background, at half weight."""
    table = pd.read_csv(data / "mnfinder" / "images.csv")
    for name in table.file[table.split == split]:
        dna = stretch(io.imread(data / "mnfinder" / "images" / name).astype(np.float32))
        nuclei = io.imread(data / "mnfinder" / "nuclei" / name).astype(np.int32)
        micro = io.imread(data / "mnfinder" / "micronuclei" / name).astype(np.int32)
        yield nuclei_only("mnfinder", dna, nuclei, (micro > 0) & (nuclei == 0))


def nuclei_only(kind: str, dna: np.ndarray, nuclei: np.ndarray, doubtful: np.ndarray | None = None) -> Sample:
    half = np.zeros(dna.shape, np.int32) if doubtful is None else doubtful.astype(np.int32)
    (image, (nuclei, half)) = rescale(dna[None], [nuclei, half], DIAMETER / median_diameter(nuclei))
    empty = np.zeros_like(image[0])
    weight = np.where(half > 0, 0.5, 1.0).astype(np.float32)
    return Sample(kind, np.stack([empty, empty, image[0]]), nuclei, np.zeros_like(nuclei), weight, empty)


def cell_bodies(data: Path, split: str) -> Iterator[Sample]:
    """JUMP U2OS and paediatric tiles (BSD-3), MEFs (actin only): CellProfiler's own masks, incomplete."""
    table = pd.read_csv(data / "cell_bodies" / "images.csv")
    for row in table[table.split == split].itertuples():
        raw = io.imread(data / "cell_bodies" / "images" / row.file).astype(np.float32)
        cells = io.imread(data / "cell_bodies" / "cells" / row.file).astype(np.int32)
        if raw.ndim == 2:
            image = np.stack([stretch(raw), np.zeros_like(raw), np.zeros_like(raw)])
            nuclei, factor = np.zeros_like(cells), BODY_DIAMETER / median_diameter(cells)
        else:
            image = np.stack([stretch(raw[..., 1]), stretch(raw[..., 2]), stretch(raw[..., 0])])
            nuclei = io.imread(data / "cell_bodies" / "nuclei" / row.file).astype(np.int32)
            factor = DIAMETER / median_diameter(nuclei)
        image, (nuclei, cells) = rescale(image, [nuclei, cells], factor)
        kind = {"vampire_mef": "mef", "jump_u2os": "jump", "pediatric": "pediatric"}[row.set]
        # Labels are incomplete: what is bright and unlabelled is unknown, not background.
        evidence = ndimage.gaussian_filter(image[:2].max(0), 1)
        unknown = (cells == 0) & (evidence > 0.6 * filters.threshold_otsu(evidence))
        dark = (
            (nuclei == 0) & (image[2] > 0.5 * filters.threshold_otsu(image[2]))
            if nuclei.any()
            else np.ones(cells.shape, bool)
        )
        yield Sample(kind, image, nuclei, cells, (~dark).astype(np.float32), (~unknown).astype(np.float32))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float | tuple[float, float]) -> np.ndarray:
    """Gaussian random field with unit standard deviation."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return field / (field.std() + 1e-9)


def filaments(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Thin fibres in a few random directions, in [0, 1]."""
    total = np.zeros(shape)
    for _ in range(int(rng.integers(1, 4))):
        side = int(1.5 * max(shape)) + 1
        fibres = ndimage.gaussian_filter(rng.standard_normal((side, side)), (rng.uniform(0.5, 1.0), rng.uniform(5, 14)))
        fibres = ndimage.rotate(fibres, rng.uniform(0, 180), reshape=False, order=1)
        y, x = (side - shape[0]) // 2, (side - shape[1]) // 2
        total += np.clip(fibres[y : y + shape[0], x : x + shape[1]] / (fibres.std() + 1e-9), 0, 4)
    return total / (total.max() + 1e-9)


def draw_bodies(rng: np.random.Generator, sample: Sample) -> Sample:
    """Grow cells round real nuclei: irregular, touching or apart, with textures; one nucleus in twelve stays bare."""
    nuclei = sample.nuclei
    shape = nuclei.shape
    distance, (iy, ix) = ndimage.distance_transform_edt(nuclei == 0, return_indices=True)
    owner = nuclei[iy, ix]
    n = int(nuclei.max()) + 1
    # Displace the distance map by a smooth random field, so that outlines are irregular.
    amplitude = rng.uniform(1, 7)
    yy, xx = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    at = [
        yy + amplitude * smooth_noise(rng, shape, rng.uniform(4, 10)),
        xx + amplitude * smooth_noise(rng, shape, rng.uniform(4, 10)),
    ]
    owner = ndimage.map_coordinates(owner, at, order=0, mode="nearest")
    distance = ndimage.map_coordinates(distance, at, order=1, mode="nearest")
    reach = DIAMETER * rng.uniform(0.15, 1.1) * rng.lognormal(0, 0.35, n)
    bare = rng.random(n) < 1 / 12
    reach[bare] = -1
    cells = np.where(distance <= reach[owner], owner, 0)
    cells = np.where((nuclei > 0) & ~bare[nuclei], nuclei, cells)
    cells = np.where(bare[nuclei] & (nuclei > 0), 0, cells)
    pieces = measure.label(cells + 1, connectivity=1) * (cells > 0)
    keep = np.zeros(int(pieces.max()) + 1, bool)
    keep[np.unique(pieces[(nuclei > 0) & (nuclei == cells)])] = True
    cells = np.where(keep[pieces] & (pieces > 0), cells, 0).astype(np.int32)

    inner = ndimage.distance_transform_edt(cells > 0)
    border = segmentation.find_boundaries(cells, mode="inner")
    edge = ndimage.gaussian_filter(border.astype(float), rng.uniform(0.6, 1.2))
    channels = []
    for _ in range(2):
        level = rng.lognormal(0, rng.uniform(0.1, 0.5), n)[cells] * (cells > 0)
        falloff = np.exp(-np.maximum(distance, 0) / (DIAMETER * rng.uniform(0.3, 3)))
        ramp = np.clip(inner / rng.uniform(1, 5), 0.15, 1)
        texture = (
            1
            + rng.uniform(0.05, 0.4) * smooth_noise(rng, shape, rng.uniform(0.6, 2.5))
            + rng.uniform(0, 1.6) * filaments(rng, shape)
        )
        body = level * falloff * ramp * np.clip(texture, 0.05, None)
        body = (
            body * np.where(nuclei > 0, rng.uniform(0.2, 1.05), 1)
            + rng.choice([0, rng.uniform(0.1, 1.0)]) * edge * level
        )
        body = ndimage.gaussian_filter(body, rng.uniform(0.4, 1.4))
        haze = rng.uniform(0, 0.25) * ndimage.gaussian_filter(body, DIAMETER * rng.uniform(0.4, 1))
        scale = np.percentile(body[cells > 0], 95) if (cells > 0).any() else 1.0
        shot = body / scale + haze / scale + rng.uniform(0.0, 0.08)
        channels.append(
            shot
            + rng.normal(0, 1, shape) * np.sqrt(np.clip(shot, 0, None)) * rng.uniform(0.005, 0.1)
            + rng.normal(0, rng.uniform(0.003, 0.03), shape)
        )
    image = np.stack([stretch(channels[0]), stretch(channels[1]), sample.image[2]])
    return Sample("drawn", image, nuclei, cells, sample.nucleus_weight, np.ones(shape, np.float32))


def composite(rng: np.random.Generator, donors: list[Sample], size: int = 160) -> Sample:
    """Real nuclei, cut out and laid down again touching and overlapping, with additive brightness.

    Two nuclei that overlap in projection add their light; the overlap is parted half-way between their outlines, as
    in the phantom.
    """
    donor = donors[int(rng.integers(len(donors)))]
    dna = donor.image[2]
    background = float(np.median(dna[donor.nuclei == 0])) if (donor.nuclei == 0).any() else 0.0
    boxes = [
        (i + 1, box)
        for i, box in enumerate(ndimage.find_objects(donor.nuclei))
        if box is not None
        and box[0].start > 0
        and box[1].start > 0
        and box[0].stop < dna.shape[0]
        and box[1].stop < dna.shape[1]
    ]
    boxes = [(i, b) for i, b in boxes if (donor.nuclei[b] == i).sum() > 60]
    canvas, labels, depth = np.zeros((size, size)), np.zeros((size, size), np.int32), np.zeros((size, size))
    if not boxes:
        return Sample(
            "composite",
            np.zeros((3, size, size), np.float32),
            labels,
            labels,
            np.ones((size, size), np.float32),
            np.zeros((size, size), np.float32),
        )
    anchors: list[tuple[float, float, float]] = []
    gap = rng.uniform(0.55, 1.25)
    for label in range(1, int(rng.integers(4, 34))):
        i, (sy, sx) = boxes[int(rng.integers(len(boxes)))]
        pad = 3
        box = (slice(max(sy.start - pad, 0), sy.stop + pad), slice(max(sx.start - pad, 0), sx.stop + pad))
        mask = (donor.nuclei[box] == i).astype(float)
        soft = ndimage.gaussian_filter(ndimage.binary_dilation(mask > 0, iterations=1).astype(float), 0.7)
        light = np.clip(dna[box] - background, 0, None) * np.where((donor.nuclei[box] > 0) & (mask == 0), 0, soft)
        angle = rng.uniform(0, 360)
        light = np.clip(ndimage.rotate(light, angle, order=1), 0, None) * rng.uniform(0.5, 1.4)
        mask = ndimage.rotate(mask, angle, order=1) > 0.5
        if mask.sum() < 30:
            continue
        radius = float(np.sqrt(mask.sum() / np.pi))
        if anchors and rng.random() < 0.7:
            y, x, r = anchors[int(rng.integers(len(anchors)))]
            theta, reach = rng.uniform(0, 2 * np.pi), gap * rng.uniform(0.8, 1.2) * (r + radius)
            y, x = y + reach * np.sin(theta), x + reach * np.cos(theta)
        else:
            y, x = rng.uniform(0, size, 2)
        # Closer than 0.5 of the summed radii nobody could tell two from one.
        if any(np.hypot(y - a, x - b) < 0.5 * (radius + r) for a, b, r in anchors):
            continue
        y0, x0 = int(y - mask.shape[0] / 2), int(x - mask.shape[1] / 2)
        ys, xs = slice(max(y0, 0), min(y0 + mask.shape[0], size)), slice(max(x0, 0), min(x0 + mask.shape[1], size))
        if ys.stop <= ys.start or xs.stop <= xs.start:
            continue
        part = (slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0))
        canvas[ys, xs] += light[part]
        deep = ndimage.distance_transform_edt(mask)[part]
        mine = deep > depth[ys, xs]
        labels[ys, xs][mine] = label
        depth[ys, xs][mine] = deep[mine]
        anchors.append((y, x, radius))
    canvas = ndimage.gaussian_filter(canvas, rng.uniform(0.2, 0.8))
    canvas += rng.uniform(0, 0.2) * ndimage.gaussian_filter(canvas, DIAMETER / 2) + rng.normal(
        0, rng.uniform(0.003, 0.03), canvas.shape
    )
    labels = drop_slivers(labels)
    empty = np.zeros((size, size), np.float32)
    return Sample(
        "composite",
        np.stack([empty, empty, stretch(canvas)]),
        labels,
        np.zeros_like(labels),
        np.ones_like(empty),
        empty,
    )


def drop_slivers(labels: np.ndarray) -> np.ndarray:
    """Keep each label's largest piece; pieces under 30 px go."""
    pieces = measure.label(labels, connectivity=1)
    areas = np.bincount(pieces.ravel())
    areas[0] = 0
    best: dict[int, int] = {}
    for region in measure.regionprops(pieces):
        owner = int(labels[tuple(region.coords[0])])
        if region.area >= 30 and (owner not in best or region.area > areas[best[owner]]):
            best[owner] = region.label
    return np.where(np.isin(pieces, list(best.values())), labels, 0).astype(np.int32)


def phantoms(seed: int, n: int, size: int = 256) -> Iterator[Sample]:
    """Drawn fields with exact masks at their own resolution: what the outline head learns fine outlines from."""
    names = list(CLASSES)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        # The assay's own look in every second field; the rest from lonely to crowded cells.
        wild = (
            {}
            if i % 2
            else {
                "spread": float(rng.uniform(0.6, 1.6)),
                "density": float(rng.uniform(0.6, 3.5)),
                "strength": float(rng.uniform(0.5, 1.5)),
            }
        )
        image, nuclei, cells = render_field(rng, (size, size), names[(i // 2) % len(names)], **wild)
        planes = np.stack([stretch(image[..., c].astype(np.float32)) for c in range(3)])
        one = np.ones(nuclei.shape, np.float32)
        yield Sample("phantom", planes, nuclei, cells, one, one, 35.0)


def noise(rng: np.random.Generator, size: int = 160) -> Sample:
    """Nothing but noise, stretched as any image would be: no nucleus and no cell in it."""
    image = []
    for _ in range(3):
        field = rng.standard_normal((size, size)) if rng.random() < 0.5 else rng.random((size, size))
        if rng.random() < 0.6:
            field = ndimage.gaussian_filter(field, rng.uniform(0.3, 1.3))
        if rng.random() < 0.3:
            field = field + field.std() * rng.uniform(0, 3) * smooth_noise(rng, (size, size), rng.uniform(20, 60))
        plane = stretch(field) * rng.uniform(0.2, 1.2) + rng.uniform(-0.1, 0.5)
        image.append(plane if rng.random() < 0.85 else np.full((size, size), rng.uniform(0, 1)))
    one, zero = np.ones((size, size), np.float32), np.zeros((size, size), np.int32)
    return Sample("noise", np.stack(image).astype(np.float32), zero, zero, one, one)
