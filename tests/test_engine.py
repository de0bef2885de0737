"""The scoring path waits for its device a bounded number of times a batch, however many images and objects it holds.

Counted on the CPU under a dispatch mode: operations whose result size or Python value depends on data make a CUDA
stream wait for the host, and so does every copy off the device.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from bundled import bundled
from torch.utils._python_dispatch import TorchDispatchMode

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.phantom import render_dataset
from biorewards.rewards import suite
from biorewards.scoring_tables import value_array

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero"}
#: 47 bincounts, 18 nonzeros and some 80 masks a batch; rounds of joining runs and of following flows add a few, with
#: the logarithm of the longest chain.
MOST = 220


class HostWaits(TorchDispatchMode):
    """Counts what would make a CUDA stream wait, and copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen[name] += 1
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.seen["index by mask"] += 1
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(args[0], torch.Tensor) and out.device != args[0].device:
            self.seen["copy between devices"] += 1
        return out


def waits(assay: Assay, images: torch.Tensor) -> Counter[str]:
    target = torch.ones(len(images), dtype=torch.int64)
    with HostWaits() as mode, torch.inference_mode():
        value_array(suite(assay)(Batch(images, target, assay)), len(images))
    return mode.seen


def crops(n: int) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(render_dataset(n, 96, 5).images, -1, 1).copy()).float() / 255


@pytest.mark.parametrize("n", [1, 8, 128])
def test_host_waits_do_not_grow_with_the_batch(n: int) -> None:
    seen = waits(bundled("phantom"), crops(n))
    assert 50 < sum(seen.values()) <= MOST, dict(seen)


def test_the_count_would_notice_a_loop_over_images() -> None:
    """The same images one by one wait once more for each: what the test above would fail on."""
    images = crops(8)
    with HostWaits() as mode, torch.inference_mode():
        for one in images:
            bundled("phantom").segment(one[None])
    assert sum(mode.seen.values()) > MOST


def test_bfloat16_is_another_fingerprint_and_nearly_the_same_masks() -> None:
    plain = bundled("phantom")
    fast = plain.with_precision("bfloat16")
    assert fast.fingerprint != plain.fingerprint and fast.with_precision("float32").fingerprint == plain.fingerprint
    assert suite(fast).fingerprint != suite(plain).fingerprint
    images = crops(48)
    with torch.inference_mode():
        a, b = plain.segment(images), fast.segment(images)
        p, q = plain.class_probabilities(images), fast.class_probabilities(images)
    assert p is not None and q is not None
    assert not torch.equal(p, q), "bfloat16 was not used"
    assert float((p - q).abs().max()) < 0.1 and float((p.argmax(1) == q.argmax(1)).float().mean()) > 0.9
    for one, other in zip(a, b, strict=True):
        both, either = (one > 0) & (other > 0), (one > 0) | (other > 0)
        assert float(both.sum() / either.sum()) > 0.98
        assert float((one.flatten(1).amax(1) == other.flatten(1).amax(1)).float().mean()) > 0.9


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision 'int8'; choose from float32, bfloat16"):
        bundled("phantom").with_precision("int8")


@pytest.mark.cuda
def test_cuda_agrees_with_cpu() -> None:
    images = crops(64)
    target = torch.ones(64, dtype=torch.int64)
    assay = Assay.load("phantom")
    there = Assay.load("phantom").to("cuda")
    with torch.inference_mode():
        slow = suite(assay)(Batch(images, target, assay))
        fast = suite(there)(Batch(images.cuda(), target.cuda(), there))
    for name, score in slow.scores.items():
        other = fast.scores[name].value
        assert other.is_cuda
        torch.testing.assert_close(other.cpu(), score.value, atol=2e-3, rtol=1e-3)
