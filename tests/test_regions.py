"""Region measures against scikit-image, on drawn and on random label images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import perimeter_crofton, regionprops

from biorewards.regions import counts, image_max, image_mean, measure_regions, nuclear_containment

GOLDEN = Path(__file__).resolve().parents[2] / "shared/golden/cellpose3_cpnet/expected.npz"


def reference(labels: np.ndarray) -> list[tuple[float, ...]]:
    height, width = labels.shape
    rows = []
    for region in regionprops(labels):
        y0, x0, y1, x1 = region.bbox
        rows.append(
            (
                region.label,
                region.area,
                perimeter_crofton(region.image, directions=4),
                region.eccentricity,
                *region.centroid,
                y0 == 0 or x0 == 0 or y1 == height or x1 == width,
            )
        )
    return rows


def assert_equals_skimage(batch: np.ndarray) -> None:
    table = measure_regions(torch.from_numpy(batch))
    expected = [(i, *row) for i, image in enumerate(batch) for row in reference(image)]
    assert len(table) == len(expected)
    if not expected:
        return
    image, label, area, perimeter, eccentricity, cy, cx, border = (np.array(c) for c in zip(*expected, strict=True))
    assert table.image.tolist() == image.tolist()
    assert table.label.tolist() == label.tolist()
    assert table.area.tolist() == area.tolist()
    np.testing.assert_allclose(table.perimeter, perimeter, rtol=1e-5)
    np.testing.assert_allclose(table.form_factor, 4 * math.pi * area / perimeter**2, rtol=1e-5)
    np.testing.assert_allclose(table.eccentricity, eccentricity, atol=1e-4)
    np.testing.assert_allclose(table.centroid_y, cy, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(table.centroid_x, cx, rtol=1e-6, atol=1e-6)
    assert table.touches_border.tolist() == border.tolist()


@st.composite
def label_batches(draw: st.DrawFn) -> np.ndarray:
    """Discs, lines, single pixels and noise, overwriting each other, with gapped ids; some images empty."""
    n, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.cumsum(rng.integers(1, draw(st.sampled_from([2, 30, 10**6])), 12))
    batch = np.zeros((n, height, width), np.int32)
    yy, xx = np.mgrid[:height, :width]
    for image in batch:
        for label in rng.permutation(ids)[: rng.integers(0, 8)]:
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            match rng.integers(5):
                case 0:
                    image[(yy - cy) ** 2 + (xx - cx) ** 2 <= rng.uniform(1, 12) ** 2] = label
                case 1:
                    image[int(cy), int(cx) :] = label
                case 2:
                    image[int(cy), int(cx)] = label
                case 3:
                    image[(rng.random(image.shape) < 0.1)] = label
                case 4:
                    image[abs((yy - cy) - (xx - cx)) < rng.uniform(0.2, 3)] = label
    return batch


@settings(deadline=None, max_examples=60, derandomize=True)
@given(label_batches())
def test_random_labels_equal_regionprops(batch: np.ndarray) -> None:
    assert_equals_skimage(batch)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"golden masks are not at {GOLDEN}")
def test_golden_masks_equal_regionprops() -> None:
    golden = np.load(GOLDEN)
    for name in ("cells_A_masks_ft04", "nuclei_A_masks_ft04", "cells_B_masks_ft0"):
        assert_equals_skimage(golden[name])


@pytest.mark.parametrize("radius", [8.0, 15.0, 30.0])
def test_disc_has_known_measures(radius: float) -> None:
    yy, xx = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    disc = ((yy - 40) ** 2 + (xx - 40) ** 2 <= radius**2).int()[None]
    table = measure_regions(disc)
    assert table.area.item() == pytest.approx(math.pi * radius**2, rel=0.03)
    assert table.perimeter.item() == pytest.approx(2 * math.pi * radius, rel=0.05)
    assert table.form_factor.item() == pytest.approx(1, abs=0.1)
    assert table.eccentricity.item() < 1e-3


def test_ellipse_has_known_eccentricity() -> None:
    yy, xx = torch.meshgrid(torch.arange(100.0), torch.arange(100.0), indexing="ij")
    ellipse = (((yy - 50) / 20) ** 2 + ((xx - 50) / 40) ** 2 <= 1).int()[None]
    assert measure_regions(ellipse).eccentricity.item() == pytest.approx(math.sqrt(1 - 0.25), abs=2e-3)


def test_neighbours_in_the_batch_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    batch = torch.from_numpy(rng.integers(0, 9, (5, 20, 20)))
    together = measure_regions(batch)
    for i, image in enumerate(batch):
        alone = measure_regions(image[None])
        rows = together.image == i
        for name in ("label", "area", "perimeter", "form_factor", "eccentricity", "centroid_y", "touches_border"):
            assert torch.equal(getattr(together, name)[rows], getattr(alone, name)), name


def test_huge_gapped_ids_need_no_huge_table() -> None:
    labels = torch.zeros(3, 8, 8, dtype=torch.int64)
    labels[0, 2, 2], labels[2, 3:5, 3:5], labels[2, 7, 7] = 2**40, 5, 2**41
    table = measure_regions(labels)
    assert table.label.tolist() == [2**40, 5, 2**41]
    assert table.image.tolist() == [0, 2, 2]
    assert table.area.tolist() == [1, 4, 1]


def test_per_image_summaries() -> None:
    labels = torch.zeros(3, 10, 10, dtype=torch.int32)
    labels[0, 1:3, 1:3], labels[0, 5:9, 5:9], labels[2, 0, 0] = 4, 7, 1
    table = measure_regions(labels)
    assert counts(table).tolist() == [2, 0, 1]
    assert image_max(table, table.area).tolist()[::2] == [16, 1]
    assert image_max(table, table.area).isnan().tolist() == [False, True, False]
    assert image_mean(table, table.area).tolist()[::2] == [10, 1]
    inner = image_mean(table, table.area, ~table.touches_border)
    assert inner[0] == 10 and inner[1:].isnan().all()


def test_empty_batches() -> None:
    table = measure_regions(torch.zeros(4, 6, 6, dtype=torch.int32))
    assert len(table) == 0 and counts(table).tolist() == [0, 0, 0, 0]
    assert image_max(table, table.area).isnan().all() and image_mean(table, table.area).isnan().all()
    assert len(measure_regions(torch.zeros(0, 6, 6, dtype=torch.int32))) == 0


def test_containment() -> None:
    nuclei, cells = torch.zeros(2, 3, 8, 8, dtype=torch.int32).unbind(0)
    nuclei[0, 2:4, 2:6], cells[0, :, :4], nuclei[1, 0, 0] = 1, 3, 2
    share = nuclear_containment(nuclei, cells)
    assert share[:2].tolist() == [0.5, 0.0] and share[2].isnan()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int32), "expected \\(B, H, W\\)"),
        (torch.zeros(1, 4, 4), "expected integers"),
        (torch.full((1, 4, 4), -3), "negative value -3"),
    ],
)
def test_bad_labels_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_regions(labels)
