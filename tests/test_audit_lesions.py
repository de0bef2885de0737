"""Lesions do what they say, by the dose that they say, and nothing else: measured on exact masks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from bundled import bundled
from scipy.stats import spearmanr

from biorewards.audit.lesions import LESIONS, apply
from biorewards.audit.surgery import Crop, anchor, roomiest, way_out
from biorewards.batch import Batch
from biorewards.phantom import render_dataset
from biorewards.regions import counts, image_max, image_mean, measure_regions, nuclear_containment
from biorewards.rewards import PAPER_WEIGHTS, suite
from biorewards.segmentation.segmenter import Masks

CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}
#: Lesions of masks, and the exact statistic that each must move one way.
ANATOMY = {
    "erase_nuclei": ("count", -1), "duplicate_nuclei": ("count", 1), "move_nucleus_out": ("inside", -1),
    "shrink_nuclei": ("nucleus", -1), "grow_nuclei": ("nucleus", 1), "shrink_cells": ("cell", -1),
    "grow_cell": ("cell", 1), "erase_cytoplasm": ("cells", -1), "stretch_nuclei": ("round", -1),
}  # fmt: skip
NUISANCES = [name for name in LESIONS if name not in ANATOMY]


@pytest.fixture(scope="module")
def crops() -> tuple[torch.Tensor, Masks]:
    drawn = render_dataset(40, size=96, seed=5)
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255
    return images, Masks(torch.from_numpy(drawn.nuclei), torch.from_numpy(drawn.cells))


def exact(masks: Masks) -> dict[str, float]:
    nuclei, cells = measure_regions(masks.nuclei), measure_regions(masks.cells)
    return {
        "count": float(counts(nuclei).float().mean()),
        "inside": float(nuclear_containment(masks.nuclei, masks.cells).nanmean()),
        "nucleus": float(image_max(nuclei, nuclei.area).nanmean()),
        "cell": float(image_max(cells, cells.area).nanmean()),
        "round": float(image_mean(nuclei, nuclei.form_factor, ~nuclei.touches_border).nanmean()),
        "cells": float(counts(cells).float().mean()),
    }


@pytest.mark.parametrize("name", ANATOMY)
def test_the_truth_moves_with_the_dose(name: str, crops: tuple[torch.Tensor, Masks]) -> None:
    what, sign = ANATOMY[name]
    before = exact(crops[1])[what]
    steps = [exact(apply(name, *crops, dose, channels=CHANNELS).masks)[what] for dose in LESIONS[name].doses]
    assert len(steps) >= 6
    moved = np.diff([before, *steps]) * sign
    assert (moved >= -1e-6).all() and moved.sum() > 0.05 * before, (before, steps)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("erase_nuclei", {"cell": 0.0, "cells": 0.0}),
        ("duplicate_nuclei", {"nucleus": 0.001, "inside": 0.02, "cell": 0.0, "cells": 0.0}),
        ("move_nucleus_out", {"count": 0.0, "nucleus": 0.02, "cell": 0.0, "cells": 0.0}),
        ("shrink_nuclei", {"count": 0.0, "round": 0.03, "inside": 0.01, "cell": 0.0}),
        ("shrink_cells", {"count": 0.0, "nucleus": 0.0, "round": 0.0, "inside": 0.01}),
        ("erase_cytoplasm", {"count": 0.0, "nucleus": 0.0, "round": 0.0}),
        ("stretch_nuclei", {"count": 0.0, "nucleus": 0.05, "cell": 0.0, "cells": 0.0}),
    ],
)
def test_the_rest_of_the_truth_stays(name: str, kept: dict[str, float], crops: tuple[torch.Tensor, Masks]) -> None:
    before, after = exact(crops[1]), exact(apply(name, *crops, LESIONS[name].doses[3], channels=CHANNELS).masks)
    for what, share in kept.items():
        assert after[what] == pytest.approx(before[what], rel=share + 1e-6), what


@pytest.mark.parametrize("name", ["shrink_nuclei", "grow_nuclei"])
def test_areas_scale_by_the_factor_that_is_asked_for(name: str, crops: tuple[torch.Tensor, Masks]) -> None:
    masks = crops[1]
    alone = measure_regions(masks.nuclei)
    for dose in LESIONS[name].doses[:3]:  # beyond, large nuclei run over their neighbours and the border
        now = measure_regions(apply(name, *crops, dose, channels=CHANNELS).masks.nuclei)
        ratio = image_max(now, now.area) / image_max(alone, alone.area)
        assert float(ratio.nanmedian()) == pytest.approx(dose, rel=0.05)


@pytest.mark.parametrize("name", LESIONS)
def test_results_do_not_depend_on_the_batch_and_leave_the_input_alone(
    name: str, crops: tuple[torch.Tensor, Masks]
) -> None:
    images, masks = crops[0][:6], Masks(*(m[:6] for m in crops[1]))
    before, others = images.clone(), images.flip(0)
    whole = apply(name, images, masks, LESIONS[name].doses[2], channels=CHANNELS, others=others)
    part = apply(name, images[4:], Masks(*(m[4:] for m in masks)), LESIONS[name].doses[2], channels=CHANNELS,
                 others=others[4:], first=4)  # fmt: skip
    assert torch.equal(images, before)
    assert torch.equal(whole.images[4:], part.images) and torch.equal(whole.masks.nuclei[4:], part.masks.nuclei)
    assert whole.images.dtype == torch.float32 and whole.masks.cells.dtype == torch.int32
    assert whole.images.min() >= 0 and whole.images.max() <= 1 and not torch.equal(whole.images, images)


@pytest.mark.parametrize("name", NUISANCES)
def test_nuisances_leave_the_masks(name: str, crops: tuple[torch.Tensor, Masks]) -> None:
    images, masks = crops[0][:4], Masks(*(m[:4] for m in crops[1]))
    away = []
    for dose in LESIONS[name].doses:
        done = apply(name, images, masks, dose, channels=CHANNELS, others=images.flip(0))
        assert torch.equal(done.masks.nuclei, masks.nuclei) and torch.equal(done.masks.cells, masks.cells)
        away.append(float((done.images - images).square().mean()))
    assert len(away) >= 6 and away == sorted(away), away  # further from the original with every dose


def test_a_higher_dose_erases_what_a_lower_one_did(crops: tuple[torch.Tensor, Masks]) -> None:
    left = [apply("erase_nuclei", *crops, dose, channels=CHANNELS).masks.nuclei for dose in (1 / 3, 2 / 3, 1.0)]
    for less, more in pairwise(left):
        assert not ((more > 0) & (less == 0)).any()
    assert not left[-1].any()


def test_erased_nuclei_look_like_their_surroundings(crops: tuple[torch.Tensor, Masks]) -> None:
    images, masks = crops
    done = apply("erase_nuclei", images, masks, 1.0, channels=CHANNELS)
    inside, outside = masks.nuclei > 0, masks.nuclei == 0
    contrast = [float(i[inside[k]].mean() - i[outside[k]].mean()) for k, i in enumerate(images[:, 2])]
    after = [float(i[inside[k]].mean() - i[outside[k]].mean()) for k, i in enumerate(done.images[:, 2])]
    assert np.median(np.abs(after)) < 0.1 * np.median(contrast)
    assert torch.equal(done.images[:, :2], images[:, :2])


def test_plain_formulas(crops: tuple[torch.Tensor, Masks]) -> None:
    images, masks = crops[0][:3], Masks(*(m[:3] for m in crops[1]))

    def done(name: str, dose: float) -> torch.Tensor:
        return apply(name, images, masks, dose, channels=CHANNELS, others=images.flip(0)).images

    torch.testing.assert_close(done("gain_up", 1.5), (1.5 * images).clamp(0, 1))
    torch.testing.assert_close(done("swap_cytoplasm", 1.0), images[:, [1, 0, 2]])
    torch.testing.assert_close(done("blend", 0.25), 0.75 * images + 0.25 * images.flip(0))
    torch.testing.assert_close(done("8-bit", 8), images)
    assert float((done("noise", 0.02) - images).std()) == pytest.approx(0.02, rel=0.15)


def test_nothing_to_harm_is_no_error() -> None:
    empty = Masks(torch.zeros(1, 48, 48, dtype=torch.int32), torch.zeros(1, 48, 48, dtype=torch.int32))
    for name in LESIONS:
        for fill in (0.0, 0.4):
            image = torch.full((1, 3, 48, 48), fill)
            done = apply(name, image, empty, LESIONS[name].doses[-1], channels=CHANNELS, others=image)
            assert torch.isfinite(done.images).all() and not done.masks.nuclei.any()


def test_what_is_missing_is_named(crops: tuple[torch.Tensor, Masks]) -> None:
    with pytest.raises(ValueError, match="no lesion 'melt'"):
        apply("melt", *crops, 1.0, channels=CHANNELS)
    with pytest.raises(ValueError, match="as others"):
        apply("blend", *crops, 0.5, channels=CHANNELS)
    with pytest.raises(ValueError, match="dna channel"):
        apply("erase_nuclei", *crops, 0.5, channels={"actin": 0, "tubulin": 1})
    with pytest.raises(ValueError, match="no channel tubulin"):
        apply("swap_cytoplasm", *crops, 0.5, channels={"actin": 0, "dna": 2})


def test_the_way_out_is_the_shortest() -> None:
    nucleus, cells = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    nucleus[18:22, 10:14] = True
    cells[:, :20] = True
    assert way_out(nucleus, cells, np.zeros_like(cells), 1.0) == (0, 10)
    assert way_out(nucleus, cells, np.zeros_like(cells), 0.5) == (0, 8)
    assert way_out(nucleus, np.ones_like(cells), np.zeros_like(cells), 1.0) == (0, 0)


def test_objects_at_the_border_are_scaled_about_it() -> None:
    mask = np.zeros((20, 20), bool)
    mask[:6, 8:12] = True
    assert anchor(mask) == (0.0, 9.5)
    assert roomiest(~mask)[2] > 5
    nuclei = mask.astype(np.int32)
    image = np.where(mask, 0.8, 0.1).astype(np.float32)[None].repeat(3, 0)
    done = LESIONS["shrink_nuclei"].harm(
        Crop(image, nuclei, np.ones_like(nuclei)), 0.5, CHANNELS, np.random.default_rng(0), None
    )
    assert done.nuclei[0].any() and done.nuclei.sum() < nuclei.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, lesion in LESIONS.items() if lesion.owner])
def test_the_bundled_verifiers_answer_to_their_own_lesion(name: str, crops: tuple[torch.Tensor, Masks]) -> None:
    """Spearman of dose and mean measure over one lesion's doses; which way is the lesion's matter."""
    assay, (images, masks), lesion = bundled("phantom"), crops, LESIONS[name]
    assert lesion.owner in PAPER_WEIGHTS
    target = torch.zeros(len(images), dtype=torch.int64)
    judge = suite(assay, [lesion.owner])
    values = []
    with torch.inference_mode():
        if lesion.owner == "moa":  # judged as what the classifier takes them for
            known = Batch(images, None, assay).class_probabilities
            assert known is not None
            target = known.argmax(1)
            target = torch.tensor([assay.classes.index(assay.classifier.classes[k]) for k in target])  # type: ignore[union-attr]
        for dose in (0.0, *lesion.doses):
            done = images if dose == 0 else apply(name, images, masks, dose, channels=CHANNELS,
                                                  others=images.roll(17, 0)).images  # fmt: skip
            values.append(float(judge(Batch(done, target, assay)).scores[lesion.owner].measure.nanmean()))
    assert abs(spearmanr(range(len(values)), values).statistic) >= 0.9, values
