"""Controlled damage to cell images: each lesion breaks one thing, by a known dose.

A verifier is believed when it answers to the damage that it owns, more to more of it, and not to other damage. The
masks that come back say what the crop now truly shows, so the truth of a lesion can be measured without a segmenter.

    harmed = apply("erase_nuclei", images, masks, dose=0.5, channels=assay.channels)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from biorewards.audit.surgery import (
    LEAST_RADIUS,
    Crop,
    Float,
    erase_cells,
    grown,
    labels_of,
    put_back,
    roomiest,
    scale_cells,
    take_out,
    way_out,
    whole_first,
)
from biorewards.segmentation.segmenter import Masks


class Lesioned(NamedTuple):
    """images: (B, C, H, W) float32 in [0, 1]; masks: what they now show, (B, H, W) int32 each."""

    images: Tensor
    masks: Masks


#: crop, dose, channel of each role, random numbers, crop of another class -> crop
Harm = Callable[[Crop, float, Mapping[str, int], np.random.Generator, Float | None], Crop]


@dataclass(frozen=True)
class Lesion:
    """One kind of damage.

    harm: damages one crop. The same random numbers come at every dose, so a higher one damages what a lower one did.
    doses: from little to much; in `unit`. owner: the reward that must answer to it; None for a nuisance, which no
        reward should answer to. needs_other: wants a crop of another class.
    """

    harm: Harm
    doses: tuple[float, ...]
    unit: str
    owner: str | None = None
    needs_other: bool = False


def apply(
    name: str, images: Tensor, masks: Masks, dose: float, *, channels: Mapping[str, int], seed: int = 0, first: int = 0,
    others: Tensor | None = None,
) -> Lesioned:  # fmt: skip
    """Damage a batch.

    images: (B, C, H, W) float32 in [0, 1]. masks: their nuclei and cells, exact or a segmenter's. channels: role ->
    index. first: number of the batch's first image in the whole set, so that results do not depend on batches.
    others: (B, C, H, W), crops of another class, for the lesions that need them.

    Raises ValueError for an unknown lesion, and where `others` or a channel is missing.
    """
    if name not in LESIONS:
        raise ValueError(f"no lesion {name!r}; there are {', '.join(LESIONS)}")
    lesion = LESIONS[name]
    if lesion.needs_other and others is None:
        raise ValueError(f"lesion {name!r} mixes in crops of another class; pass them as others")
    done = []
    for i in range(len(images)):
        crop = Crop(images[i].cpu().numpy().copy(), *(m[i].cpu().numpy().astype(np.int32) for m in masks))
        other = None if others is None else others[i].cpu().numpy()
        done.append(lesion.harm(crop, dose, channels, np.random.default_rng([seed, first + i]), other))
    pixels, nuclei, cells = (torch.from_numpy(np.stack(part)).to(images.device) for part in zip(*done, strict=True))
    return Lesioned(pixels.float().clamp(0, 1), Masks(nuclei.int(), cells.int()))


def _dna(channels: Mapping[str, int]) -> int:
    if "dna" not in channels:
        raise ValueError(f"lesions of nuclei need a dna channel; there are {', '.join(channels)}")
    return channels["dna"]


def _with_plane(crop: Crop, plane: Float, index: int, nuclei: npt.NDArray[np.int32] | None = None) -> Crop:
    image = crop.image.copy()
    image[index] = plane
    return Crop(image.clip(0, 1), crop.nuclei if nuclei is None else nuclei.astype(np.int32), crop.cells)


def erase_nuclei(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Fill a share of the nuclei with their surroundings. Which and how many is drawn once for all doses."""
    dna, labels = _dna(channels), labels_of(crop.nuclei)
    order, rest = rng.permutation(labels), rng.random()
    gone = order[: int(np.floor(dose * len(labels) + rest * (dose < 1)))]
    removed = take_out(crop, [int(label) for label in gone], dna, rng)
    return _with_plane(crop, removed.plane, dna, np.where(np.isin(crop.nuclei, gone), 0, crop.nuclei).astype(np.int32))


