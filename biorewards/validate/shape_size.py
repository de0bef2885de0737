"""Check 3, the part on shape: the same outlines drawn larger and smaller. A measure of shape must not read size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.stats import spearmanr

from biorewards.audit.lesions import LESIONS
from biorewards.batch import Batch
from biorewards.segmentation.segmenter import Masks
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged

NAME = "shape_and_size"
#: Areas that each outline is drawn at, times its own: a ninefold range, as from the smallest to the largest nuclei.
AREAS = (0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.7)
#: Real standard deviations that the measure may drift over that range: a small effect (Cohen 1988).
MOST_DRIFT = 0.2
#: Outlines that are drawn, at most; a nucleus must be so many px to have a shape at the smallest scale.
OUTLINES, LEAST_AREA = 48, 250


def shape_and_size(bench: Bench) -> list[Finding]:
    """Drift of every shape measure with size, in units of its spread among real images; masks given, not segmented."""
    names = [name for name in bench.suite.rewards if LESIONS["stretch_nuclei"].owner == name]
    what = "Trend of the measure while the same outlines are drawn at 0.3 to 2.7 times their area, in real sd."
    threshold = f"<= {MOST_DRIFT}"
    if not names:
        reason = "no reward on trial measures the shape of nuclei"
        return [not_judged(NAME, None, what, threshold, reason)]
    outlines = _outlines(bench)
    if len(outlines) < 5:
        reason = f"fewer than five whole nuclei of {LEAST_AREA} px or more in the real images"
        return [not_judged(NAME, name, what, threshold, reason) for name in names]
    measured = _measured(bench, outlines, names)
    findings = []
    for name in names:
        measure = measured[name]
        spread = float(np.nanstd(bench.real().measure[name]))
        if not np.isfinite(measure).all() or not np.ptp(measure) > 0 or not spread:
            findings.append(not_judged(NAME, name, what, threshold, "it does not measure the masks that it is given"))
            continue

        def drift(drawn: Rows, measure: npt.NDArray[np.float64] = measure, spread: float = spread) -> float:
            # The trend: single scales scatter by how an outline falls on the pixels.
            slope = np.polyfit(np.log(AREAS), measure[:, drawn].mean(1), 1)[0]
            return abs(float(slope)) * math.log(AREAS[-1] / AREAS[0]) / spread

        value, low, high = bench.interval_of(drift, measure.shape[1])
        mean = measure.mean(1)
        details = {
            "areas": list(AREAS), "measure": mean.tolist(), "real_sd": spread,
            "rank_correlation": float(spearmanr(AREAS, mean).statistic),
        }  # fmt: skip
        passed = value <= MOST_DRIFT
        reason = "" if passed else "it reads size where it should read shape"
        findings.append(
            Finding(NAME, name, what, value, (low, high), threshold, passed, len(outlines), reason, details)
        )
    return findings


def _outlines(bench: Bench) -> list[npt.NDArray[np.float64]]:
    """Nuclei of real images that no border cuts, each alone and smoothed: above 0.5 is inside."""
    found = []
    for labels in bench.masks(bench.some(bench.n)).nuclei.numpy():
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            if box is None or any(s.start == 0 or s.stop == n for s, n in zip(box, labels.shape, strict=True)):
                continue
            one = labels[box] == label
            if one.sum() >= LEAST_AREA:
                # Smooth before scaling, or the steps of its pixels would be drawn larger, too.
                found.append(ndimage.gaussian_filter(np.pad(one, 8).astype(float), 2.0))
    step = max(1, math.ceil(len(found) / OUTLINES))
    return found[::step]


def _measured(
    bench: Bench, outlines: list[npt.NDArray[np.float64]], names: list[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """reward -> (areas, outlines) measure of each outline at each scale, alone in its image."""
    largest = max(max(o.shape) for o in outlines)
    side = math.ceil(largest * math.sqrt(max(AREAS))) + 4
    measures: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in names}
    for area in AREAS:
        nuclei = torch.zeros(len(outlines), side, side, dtype=torch.int32)
        for k, outline in enumerate(outlines):
            drawn = ndimage.zoom(outline, math.sqrt(area), order=1, grid_mode=True, mode="grid-constant") > 0.5
            nuclei[k, 2 : 2 + drawn.shape[0], 2 : 2 + drawn.shape[1]] = torch.from_numpy(drawn)
        batch = Batch(torch.zeros(len(outlines), bench.assay.n_channels, side, side), None, bench.assay)
        batch.masks = Masks(nuclei, nuclei)  # what a segmenter would say is no part of the question
        for name in names:
            measures[name].append(bench.suite.rewards[name](batch).measure.double().numpy())
    return {name: np.stack(one) for name, one in measures.items()}
