"""Mask recovery, holes and training flows against Cellpose 3.1.1.3's own outputs, and properties of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional as F

from biorewards.segmentation.flow_targets import flow_errors, flows_from_masks, unique_ids
from biorewards.segmentation.flows import follow, masks_from_flows, renumber
from biorewards.segmentation.holes import fill_holes
from biorewards.segmentation.matching import iou_matrix

GOLDEN = Path(__file__).resolve().parents[2] / "shared/golden/cellpose3_cpnet"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"Cellpose's outputs are not at {GOLDEN}")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected.npz"))


def discs(size: int, centres: list[tuple[float, float]], radius: float) -> torch.Tensor:
    yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = torch.stack([(yy - y) ** 2 + (xx - x) ** 2 for y, x in centres])
    return torch.where(distance.amin(0) <= radius**2, distance.argmin(0) + 1, 0)


def field_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a perfect network would give for (B, H, W) labels."""
    return 5 * flows_from_masks(labels), torch.where(labels > 0, 4.0, -4.0)


def same_objects(a: torch.Tensor, b: torch.Tensor, iou: float = 1.0) -> bool:
    """Equal counts, and every object has a partner with at least this IoU."""
    overlap = iou_matrix(a.numpy(), b.numpy())
    return overlap.shape[0] == overlap.shape[1] and bool((overlap.max(1, initial=0) >= iou).all())


@golden
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("model", ["cells", "nuclei"])
def test_masks_equal_cellpose(expected: dict[str, np.ndarray], model: str, case: str, threshold: float) -> None:
    flows, logit, truth, steps = (
        torch.from_numpy(expected[f"{model}_{case}_{name}"])
        for name in ("dP", "cellprob", "masks_ft04" if threshold else "masks_ft0", "niter")
    )
    identical = 0
    for n in steps.unique():
        chosen = steps == n
        masks = masks_from_flows(
            flows[chosen], logit[chosen], steps=int(n), flow_threshold=threshold, max_size_fraction=0.4
        )
        identical += sum(torch.equal(a, b) for a, b in zip(masks, truth[chosen], strict=True))
    # Nuclei A, crop 5: two seeds of equal height, whose order Cellpose leaves to an unstable sort.
    assert identical >= 23, f"{identical} of 24 crops have Cellpose's masks"


@golden
@pytest.mark.parametrize("model", ["cells", "nuclei"])
def test_walks_end_where_cellpose_ends(expected: dict[str, np.ndarray], model: str) -> None:
    flows = torch.from_numpy(expected[f"{model}_A_dP"])
    foreground = torch.from_numpy(expected[f"{model}_A_cellprob"]) > 0
    image, row, column = foreground.nonzero(as_tuple=True)
    y, x = follow(flows / 5 * foreground[:, None], image, row.float(), column.float(), 200)
    ends = torch.from_numpy(expected[f"{model}_A_p_final"])[image, :, row, column]
    off = (torch.stack([y, x], 1) - ends).abs().amax(1)
    assert (off < 1e-2).float().mean() > 0.995  # the rest goes in circles, where rounding decides the phase


@golden
@pytest.mark.parametrize("model", ["cells", "nuclei"])
def test_training_flows_equal_cellpose(expected: dict[str, np.ndarray], model: str) -> None:
    drawn = torch.from_numpy(np.load(GOLDEN / "inputs.npz")[f"drawn_{model}"])
    reference = torch.from_numpy(expected[f"target_{model}_flows_cpu"])
    flows = flows_from_masks(drawn)
    assert torch.equal(flows, flows * (drawn > 0)[:, None])
    torch.testing.assert_close(flows, reference, atol=1e-5, rtol=0)


@golden
@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("model", ["cells", "nuclei"])
def test_flow_errors_equal_cellpose(expected: dict[str, np.ndarray], model: str, case: str) -> None:
    raw = torch.from_numpy(expected[f"{model}_{case}_masks_raw"])
    found = flow_errors(unique_ids(raw), torch.from_numpy(expected[f"{model}_{case}_dP"]))
    present = [(i, j) for i, labels in enumerate(raw) for j in range(1, int(labels.max()) + 1)]
    ids = torch.tensor([i * (int(raw.max()) + 1) + j for i, j in present])
    reference = np.array([expected[f"{model}_{case}_flow_err"][i, j - 1] for i, j in present])
    off = np.abs(found[ids].numpy() - reference)
    # One nucleus is point symmetric: at its centre Cellpose takes rounding residue for a direction.
    assert (off > 1e-6).sum() <= 1 and off.max() < 0.03


