"""The classical segmenter on drawn cells, on nothing and on noise."""

import pytest
import torch
from torch.nn import functional as F

from biorewards.segmentation import load_segmenter
from biorewards.segmentation.classical import ClassicalSegmenter
from biorewards.segmentation.diameter import estimate_diameter
from biorewards.segmentation.matching import match

SIZE = 96
CENTRES = [(22, 24), (24, 70), (50, 47), (74, 22), (75, 75)]


def draw(radius: float, brightness: list[float] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Blurred bright discs with noise on a dark ground, (1, SIZE, SIZE), and their labels."""
    yy, xx = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    distance = torch.stack([((yy - y) ** 2 + (xx - x) ** 2).sqrt() for y, x in CENTRES])
    labels = torch.where(distance.amin(0) < radius, distance.argmin(0) + 1, 0)
    levels = torch.tensor([0.0, *(brightness or [0.8, 0.6, 1.0, 0.7, 0.9])])
    image = F.avg_pool2d(levels[labels][None, None], 3, 1, 1)[0]
    return image + 0.03 * torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), labels


def test_nuclei_and_cells_are_found() -> None:
    nucleus, nuclei = draw(9)
    cytoplasm, cells = draw(19)
    masks = load_segmenter("classical")(nucleus, cytoplasm[:, None], 18.0)
    assert masks.nuclei.dtype == masks.cells.dtype == torch.int32
    assert match(nuclei.numpy(), masks.nuclei[0].numpy(), 0.75).f1 == 1
    assert match(cells.numpy(), masks.cells[0].numpy(), 0.75).f1 == 1


def test_cells_without_a_nucleus_channel_use_their_own_shape() -> None:
    cytoplasm, cells = draw(15)
    masks = ClassicalSegmenter()(None, torch.cat([cytoplasm, cytoplasm])[None], 30.0)
    assert match(cells.numpy(), masks.cells[0].numpy(), 0.75).f1 == 1
    assert not masks.nuclei.any()


def test_a_nucleus_outside_the_cytoplasm_gets_no_cell() -> None:
    nucleus, nuclei = draw(9)
    cytoplasm, _ = draw(19, [0.8, 0.0, 1.0, 0.7, 0.9])
    masks = ClassicalSegmenter()(nucleus, cytoplasm[:, None], 18.0)
    bare = nuclei == 2
    assert (masks.nuclei[0] > 0)[bare].float().mean() > 0.9
    assert (masks.cells[0] > 0)[bare].float().mean() < 0.1
    assert masks.cells.max() == 4


def test_unequal_brightness_does_not_hide_the_dim() -> None:
    nucleus, nuclei = draw(9, [0.35, 1.0, 0.3, 0.9, 0.4])
    found = ClassicalSegmenter()(nucleus, None, 18.0).nuclei[0]
    assert match(nuclei.numpy(), found.numpy()).f1 == 1


def test_touching_nuclei_are_parted() -> None:
    nucleus, _ = draw(17)  # neighbours 4 px into each other
    assert ClassicalSegmenter()(nucleus, None, 34.0).nuclei.max() == len(CENTRES)


def noise() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    white = torch.randn(2, SIZE, SIZE, generator=generator)
    return {
        "zero": torch.zeros(2, SIZE, SIZE),
        "constant": torch.full((2, SIZE, SIZE), 0.7),
        "white": white * 0.1 + 0.3,
        "stretched": torch.rand(2, SIZE, SIZE, generator=generator),
        "weak": white * 0.004,
        "counts": torch.poisson(torch.full((2, SIZE, SIZE), 0.5), generator=generator) / 8,
        "blurred": F.avg_pool2d(torch.rand(2, 1, SIZE + 4, SIZE + 4, generator=generator), 5, 1)[:, 0] * 3,
    }


@pytest.mark.parametrize("kind", noise())
@pytest.mark.parametrize("diameter", [18.0, 36.0])
def test_nothing_is_found_in_nothing(kind: str, diameter: float) -> None:
    image = noise()[kind]
    masks = ClassicalSegmenter()(image, image[:, None], diameter)
    assert not masks.nuclei.any() and not masks.cells.any()


def test_the_diameter_is_found() -> None:
    nucleus, _ = draw(9)
    assert estimate_diameter(ClassicalSegmenter(), nucleus, None) == pytest.approx(18, rel=0.15)


def test_images_do_not_depend_on_their_batch() -> None:
    nucleus = torch.cat([draw(9)[0], noise()["white"], draw(12)[0]])
    segmenter = ClassicalSegmenter()
    together = segmenter(nucleus, nucleus[:, None], 20.0)
    for i in range(len(nucleus)):
        alone = segmenter(nucleus[i : i + 1], nucleus[i : i + 1, None], 20.0)
        assert torch.equal(alone.nuclei[0], together.nuclei[i]) and torch.equal(alone.cells[0], together.cells[i])


def test_empty_batches_and_no_channels() -> None:
    segmenter = ClassicalSegmenter()
    assert segmenter(torch.zeros(0, 8, 8), torch.zeros(0, 1, 8, 8), 20.0).nuclei.shape == (0, 8, 8)
    with pytest.raises(ValueError, match="nucleus channel, a cytoplasm channel or both"):
        segmenter(None, None, 20.0)
    assert segmenter.fingerprint == ClassicalSegmenter().fingerprint
