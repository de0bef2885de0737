"""Classical segmentation, a second opinion that shares nothing with the networks: Otsu, distances, watershed.

Works image by image with scikit-image. It is not the fast path: use it to see whether a score depends on the
networks.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import feature, filters, measure, morphology, segmentation
from torch import Tensor

from biorewards.segmentation.segmenter import Masks

Image = NDArray[np.float32]
Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]

#: Least difference of mean brightness between objects and background, in normalised units (5 of 255 grey levels).
LEAST_CONTRAST = 0.02
#: Least contrast in units of the roughness at a tenth of the diameter (`_roughness`). Nuclei (square root): white
#: noise has up to 2.3, noise blurred over 9 px up to 8.1; 74 real images and 123 real crops have 10 and more. Cells
#: (logarithm): noise blurred over up to 5 px has up to 2.2; 135 real crops and tiles have 2.9 (confluent) and more.
LEAST_SIGNAL_NUCLEUS, LEAST_SIGNAL_CELL = 8.5, 2.5


class ClassicalSegmenter:
    """Smoothing, Otsu threshold, distance transform and watershed behind the `Segmenter` protocol.

    Nuclei: bright against background, parted at the waists of the distance transform. Cells: log-Otsu of the mean
    cytoplasm channel, one cell round each nucleus that lies in it, and by their own distance transform where there is
    none. An image in which nothing stands out from noise has no objects.
    """

    name = "classical"

    @property
    def fingerprint(self) -> str:
        """Hash of this module's source: there are no weights, the code is the setting."""
        return f"classical-{hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:12]}"

    def to(self, device: torch.device | str) -> ClassicalSegmenter:
        """Nothing to move: images are brought to the CPU one by one."""
        return self

    def __call__(self, nucleus: Tensor | None, cytoplasm: Tensor | None, diameter: float) -> Masks:
        """See `Segmenter`. Raises ValueError when both channels are None."""
        given = nucleus if nucleus is not None else cytoplasm
        if given is None:
            raise ValueError("give a nucleus channel, a cytoplasm channel or both")
        nuclei = np.zeros((len(given), *given.shape[-2:]), np.int32)
        cells = np.zeros_like(nuclei)
        if nucleus is not None:
            for i, image in enumerate(nucleus.float().cpu().numpy()):
                nuclei[i] = _nuclei(image, diameter)
        if cytoplasm is not None:
            # Without nuclei the diameter is the cells' own; with them a cell is about twice as wide.
            width = diameter if nucleus is None else 2 * diameter
            for i, body in enumerate(cytoplasm.float().mean(1).cpu().numpy()):
                cells[i] = _cells(body, nuclei[i], width)
        return Masks(*(torch.from_numpy(labels).to(given.device) for labels in (nuclei, cells)))


def _nuclei(image: Image, diameter: float) -> Labels:
    smooth = filters.gaussian(image, max(0.5, diameter / 20))
    # The square root brings dim nuclei beside bright ones above the threshold.
    mask = _foreground(image, np.sqrt(smooth.clip(0)), diameter, LEAST_SIGNAL_NUCLEUS)
    if mask is None:
        return np.zeros(image.shape, np.int32)
    mask = _clean(mask, diameter)
    return _sized(_parted(mask, diameter), diameter)


def _cells(image: Image, nuclei: Labels, diameter: float) -> Labels:
    smooth = filters.gaussian(image, max(0.5, diameter / 40))
    # Bodies are many times brighter than their thin edges; the logarithm brings the edges above the threshold.
    floor = LEAST_CONTRAST + max(0.0, -float(smooth.min()))
    mask = _foreground(image, np.log(smooth + floor), diameter, LEAST_SIGNAL_CELL)
    if mask is None:
        return np.zeros(image.shape, np.int32)
    mask = _clean(mask, diameter)
    seeds = np.where(mask, nuclei, 0)
    bare = measure.label(mask)
    bare = np.where(np.isin(bare, np.unique(bare[seeds > 0])), 0, bare)
    own = _parted(bare > 0, diameter)
    seeds = np.where(own > 0, own + nuclei.max(), seeds)
    # Borders run along the dark valleys between bodies, and midway between nuclei where there is none.
    away = ndimage.distance_transform_edt(seeds == 0) / diameter
    labels = segmentation.watershed(away - smooth / max(float(smooth.max()), LEAST_CONTRAST), seeds, mask=mask)
    return _sized(labels, diameter)


def _foreground(image: Image, values: Image, diameter: float, least_signal: float) -> Mask | None:
    """Pixels above the Otsu threshold of `values`, or None when they do not stand out in them or in the image."""
    if not np.ptp(values) > 0:
        return None
    mask: Mask = values > filters.threshold_otsu(values)
    contrast = values[mask].mean() - values[~mask].mean()
    bright = image[mask].mean() - image[~mask].mean() > LEAST_CONTRAST
    return mask if bright and contrast > least_signal * _roughness(values, max(1, round(diameter / 10))) else None


def _roughness(values: Image, lag: int) -> float:
    """What the standard deviation would be if pixels `lag` apart were independent.

    From second differences, which slopes do not enter (their standard deviation is sqrt(6) times that of
    independent pixels), by the median of absolute values, which edges do not enter (0.6745 standard deviations).
    """
    found = 0.0
    for line in (values, values.T):
        if len(line) > 2 * lag:
            second = line[2 * lag :] - 2 * line[lag:-lag] + line[: -2 * lag]
            found = max(found, float(np.median(np.abs(second))) / 0.6745 / math.sqrt(6))
    return found


def _clean(mask: Mask, diameter: float) -> Mask:
    """Without specks and pinholes: parts narrower than a tenth of the diameter, holes under a tenth of the area."""
    mask = ndimage.binary_opening(mask, morphology.disk(max(1, round(diameter / 20))))
    filled: Mask = morphology.remove_small_holes(mask, max_size=int(_area(diameter) / 10))
    return filled


def _parted(mask: Mask, diameter: float) -> Labels:
    """Label a mask, cut at the waists between the peaks of its distance transform."""
    depth = ndimage.distance_transform_edt(mask)
    depth = filters.gaussian(depth, diameter / 15) * mask
    parts = measure.label(mask)
    peaks = feature.peak_local_max(depth, min_distance=max(1, round(diameter / 3)), labels=parts, exclude_border=False)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: Labels = segmentation.watershed(-depth, seeds, mask=mask)
    return labels


def _sized(labels: Labels, diameter: float) -> Labels:
    """Drop objects under a tenth of the expected area; number the rest from 1."""
    sizes = np.bincount(labels.ravel())
    kept = np.where(sizes[labels] >= _area(diameter) / 10, labels, 0)
    numbered: Labels = segmentation.relabel_sequential(kept)[0].astype(np.int32)
    return numbered


def _area(diameter: float) -> float:
    return math.pi * diameter**2 / 4
