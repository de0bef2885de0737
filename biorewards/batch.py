"""A batch of crops with the masks and region measures that all rewards share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from biorewards.regions import Regions, measure_regions

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from biorewards.segmentation.segmenter import Masks

#: A crop whose largest channel span (max - min, in [0, 1] units) is below this has no contrast: 2/255 is two
#: grey levels of an 8-bit file.
BLANK_SPAN = 2 / 255

T = TypeVar("T")


class cached(Generic[T]):
    """A property computed once an instance.

    Not `functools.cached_property`: before Python 3.12 that holds one lock for all instances while it computes, so that
    batches judged in two threads wait for each other (one-off measurement: 107 images a second, 174 without).
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        # Not a data descriptor: from now on the instance's own attribute is found first.
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


class Batch:
    """Crops of one size, their targets, and what is computed from them once.

    images: (B, C, H, W) float32 in [0, 1], any device. Non-finite pixels and crops without contrast are
        accepted: they are marked in `blank` and no object is looked for in them.
    target: (B,) int64, index into `assay.classes`; -1 = no label, -2 = a label that the assay does not know.
    """

    def __init__(self, images: Tensor, target: Tensor | None, assay: Assay) -> None:
        if images.ndim != 4 or images.shape[1] != assay.n_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; assay {assay.name!r} wants (B, {assay.n_channels}, H, W)"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; pass float32 in [0, 1] (uint8 / 255)")
        self.raw = images
        self.assay = assay
        self.target = (
            torch.full((len(images),), -1, device=images.device) if target is None else target.to(images.device)
        )
        if self.target.shape != (len(images),):
            raise ValueError(f"target has shape {tuple(self.target.shape)}; {len(images)} images want ({len(images)},)")

    def __len__(self) -> int:
        return len(self.raw)

    @cached
    def finite(self) -> Tensor:
        """(B,) bool: all pixels are finite."""
        return torch.isfinite(self.raw).flatten(1).all(1)

    @cached
    def images(self) -> Tensor:
        """(B, C, H, W) float32 in [0, 1]; crops with non-finite pixels are all zero."""
        clean = torch.where(
            self.finite[:, None, None, None], self.raw, torch.zeros((), device=self.raw.device, dtype=self.raw.dtype)
        )
        return clean.float().clamp(0, 1)

    @cached
    def blank(self) -> Tensor:
        """(B,) bool: non-finite pixels, or no channel with a span of at least `BLANK_SPAN`."""
        flat = self.images.flatten(2)
        return ~self.finite | ((flat.amax(2) - flat.amin(2)).amax(1) < BLANK_SPAN)

    @cached
    def masks(self) -> Masks:
        """Instance labels of nuclei and cells, (B, H, W) int32 each, from the assay's segmenter."""
        masks = self.assay.segment(self.images)
        keep = ~self.blank[:, None, None]
        return type(masks)(masks.nuclei * keep, masks.cells * keep)

    @cached
    def class_probabilities(self) -> Tensor | None:
        """(B, n) calibrated probabilities over the classifier's own classes; None when the assay has no classifier."""
        return self.assay.class_probabilities(self.images)

    @property
    def nuclei(self) -> Tensor:
        return self.masks.nuclei

    @property
    def cells(self) -> Tensor:
        return self.masks.cells

    @cached
    def nucleus_regions(self) -> Regions:
        return measure_regions(self.nuclei)

    @cached
    def cell_regions(self) -> Regions:
        return measure_regions(self.cells)
