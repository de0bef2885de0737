"""The two short forms of the scoring path give what torch's general ones give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from biorewards.lookup import highest_near, look_up


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (2, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_look_up_is_indexing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    table = torch.randint(0, 5, (20,), generator=random).to(dtype)
    index = torch.randint(0, 20, shape, generator=random)
    assert torch.equal(look_up(table, index), table[index])
    assert torch.equal(
        look_up(table, index.mT if index.ndim > 1 else index), table[index.mT if index.ndim > 1 else index]
    )


def test_look_up_refuses_what_lies_outside() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        look_up(torch.arange(3), torch.tensor([3]))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (6, 9)])
def test_the_highest_near_is_a_3x3_maximum(size: tuple[int, int]) -> None:
    x = torch.randint(-50, 50, (3, *size), generator=torch.Generator().manual_seed(2))
    expected = F.max_pool2d(x[:, None].float(), 3, 1, 1)[:, 0]
    assert torch.equal(highest_near(x).float(), expected)
    before = x.clone()
    assert torch.equal(highest_near(x > 20), F.max_pool2d((x > 20).float()[:, None], 3, 1, 1)[:, 0] > 0)
    assert torch.equal(x, before), "the input stays as it is"