@pytest.mark.parametrize("steps", [1, 2, 3, 24, 25, 26, 60, 111])
@pytest.mark.parametrize("images", [1, 5])
def test_walking_far_is_walking_step_by_step(steps: int, images: int) -> None:
    """Points that rest or go to and fro leave the walk early, and rows are shared out: no end may change by a bit."""
    random = torch.Generator().manual_seed(images)
    field = F.interpolate(torch.randn(images, 2, 5, 4, generator=random), (24, 19), mode="bilinear")
    field[:, :, 12:] = field[:, :, 12:].round()  # whole steps: many go round in circles of two
    image = torch.randint(0, images, (700,), generator=random).sort().values
    image = image[image != 3]  # an image without points
    y = torch.randint(0, 24, (len(image),), generator=random).float()
    x = torch.randint(0, 19, (len(image),), generator=random).float()
    far = follow(field, image, y, x, steps)
    for _ in range(steps):
        y, x = follow(field, image, y, x, 1)
    assert torch.equal(far[0], y) and torch.equal(far[1], x)
    back = follow(field, image, *follow(field, image, y, x, 1), 1)
    assert (back[0] == y).float().mean() > 0.2, "this field tests nothing"


@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.1, 0.4, 1.0]))
@settings(max_examples=15, deadline=None)
def test_rough_flow_errors_lie_on_the_same_side(seed: int, threshold: float) -> None:
    random = torch.Generator().manual_seed(seed)
    labels = (F.interpolate(torch.rand(3, 1, 5, 6, generator=random), scale_factor=9.0)[:, 0] * 5).long()
    ids = unique_ids(labels)
    flows = 5 * flows_from_masks(labels) + torch.randn(3, 2, 45, 54, generator=random) * float(
        4 * torch.rand(1, generator=random)
    )
    exact, rough = flow_errors(ids, flows), flow_errors(ids, flows, threshold)
    assert torch.equal(exact <= threshold, rough <= threshold)
    assert torch.equal(exact.isnan(), rough.isnan()) and float((exact - rough).nan_to_num().abs().max()) < 0.02


def test_flows_of_a_disc_point_to_its_centre() -> None:
    labels = discs(41, [(20, 20)], 15)[None]
    flows = flows_from_masks(labels)[0]
    yy, xx = torch.meshgrid(20.0 - torch.arange(41), 20.0 - torch.arange(41), indexing="ij")
    radius = (yy**2 + xx**2).sqrt()
    inside = (labels[0] > 0) & (radius > 2)
    cosine = (flows[0] * yy + flows[1] * xx)[inside] / radius[inside]
    assert cosine.min() > 0.97
    assert torch.allclose(flows.norm(dim=0)[inside], torch.ones(1))


def test_touching_objects_do_not_mix_flows() -> None:
    both = discs(60, [(30, 22), (30, 38)], 12)[None]
    together = flows_from_masks(both)
    for label in (1, 2):
        alone = flows_from_masks((both == label).int())
        assert torch.equal(together * (both == label)[:, None], alone)


@pytest.mark.parametrize("method", ["bilinear", "doubling"])
def test_perfect_flows_give_the_masks_back(method: str) -> None:
    labels = torch.stack([discs(64, [(16, 16), (16, 33), (45, 40)], 10), discs(64, [(0, 30), (40, 40)], 14)])
    masks = masks_from_flows(*field_of(labels), steps=200, method=method)
    assert all(same_objects(a, b, 0.97) for a, b in zip(labels, masks, strict=True))


def test_outlines_are_native_when_walks_are_coarse() -> None:
    labels = discs(96, [(30, 30), (30, 58), (70, 48)], 16)[None]
    flows, logit = field_of(labels)
    flows, coarse = F.interpolate(flows, (48, 48), mode="area"), F.avg_pool2d(logit, 2)
    masks = masks_from_flows(flows, coarse, steps=100, method="doubling", outline_logit=logit)
    assert masks.shape == labels.shape
    assert torch.equal(masks > 0, labels > 0)  # the outline is exactly the native one
    assert same_objects(labels[0], masks[0], 0.97)
    coarse_masks = masks_from_flows(flows, coarse, steps=100, method="doubling")
    enlarged = F.interpolate(coarse_masks[None].float(), (96, 96))[0].int()
    assert iou_matrix(labels[0].numpy(), masks[0].numpy()).max(1).mean() > (
        iou_matrix(labels[0].numpy(), enlarged[0].numpy()).max(1).mean()
    )


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bilinear", "doubling"]), st.sampled_from([0.0, 0.4]), st.booleans())
def test_an_image_does_not_depend_on_its_batch(seed: int, method: str, threshold: float, native: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    smooth = F.avg_pool2d(torch.randn(5, 3, 52, 44, generator=generator), 5, 1)
    flows, logit = smooth[:, :2] * 15, smooth[:, 2] * torch.tensor([1.0, 1, -1, 0, 1])[:, None, None] + 0.05
    fine = F.interpolate(logit[:, None], (97, 91), mode="bilinear")[:, 0]

    def recover(chosen: torch.Tensor) -> torch.Tensor:
        return masks_from_flows(
            flows[chosen],
            logit[chosen],
            steps=60,
            method=method,
            flow_threshold=threshold,
            min_size=5,
            outline_logit=fine[chosen] if native else None,
        )

    together = recover(torch.arange(5))
    order = torch.randperm(5, generator=generator)
    assert torch.equal(recover(order), together[order])
    for i in range(5):
        assert torch.equal(recover(torch.tensor([i]))[0], together[i])


def test_small_large_and_wrong_objects_go() -> None:
    labels = discs(64, [(12, 12)], 5)
    labels = torch.where(discs(64, [(40, 40)], 22) > 0, 2, labels)[None]
    flows, logit = field_of(labels)
    options = {"steps": 200, "min_size": 0}
    assert masks_from_flows(flows, logit, **options).max() == 2
    assert same_objects(masks_from_flows(flows, logit, **options | {"min_size": 100})[0], (labels == 2)[0].int(), 0.97)
    assert same_objects(
        masks_from_flows(flows, logit, **options, max_size_fraction=0.3)[0], (labels == 1)[0].int(), 0.97
    )
    wrong = flows.clone()
    wrong[..., 17:, :] *= 0.1  # points the right way, much too short: mean squared error about 0.8
    assert masks_from_flows(wrong, logit, **options | {"steps": 2000}, flow_threshold=0.4).max() == 1


def test_nothing_gives_nothing() -> None:
    for method in ("bilinear", "doubling"):
        masks = masks_from_flows(torch.zeros(2, 2, 16, 16), torch.full((2, 16, 16), -1.0), steps=10, method=method)
        assert masks.shape == (2, 16, 16) and masks.dtype == torch.int32 and not masks.any()
    assert masks_from_flows(torch.zeros(0, 2, 16, 16), torch.zeros(0, 16, 16), steps=10).shape == (0, 16, 16)
    assert not flows_from_masks(torch.zeros(2, 8, 8, dtype=torch.int32)).any()


def test_shapes_and_methods_are_checked() -> None:
    flows, logit = torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match="expected \\(B, 2, h, w\\)"):
        masks_from_flows(flows, torch.zeros(1, 8, 9), steps=1)
    with pytest.raises(ValueError, match="expected \\(1, H, W\\)"):
        masks_from_flows(flows, logit, steps=1, outline_logit=torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="'bilinear' or 'doubling'"):
        masks_from_flows(flows, logit, steps=1, method="nearest")