def duplicate_nuclei(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Add `dose` copies of a nucleus where cells have most room, smaller where there is little; none without room."""
    dna, labels = _dna(channels), whole_first(crop.nuclei)
    if not labels:
        return crop
    source = crop.nuclei == labels[0]
    light = take_out(crop, [labels[0]], dna, rng).light[labels[0]]
    plane, nuclei = crop.image[dna].copy(), crop.nuclei.copy()
    radius = float(np.sqrt(source.sum() / np.pi))
    for label in range(int(nuclei.max()) + 1, int(nuclei.max()) + 1 + round(dose)):
        y, x, room = roomiest((crop.cells > 0) & ~grown(nuclei > 0))
        if room < LEAST_RADIUS + 1:
            break
        size = np.eye(2) * min(1.0, (room - 1) / (1.25 * radius))
        put_back(plane, nuclei, light, source, label, size, to=(y, x))
    return _with_plane(crop, plane, dna, nuclei)


def move_nucleus_out(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Move the central nucleus so that `dose` of it lies outside all cells, or as much as the crop has room for."""
    dna, labels = _dna(channels), whole_first(crop.nuclei)
    if not labels:
        return crop
    label = labels[0]
    own = crop.nuclei == label
    shift = way_out(own, crop.cells > 0, (crop.nuclei > 0) & ~own, dose)
    removed = take_out(crop, [label], dna, rng)
    plane, nuclei = removed.plane.copy(), np.where(own, 0, crop.nuclei).astype(np.int32)
    y, x = np.argwhere(own).mean(0) + shift
    put_back(plane, nuclei, removed.light[label], own, label, to=(float(y), float(x)))
    return _with_plane(crop, plane, dna, nuclei)


def scale_nuclei(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Multiply the area of every nucleus by `dose`."""
    return _reshaped(crop, channels, rng, lambda: np.eye(2) * np.sqrt(dose))


def stretch_nuclei(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Stretch every nucleus to length / width = `dose` times what it was, area unchanged, in a random direction."""

    def matrix() -> npt.NDArray[np.float64]:
        angle = rng.random() * np.pi
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        wide: npt.NDArray[np.float64] = turn @ np.diag([np.sqrt(dose), 1 / np.sqrt(dose)]) @ turn.T
        return wide

    return _reshaped(crop, channels, rng, matrix)


def _reshaped(
    crop: Crop, channels: Mapping[str, int], rng: np.random.Generator, matrix: Callable[[], npt.NDArray[np.float64]]
) -> Crop:
    dna, labels = _dna(channels), labels_of(crop.nuclei)
    matrices = {label: matrix() for label in labels}
    removed = take_out(crop, labels, dna, rng)
    plane, nuclei = removed.plane.copy(), np.zeros_like(crop.nuclei)
    for label in labels:
        put_back(plane, nuclei, removed.light[label], crop.nuclei == label, label, matrices[label])
    return _with_plane(crop, plane, dna, nuclei)


def shrink_cells(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Multiply the area of every cell by `dose` < 1, about its nucleus, which stays inside."""
    return scale_cells(crop, labels_of(crop.cells), dose, channels, rng)


def grow_cell(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Multiply the area of the largest cell by `dose` > 1; it covers its neighbours."""
    sizes = np.bincount(crop.cells.ravel())
    return crop if len(sizes) < 2 else scale_cells(crop, [1 + int(sizes[1:].argmax())], dose, channels, rng)


def erase_cytoplasm(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Take the cytoplasm of a share of the cells away and leave their nuclei; which and how many is drawn once."""
    labels = labels_of(crop.cells)
    order, rest = rng.permutation(labels), rng.random()
    gone = order[: int(np.floor(dose * len(labels) + rest * (dose < 1)))]
    return erase_cells(crop, [int(label) for label in gone], channels, rng)


def swap(first: str, second: str) -> Harm:
    """Two channels leak into each other: `dose` of either, up to a full exchange at 1."""

    def harm(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
        if missing := {first, second} - set(channels):
            raise ValueError(f"no channel {', '.join(sorted(missing))} to swap; there are {', '.join(channels)}")
        image = crop.image.copy()
        a, b = channels[first], channels[second]
        image[a] = (1 - dose) * crop.image[a] + dose * crop.image[b]
        image[b] = (1 - dose) * crop.image[b] + dose * crop.image[a]
        return crop._replace(image=image)

    return harm


def blend(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, other: Float | None) -> Crop:
    """(1 - dose) of the crop and `dose` of a crop of another class; the masks stay the crop's own."""
    if other is None:
        raise ValueError("blending wants a crop of another class")
    return crop._replace(image=(1 - dose) * crop.image + dose * other)


def gain(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """All channels times `dose`."""
    return crop._replace(image=(crop.image * dose).clip(0, 1))


def noise(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """White noise of standard deviation `dose`."""
    grain = rng.standard_normal(crop.image.shape, dtype=np.float32)
    return crop._replace(image=(crop.image + np.float32(dose) * grain).clip(0, 1))


def blur(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Gaussian of `dose` px in every channel."""
    return crop._replace(image=ndimage.gaussian_filter(crop.image, (0, dose, dose)))


def quantise(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """2^dose grey levels; 8 is an 8-bit file."""
    top = 2 ** round(dose) - 1
    return crop._replace(image=np.asarray(np.round(crop.image * top) / top, dtype=np.float32))


def jpeg(crop: Crop, dose: float, channels: Mapping[str, int], rng: np.random.Generator, _: object) -> Crop:
    """Every channel through an 8-bit JPEG of quality `dose`."""
    planes = []
    for plane in crop.image:
        stream = io.BytesIO()
        Image.fromarray((plane * 255).round().astype(np.uint8)).save(stream, "JPEG", quality=round(dose))
        planes.append(np.asarray(Image.open(stream, formats=["JPEG"]), np.float32) / 255)
    return crop._replace(image=np.stack(planes))


_SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
#: Damage, with the reward that owns it.
LESIONS: dict[str, Lesion] = {
    "erase_nuclei": Lesion(erase_nuclei, _SHARES, "share of nuclei", "nucleus_count"),
    "duplicate_nuclei": Lesion(duplicate_nuclei, (1, 2, 3, 4, 5, 6), "copies", "nucleus_count"),
    "move_nucleus_out": Lesion(move_nucleus_out, _SHARES, "share outside", "nucleus_in_cytoplasm"),
    "shrink_nuclei": Lesion(scale_nuclei, (0.9, 0.8, 0.65, 0.5, 0.4, 0.3), "times area", "nucleus_size"),
    "grow_nuclei": Lesion(scale_nuclei, (1.1, 1.25, 1.5, 1.8, 2.2, 2.7), "times area", "nucleus_size"),
    "shrink_cells": Lesion(shrink_cells, (0.9, 0.8, 0.65, 0.5, 0.4, 0.3), "times area", "cytoplasm_size"),
    "grow_cell": Lesion(grow_cell, (1.05, 1.1, 1.2, 1.35, 1.5, 1.75), "times area", "cytoplasm_size"),
    "erase_cytoplasm": Lesion(erase_cytoplasm, _SHARES, "share of cells", "cytoplasm_count"),
    "stretch_nuclei": Lesion(stretch_nuclei, (1.2, 1.4, 1.7, 2.0, 2.5, 3.0), "length / width", "nucleus_roundness"),
    "swap_cytoplasm": Lesion(swap("actin", "tubulin"), _SHARES, "share exchanged", "moa"),
    "swap_dna": Lesion(swap("dna", "actin"), _SHARES, "share exchanged", "moa"),
    "blend": Lesion(blend, _SHARES, "share of another class", "moa", needs_other=True),
    "gain_up": Lesion(gain, (1.05, 1.1, 1.2, 1.35, 1.5, 1.75), "times"),
    "gain_down": Lesion(gain, (0.95, 0.9, 0.8, 0.7, 0.6, 0.5), "times"),
    "noise": Lesion(noise, (0.005, 0.01, 0.02, 0.04, 0.07, 0.1), "sd, of full range"),
    "blur": Lesion(blur, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0), "px"),
    "8-bit": Lesion(quantise, (8, 7, 6, 5, 4, 3), "bits"),
    "jpeg": Lesion(jpeg, (95, 90, 75, 50, 30, 15), "quality"),
}
