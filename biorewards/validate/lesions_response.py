"""Check 3: every reward answers to the damage that it owns, more to more of it. Also what checks 4 and 6 start from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from torch import Tensor

from biorewards.audit.lesions import LESIONS, apply
from biorewards.regions import Regions, image_max, image_mean, measure_regions, nuclear_containment
from biorewards.rewards.reference import CELL_SHOWS, NUCLEUS_SHOWS
from biorewards.segmentation.segmenter import Masks
from biorewards.validate.bench import Bench, Rows
from biorewards.validate.check import Finding, not_judged
from biorewards.validate.statistics import auroc

NAME = "dose_response"
#: Rank correlation of dose and mean reward: with seven doses, 0.9 allows two neighbours to change places.
LEAST_SPEARMAN = 0.9
#: Real images beat the same images at the largest dose in nine of ten pairs.
LEAST_AUROC = 0.9
#: Mean rewards closer than this, in real sd, count as one level: a reward that has reached its worst value stays there
#: but for noise. A small effect (Cohen 1988).
SAME = 0.2
#: Share of the true measure by which the largest dose must change an image that counts.
LEAST_CHANGE = 0.1
#: Real images with a value that a response is judged by.
FEWEST = 8

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Response:
    """What the rewards said of n images at rising doses of a lesion, dose 0 (no damage) first.

    value, measure: reward -> (D + 1, n). valid: reward -> (D + 1, n), something was there to be judged. truth: name of
    the reward -> (D + 1, n), what the masks truly show of its measure, for the rewards that measure masks.
    """

    doses: tuple[float, ...]
    value: dict[str, Floats]
    measure: dict[str, Floats]
    valid: dict[str, npt.NDArray[np.bool_]]
    truth: dict[str, Floats]


def responses(bench: Bench) -> dict[str, Response | str]:
    """Every lesion that some reward owns -> the response, or why the lesion cannot be made of these images."""

    def make() -> dict[str, Response | str]:
        found: dict[str, Response | str] = {}
        for name, lesion in LESIONS.items():
            if lesion.owner is not None:
                try:
                    found[name] = _respond(bench, bench.some(bench.n), name)
                except ValueError as error:
                    found[name] = str(error)
        return found

    made: dict[str, Response | str] = bench.once("responses", make)
    return made


def _respond(bench: Bench, rows: Rows, lesion: str) -> Response:
    images, masks, target = bench.images(rows), bench.masks(rows), bench.target[rows]
    others = bench.images(_other_class(bench, rows)) if LESIONS[lesion].needs_other else None
    scores, shown = [bench.real(rows)], [masks]
    for dose in LESIONS[lesion].doses:
        harmed = apply(lesion, images, masks, dose, channels=bench.assay.channels, seed=bench.seed, others=others)
        scores.append(bench.score(harmed.images, target))
        shown.append(harmed.masks)
    names, truth = list(bench.suite.rewards), [_truth(m, bench.assay.nucleus_diameter) for m in shown]
    return Response(
        (0.0, *LESIONS[lesion].doses),
        {name: np.stack([s.value[name].to_numpy() for s in scores]) for name in names},
        {name: np.stack([s.measure[name].to_numpy() for s in scores]) for name in names},
        {name: np.stack([s.valid(name) for s in scores]) for name in names},
        {name: np.stack([t[name] for t in truth]) for name in truth[0]},
    )


def _truth(masks: Masks, diameter: float) -> dict[str, Floats]:
    """Measures of masks, by the rules of the rewards: (B,) each; areas in px^2."""
    nuclei, cells = measure_regions(masks.nuclei), measure_regions(masks.cells)

    def visible(regions: Regions, share: float) -> Tensor:
        large = regions.area >= share * math.pi / 4 * diameter**2
        return torch.bincount(regions.image[large], minlength=regions.n_images)

    whole = image_mean(nuclei, nuclei.form_factor, ~nuclei.touches_border)
    found = {
        "nucleus_in_cytoplasm": nuclear_containment(masks.nuclei, masks.cells),
        "nucleus_roundness": torch.where(whole.isnan(), image_mean(nuclei, nuclei.form_factor), whole),
        "nucleus_size": image_max(nuclei, nuclei.area),
        "cytoplasm_size": image_max(cells, cells.area),
        "nucleus_count": visible(nuclei, NUCLEUS_SHOWS),
        "cytoplasm_count": visible(cells, CELL_SHOWS),
    }
    return {name: values.numpy().astype(np.float64) for name, values in found.items()}


def harmed(found: Response, owner: str) -> npt.NDArray[np.bool_]:
    """(n,) the lesion could be made: what the owner measures truly changed by a tenth at the largest dose.

    A nucleus cannot be moved out of cells that fill the crop, and a cell that fills it cannot grow.
    """
    if owner not in found.truth:
        return np.ones(found.value[owner].shape[1], bool)
    first, last = found.truth[owner][0], found.truth[owner][-1]
    changed = np.abs(last - first) >= LEAST_CHANGE * np.abs(first)
    # What is gone has no measure, and has changed.
    able: npt.NDArray[np.bool_] = np.isfinite(first) & (changed | np.isnan(last))
    return able


def _other_class(bench: Bench, rows: Rows) -> Rows:
    rng = bench.rng("other class")
    chosen = []
    for row in rows:
        others = np.flatnonzero(bench.target != bench.target[row])
        if not len(others):
            raise ValueError("the real images show one class only: there is no other to blend in")
        chosen.append(int(rng.choice(others)))
    return np.array(chosen)


def dose_response(bench: Bench) -> list[Finding]:
    """Every reward against its own lesions: rank correlation of dose and mean, AUROC of the largest dose."""
    findings = []
    for lesion, found in responses(bench).items():
        owner = str(LESIONS[lesion].owner)
        if owner not in bench.suite.rewards:
            continue
        said = lesion.replace("_", " ")
        falls = f"Mean reward falls as the dose of {said} rises: rank correlation, sign turned."
        wins = f"Real images score above the same images after {said} at the largest dose (AUROC)."
        if isinstance(found, str):
            findings.append(not_judged(NAME, owner, falls, f">= {LEAST_SPEARMAN}", found))
            continue
        able = harmed(found, owner) & np.isfinite(found.value[owner]).all(0)
        if able.sum() < FEWEST:
            reason = f"{able.sum()} images that have a value and room for the lesion are too few"
            findings.append(not_judged(NAME, owner, falls, f">= {LEAST_SPEARMAN}", reason))
            continue
        value, measure = found.value[owner][:, able], found.measure[owner][:, able]
        n = value.shape[1]
        steps = range(len(found.doses))

        unit = SAME * bench.spread(owner) if np.isfinite(bench.spread(owner)) else 1.0

        def fall(drawn: Rows, value: Floats = value, steps: range = steps, unit: float = unit) -> float:
            mean = np.round(np.nanmean(value[:, drawn], 1) / unit)
            return -float(spearmanr(steps, mean).statistic) if np.ptp(mean) > 0 else 0.0

        def win(drawn: Rows, value: Floats = value) -> float:
            return auroc(value[0, drawn], value[-1, drawn])

        details = {
            "lesion": lesion, "unit": LESIONS[lesion].unit, "doses": list(found.doses),
            "value": np.nanmean(value, 1).tolist(), "measure": [_mean(row) for row in measure],
            "low": [bench.interval(row)[0] for row in value], "high": [bench.interval(row)[1] for row in value],
            "without_room": int((~able).sum()), "real_sd": bench.spread(owner), "exact_masks": bench.exact_masks,
        }  # fmt: skip
        for what, statistic, least, more in (
            (falls, fall, LEAST_SPEARMAN, details),
            (wins, win, LEAST_AUROC, {"lesion": lesion}),
        ):
            figure, low, high = bench.interval_of(statistic, n, resamples=200)
            passed = figure >= least
            why = "" if passed else f"it does not see {said} well enough"
            findings.append(Finding(NAME, owner, what, figure, (low, high), f">= {least}", passed, n, why, more))
    return findings


def _mean(row: Floats) -> float:
    return float(np.nanmean(row)) if np.isfinite(row).any() else math.nan