def test_renumber_follows_raster_order_in_each_image() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, 0, 3], labels[0, 1, 0], labels[0, 3, 3], labels[1, 2, 2] = 9, 4, 9, 2
    numbered = renumber(labels)
    assert numbered[0, 0, 3] == numbered[0, 3, 3] == 1 and numbered[0, 1, 0] == 2 and numbered[1, 2, 2] == 1


def filled_in_turn(labels: np.ndarray) -> np.ndarray:
    """The plain way: each object in turn, its holes by a flood from outside."""
    out = labels.copy()
    for label in range(1, labels.max() + 1):
        out[ndimage.binary_fill_holes(out == label)] = label
    return out


@golden
@pytest.mark.parametrize("name", ["cells_A_masks_raw", "nuclei_A_masks_raw"])
def test_holes_of_real_masks(expected: dict[str, np.ndarray], name: str) -> None:
    raw = expected[name].astype(np.int64)
    filled = fill_holes(unique_ids(torch.from_numpy(raw)))
    reference = torch.from_numpy(np.stack([filled_in_turn(labels) for labels in raw]))
    assert (filled != unique_ids(torch.from_numpy(raw))).any()
    assert torch.equal(renumber(filled), renumber(unique_ids(reference)))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_rings_within_rings_are_filled_like_one_by_one(seed: int) -> None:
    """Discs and rings of all sizes over one another, some cut by the border; each label in one piece."""
    rng = np.random.default_rng(seed)
    batch = np.zeros((4, 40, 40), np.int64)
    yy, xx = np.mgrid[:40, :40]
    for image in batch:
        for label in range(1, rng.integers(2, 8)):
            distance = np.hypot(yy - rng.uniform(-3, 43), (xx - rng.uniform(-3, 43)) * rng.uniform(0.7, 1.4))
            radius = rng.uniform(2, 17)
            image[(distance < radius) & (distance > rng.choice([-1, 0.5, 0.8]) * radius)] = label
        parts = np.stack([ndimage.label(image == label)[0] for label in range(1, image.max() + 1)] or [image])
        image[...] = np.where((parts > 1).any(0), 0, image)  # one piece a label: pieces cannot enclose each other
    filled = fill_holes(unique_ids(torch.from_numpy(batch)))
    reference = torch.from_numpy(np.stack([filled_in_turn(image) for image in batch]))
    span = int(batch.max()) + 1
    offset = torch.arange(4)[:, None, None] * span
    assert torch.equal(filled, torch.where(reference > 0, reference + offset, 0))


def test_hole_rules() -> None:
    """A hole with an island in it, and two halves that touch corner to corner: all goes to the encloser."""
    drawing = """
        1111111..
        1.....1..
        1.2.3.1..
        1.2..11..
        1111111..
        ........4
        ...55..44
        ..5..5...
        ...5.5...
        ....5....
    """
    rows = [[int(c) if c != "." else 0 for c in line.strip()] for line in drawing.split()]
    filled = fill_holes(torch.tensor([rows]))[0]
    assert (filled[:5, :7] == 1).all()
    assert filled[7:9, 3:5].tolist() == [[5, 5], [5, 5]]
    assert (filled == 4).sum() == 3 and filled[5, 7] == 0
