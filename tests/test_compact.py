"""The bundled segmenter on images: what it finds, what it does not, and that containment sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage, stats

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.phantom import render_dataset
from biorewards.rewards import MEASURES, suite
from biorewards.segmentation import load_segmenter
from biorewards.segmentation.matching import match


@pytest.fixture(scope="module")
def assay() -> Assay:
    return Assay.load("phantom")


@pytest.fixture(scope="module")
def crops():  # type: ignore[no-untyped-def]
    return render_dataset(208, 96, 4711)


@pytest.fixture(scope="module")
def images(crops) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.from_numpy(np.moveaxis(crops.images, -1, 1).copy()).float() / 255


def containment(assay: Assay, images: torch.Tensor) -> torch.Tensor:
    return suite(assay, ["nucleus_in_cytoplasm"])(Batch(images, None, assay)).scores["nucleus_in_cytoplasm"].value


def test_phantom_masks_agree_with_the_truth(assay: Assay, crops, images: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    masks = assay.segment(images)
    for truth, found, least in ((crops.nuclei, masks.nuclei, 0.91), (crops.cells, masks.cells, 0.80)):
        counts = np.sum([match(t, f)[:3] for t, f in zip(truth, found.numpy(), strict=True)], axis=0)
        assert 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]) > least


def test_measures_follow_the_exact_masks(assay: Assay, crops, images: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Spearman over images of each verifier's statistic, bundled segmenter against exact masks."""
    from dataclasses import replace

    class Exact:
        name = fingerprint = "exact"

        def __call__(self, nucleus, cytoplasm, diameter):  # type: ignore[no-untyped-def]
            from biorewards.segmentation.segmenter import Masks

            return Masks(torch.from_numpy(crops.nuclei), torch.from_numpy(crops.cells))

    seen, true = Batch(images, None, assay), Batch(images, None, replace(assay, segmenter=Exact()))
    for name, measure in MEASURES.items():
        a, b = measure.of(seen).numpy(), measure.of(true).numpy()
        both = ~np.isnan(a) & ~np.isnan(b)
        assert stats.spearmanr(a[both], b[both]).statistic > 0.85, name


def test_the_cell_mask_needs_cytoplasm(assay: Assay, images: torch.Tensor) -> None:
    dark = images.clone()
    dark[:, :2] = dark[:, :2].amin((2, 3), keepdim=True)
    assert containment(assay, images).mean() > 0.95
    assert containment(assay, dark).mean() < 0.1
    shifted = images.clone()
    shifted[:, 2] = torch.roll(images[:, 2], (48, 48), (1, 2))
    whole = containment(assay, images)
    assert whole.mean() - containment(assay, shifted).mean() > whole.std()


def test_bare_nuclei_are_no_cells(assay: Assay, crops, images: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Nuclei pasted on empty background: under a tenth of their pixels is called cell."""
    bare, inside = torch.zeros(40, 3, 96, 96), 0.0
    rng = np.random.default_rng(0)
    floor = images.amin((0, 2, 3))
    for k in range(40):
        nucleus = crops.nuclei[k] == crops.nuclei[k, 48, 48] if crops.nuclei[k, 48, 48] else crops.nuclei[k] > 0
        soft = torch.from_numpy(ndimage.gaussian_filter(nucleus.astype(np.float32), 1.0))
        bare[k, 2] = images[k, 2] * soft
        bare[k] += floor[:, None, None] + 0.01 * torch.from_numpy(rng.standard_normal((3, 96, 96))).float()
    masks = assay.segment(bare.clamp(0, 1))
    found = masks.nuclei > 0
    inside = float((found & (masks.cells > 0)).sum() / found.sum())
    assert found.flatten(1).any(1).float().mean() > 0.9 and inside < 0.1


@pytest.mark.parametrize("kind", ["uniform", "normal", "dim", "salt", "constant"])
def test_noise_and_blanks_hold_nothing(assay: Assay, kind: str) -> None:
    rng = np.random.default_rng(1)
    noise = {
        "uniform": lambda: rng.random((16, 3, 96, 96)),
        "normal": lambda: rng.normal(0.5, 0.2, (16, 3, 96, 96)),
        "dim": lambda: rng.normal(0.05, 0.02, (16, 3, 96, 96)),
        "salt": lambda: (rng.random((16, 3, 96, 96)) > 0.97).astype(float),
        "constant": lambda: np.full((16, 3, 96, 96), 0.4),
    }[kind]()
    batch = Batch(torch.from_numpy(noise).float().clamp(0, 1), torch.ones(16, dtype=torch.int64), assay)
    for name, score in suite(assay)(batch).scores.items():
        worst = 0.0 if name in ("moa", "nucleus_in_cytoplasm") else -25.0
        assert (score.value == worst).all(), name


def test_scores_do_not_depend_on_batch_order_or_neighbours(assay: Assay, images: torch.Tensor) -> None:
    target = torch.ones(48, dtype=torch.int64)
    judge = suite(assay)
    together = judge(Batch(images[:48], target, assay))
    order = torch.from_numpy(np.random.default_rng(0).permutation(48))
    shuffled = judge(Batch(images[:48][order], target, assay))
    for name, score in together.scores.items():
        torch.testing.assert_close(shuffled.scores[name].value, score.value[order], atol=1e-5, rtol=0)
        for size in (1, 7):
            parts = [judge(Batch(p, target[: len(p)], assay)).scores[name].value for p in images[:14].split(size)]
            torch.testing.assert_close(torch.cat(parts), score.value[:14], atol=1e-5, rtol=0)


def test_flips_and_quarter_turns_move_no_reward_by_a_quarter_of_its_real_spread(
    assay: Assay, images: torch.Tensor
) -> None:
    target = torch.ones(64, dtype=torch.int64)
    judge = suite(assay)
    plain = judge(Batch(images[:64], target, assay)).scores
    for turn in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: torch.rot90(x, 1, (2, 3))):
        turned = judge(Batch(turn(images[:64]).contiguous(), target, assay)).scores
        for name, score in plain.items():
            spread = assay.card["real_scores"][name]["sd"]
            assert (turned[name].value - score.value).abs().nanmedian() < 0.25 * spread, name


def test_unknown_names_are_errors_not_another_model() -> None:
    with pytest.raises(ValueError, match="compact"):
        load_segmenter("compactt")


@pytest.mark.slow
def test_validation_images(shared: Path) -> None:
    """F1 on the real validation images with automatic diameter: a floor below the published figures."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "segmenter"))
    from evaluate import evaluate

    segmenter = load_segmenter("compact")
    floors = {
        "dsb2018": ("nuclei", 0.85),
        "mnfinder": ("nuclei", 0.85),
        "jump_u2os": ("cells", 0.82),
        "phantom": ("nuclei", 0.93),
    }
    found = {
        name: evaluate(segmenter, shared / "data", name, "val", False)[what]["f1_50"]
        for name, (what, _) in floors.items()
    }
    assert all(found[name] > least for name, (_, least) in floors.items()), pd.Series(found)
