"""The contract that every reward keeps."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import assay, disc, image, random_crop
from skimage.measure import perimeter_crofton, regionprops
from torch import Tensor

from biorewards.batch import Batch
from biorewards.reward import UNSCORED, Reason, Reward, Suite
from biorewards.rewards import MEASURES, PAPER_WEIGHTS, suite

NAMES = list(PAPER_WEIGHTS)
WORST = {name: 0.0 if name in ("moa", "nucleus_in_cytoplasm") else -25.0 for name in NAMES}


def reward(name: str) -> Reward:
    return suite(assay(), [name]).rewards[name]


def crops(n: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.stack([image(*random_crop(seed), brightness=0.2 + 0.1 * seed) for seed in range(n)])
    return images, torch.tensor([0, 1, 0, 1, 0, 1])[:n]


def score(name: str, images: Tensor, target: Tensor | None, **kwargs: object):
    return reward(name)(Batch(images, target, assay(**kwargs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_single_calls_in_any_order(name: str) -> None:
    images, target = crops()
    together = score(name, images, target)
    for i in range(len(images)):
        alone = score(name, images[i : i + 1], target[i : i + 1])
        torch.testing.assert_close(alone.value[0], together.value[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.measure[0], together.measure[i], atol=1e-4, rtol=1e-6)
        assert alone.reason[0] == together.reason[i]
    back = torch.arange(len(images) - 1, -1, -1)
    torch.testing.assert_close(score(name, images[back], target[back]).value, together.value[back], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_does_not_depend_on_the_other_rewards_of_a_suite(name: str) -> None:
    images, target = crops()
    alone = score(name, images, target)
    among = suite(assay())(Batch(images, target, assay())).scores[name]
    assert torch.equal(alone.value, among.value) and torch.equal(alone.measure, among.measure)


@pytest.mark.parametrize("name", NAMES)
def test_same_call_twice_and_the_input_is_left_alone(name: str) -> None:
    images, target = crops()
    before = images.clone()
    first, second = score(name, images, target), score(name, images, target)
    assert torch.equal(first.value, second.value) and torch.equal(images, before)
    assert (
        first.value.dtype == torch.float32
        and first.measure.dtype == torch.float32
        and first.reason.dtype == torch.uint8
    )
    torch.testing.assert_close(score(name, images.double(), target).value, first.value, atol=1e-6, rtol=1e-6)


def _in_another_process(name: str, answer) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    images, target = crops()
    answer.put((reward(name).name, score(name, images, target).value.tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_pickle_and_deepcopy(name: str) -> None:
    images, target = crops()
    batch = Batch(images, target, assay())
    judge = reward(name)
    for other in (pickle.loads(pickle.dumps(judge)), copy.deepcopy(judge)):
        assert other.name == name and torch.equal(other(batch).value, judge(batch).value)


def test_rewards_work_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_in_another_process, args=("nucleus_size", answer))
    process.start()
    name, values = answer.get(timeout=120)
    process.join()
    images, target = crops()
    assert name == "nucleus_size" and values == score("nucleus_size", images, target).value.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_label_ids_may_be_permuted_and_gapped(name: str) -> None:
    nuclei, cells = random_crop(3)
    ids = np.array([0, 40, 7, 99, 12, 3])
    target = torch.tensor([0])
    plain = score(name, image(nuclei, cells)[None], target)
    renamed = score(name, image(ids[nuclei], ids[cells])[None], target)
    torch.testing.assert_close(plain.value, renamed.value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_flips_and_quarter_turns_do_not_matter_to_exact_masks(name: str) -> None:
    picture, target = image(*random_crop(5)), torch.tensor([1])
    plain = score(name, picture[None], target)
    for turned in (picture.flip(1), picture.flip(2), torch.rot90(picture, 1, (1, 2)), torch.rot90(picture, 2, (1, 2))):
        torch.testing.assert_close(score(name, turned[None].contiguous(), target).value, plain.value, atol=2e-5, rtol=0)


def empty() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((96, 96), int), np.zeros((96, 96), int)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_there_is_the_worst_with_a_reason(name: str) -> None:
    result = score(name, image(*empty())[None], torch.tensor([0]))
    assert result.value.item() == WORST[name]
    assert Reason(int(result.reason)) in (Reason.NO_NUCLEUS, Reason.NO_CELL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [0.0, 1.0, 0.37, float("nan"), float("inf")])
def test_blank_and_non_finite_crops_are_the_worst(name: str, fill: float) -> None:
    result = score(name, torch.full((1, 3, 96, 96), fill), torch.tensor([0]))
    assert result.value.item() == WORST[name] and int(result.reason) == Reason.BLANK


@pytest.mark.parametrize("name", NAMES)
def test_one_nan_pixel_condemns_its_own_crop_only(name: str) -> None:
    images, target = crops()
    good = score(name, images, target)
    images[2, 0, 5, 5] = torch.nan
    bad = score(name, images, target)
    assert bad.value[2] == WORST[name]
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(bad.value[rest], good.value[rest])


@pytest.mark.parametrize("name", NAMES)
def test_one_object_an_object_at_the_border_and_a_giant_give_numbers(name: str) -> None:
    for y, x, radius in ((48, 48, 12), (0, 0, 14), (48, 48, 90)):
        nuclei, cells = empty()
        disc(cells, 1, y, x, radius * 1.5)
        disc(nuclei, 1, y, x, radius)
        result = score(name, image(nuclei, cells)[None], torch.tensor([0]))
        assert (
            torch.isfinite(result.value).all()
            and result.value.item() >= WORST[name]
            and int(result.reason) == Reason.OK
        )


def test_wrong_channel_count_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="wants"):
        Batch(torch.zeros(1, 2, 96, 96), None, assay())
    with pytest.raises(ValueError, match="float32"):
        Batch(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), None, assay())
    with pytest.raises(ValueError, match="target has shape"):
        Batch(torch.zeros(1, 3, 96, 96), torch.zeros(2, dtype=torch.int64), assay())


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_missing_unknown_or_without_reference(name: str) -> None:
    images, _ = crops(4)
    result = score(name, images, torch.tensor([-1, -2, 3, 2]))
    reasons = [Reason(int(r)) for r in result.reason]
    if name == "nucleus_in_cytoplasm":
        assert reasons == [Reason.OK] * 4 and torch.isfinite(result.value).all()
        return
    assert reasons[:3] == [
        Reason.NO_TARGET,
        Reason.UNKNOWN_TARGET,
        Reason.NO_REFERENCE if name == "moa" else Reason.POOLED_REFERENCE,
    ]
    # "rare" stands on 5 images: pooled statistics, but its own classifier output.
    assert reasons[3] == (Reason.OK if name == "moa" else Reason.POOLED_REFERENCE)
    for value, reason in zip(result.value, reasons, strict=True):
        assert bool(torch.isnan(value)) == (reason in UNSCORED)


@pytest.mark.parametrize("name", NAMES)
def test_invalid_is_never_better_than_the_fifth_percentile_of_valid_crops(name: str) -> None:
    images = torch.stack([image(*random_crop(seed)) for seed in range(60)])
    valid = score(name, images, torch.zeros(60, dtype=torch.int64)).value
    missing = score(name, image(*empty())[None], torch.tensor([0])).value
    assert missing.item() <= torch.quantile(valid, 0.05).item()


def lesion(name: str, dose: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A crop that is right at dose 0 (for DMSO in `exact.MEAN_SD`) and worse with the dose, 0 to 1."""
    nuclei, cells = np.zeros((192, 192), int), np.zeros((192, 192), int)
    for label, (y, x) in enumerate(((40, 40), (40, 130), (130, 40)), 1):
        disc(cells, label, y, x, 30.9 * (1 + 0.5 * dose * (name == "cytoplasm_size")))
        stretch = 1 + (0.6 + 2 * dose) * (name == "nucleus_roundness")
        radius = 16.9 * (1 - 0.6 * dose * (name == "nucleus_size"))
        yy, xx = np.mgrid[:192, :192]
        inside = ((yy - y) / (1 / stretch**0.5)) ** 2 + (
            (xx - x - 50 * dose * (name == "nucleus_in_cytoplasm")) / stretch**0.5
        ) ** 2
        nuclei[inside <= radius**2] = label
    extra = round(6 * dose)
    for k in range(extra):
        if name == "nucleus_count":
            disc(nuclei, 10 + k, 120 + 10 * (k // 3), 120 + 22 * (k % 3), 4)
        if name == "cytoplasm_count":
            disc(cells, 10 + k, 110 + 20 * (k // 3), 110 + 24 * (k % 3), 6)
    return nuclei, cells, 0.05 + 0.8 * dose


@pytest.mark.parametrize("name", NAMES)
def test_worse_with_the_dose_of_its_own_lesion(name: str) -> None:
    values = [score(name, image(*lesion(name, d))[None], torch.tensor([0])).value.item() for d in np.linspace(0, 1, 7)]
    assert all(a >= b for a, b in pairwise(values)), values
    assert values[0] > values[-1] + 0.3


def slow(name: str, nuclei: np.ndarray, cells: np.ndarray, pixel: float) -> float:
    """The measure in plain scikit-image."""
    if name == "nucleus_in_cytoplasm":
        return float((cells[nuclei > 0] > 0).mean())
    if name.endswith("count"):
        areas = np.bincount((nuclei if name[0] == "n" else cells).ravel())[1:]
        return float((areas >= max(1, (0.05 if name[0] == "n" else 0.5) * np.pi / 4 * 8**2)).sum())
    props = regionprops(cells if name.startswith("cyto") else nuclei)
    if name.endswith("size"):
        return max(p.area for p in props) * pixel**2
    rounds = [
        (4 * np.pi * p.area / perimeter_crofton(p.image, 4) ** 2, min(p.bbox[:2]) == 0 or max(p.bbox[2:]) == 96)
        for p in props
    ]
    return float(np.mean([r for r, cut in rounds if not cut] or [r for r, _ in rounds]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "moa"])
@pytest.mark.parametrize("pixel", [None, 0.5])
def test_equals_a_slow_reference(name: str, pixel: float | None) -> None:
    for seed in range(12):
        nuclei, cells = random_crop(seed)
        result = score(name, image(nuclei, cells)[None], torch.tensor([1]), pixel_size=pixel)
        expected = slow(name, nuclei, cells, pixel or 1.0)
        assert result.measure.item() == pytest.approx(expected, rel=1e-4)
        if name in MEASURES:
            rows = assay(pixel).statistics.set_index(["measure", "class"]).loc[(name, "small")]
            z = np.clip((expected - rows["mean"]) / rows["sd"], -5, 5)
            assert result.value.item() == pytest.approx(-(z**2), rel=1e-3, abs=1e-4)


def test_slivers_at_the_border_are_not_counted() -> None:
    """8 px nuclei: a cell counts from 26 px, a nucleus from 3 px."""
    nuclei, cells = random_crop(4)
    plain = [score(n, image(nuclei, cells)[None], torch.tensor([0])).measure.item() for n in NAMES[-2:]]
    cells[0, :25], nuclei[95, 94:] = 77, 78
    assert [score(n, image(nuclei, cells)[None], torch.tensor([0])).measure.item() for n in NAMES[-2:]] == plain
    cells[0, :27], nuclei[95, 91:] = 77, 78
    assert [score(n, image(nuclei, cells)[None], torch.tensor([0])).measure.item() for n in NAMES[-2:]] == [
        p + 1 for p in plain
    ]


def test_moa_is_the_probability_of_the_target() -> None:
    images, _ = crops(1)
    batch = Batch(images, torch.tensor([1]), assay())
    probabilities = batch.class_probabilities
    assert probabilities is not None
    assert reward("moa")(batch).value.item() == pytest.approx(probabilities[0, 1].item())
    none = reward("moa")(Batch(images, torch.tensor([1]), assay(classifier=False)))
    assert torch.isnan(none.value).all() and int(none.reason) == Reason.NO_REFERENCE


def test_suite_totals_weights_and_fingerprint() -> None:
    images, target = crops()
    judge = suite(assay())
    result = judge(Batch(images, target, assay()))
    expected = sum(PAPER_WEIGHTS[name] * s.value for name, s in result.scores.items())
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(result.total_label_free, 2 * result.scores["nucleus_in_cytoplasm"].value)
    unlabelled = judge(Batch(images, None, assay()))
    assert unlabelled.total.isnan().all() and unlabelled.total_label_free.isfinite().all()
    assert judge.fingerprint == suite(assay()).fingerprint != suite(assay(), weights={"moa": 4.0}).fingerprint
    with pytest.raises(ValueError, match="two rewards"):
        Suite([reward("moa"), reward("moa")])
    with pytest.raises(ValueError, match="unknown rewards"):
        suite(assay(), ["roundness"])
    with pytest.raises(ValueError, match="unknown rewards"):
        Suite([reward("moa")], {"speed": 1.0})


def test_every_shipped_reward_keeps_the_protocol() -> None:
    for judge in suite(assay()).rewards.values():
        assert isinstance(judge, Reward) and judge.name in NAMES
