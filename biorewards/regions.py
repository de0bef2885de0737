"""Region measures of label images, for a whole batch at once.

Every measure is a sum over pixels. Sums over a run of equal pixels in a row have closed forms, so a batch is
measured by adding up its runs under the key `image * (largest label + 1) + label`: there is no loop over images
or objects. All sums are exact (multiples of 1/4 below 2^51 in float64), hence the same on every device and in any
batch.

Values equal `skimage.measure.regionprops` (area exactly, the rest to float32 rounding), where each label is
measured alone: a pixel of another label counts as background, and so does everything beyond the image edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.lookup import look_up


@dataclass(frozen=True)
class Regions:
    """Objects of a batch as a flat table: one row an object, sorted by image, then by label.

    image, label: (N,) int64. area: (N,) float32, px. perimeter: (N,) float32, Crofton estimate from 4
    directions, px. form_factor: (N,) float32, 4 pi area / perimeter^2, 1 for a disc (a little above for very
    small objects, where the estimate is coarse). eccentricity: (N,) float32 in [0, 1), 0 for a disc.
    centroid_y, centroid_x: (N,) float32, px, pixel centres at integers. touches_border: (N,) bool, a pixel
    lies in the outermost row or column. n_images: images in the batch, also those without an object.
    """

    image: Tensor
    label: Tensor
    area: Tensor
    perimeter: Tensor
    form_factor: Tensor
    eccentricity: Tensor
    centroid_y: Tensor
    centroid_x: Tensor
    touches_border: Tensor
    n_images: int

    def __len__(self) -> int:
        return len(self.image)


def measure_regions(labels: Tensor) -> Regions:
    """Measure every object of a batch of label images.

    labels: (B, H, W), any integer dtype, 0 = background; ids may have gaps. Returns `Regions` on the same
    device. Raises ValueError for another shape, a float dtype or a negative label.

    Perimeter: Crofton formula with 4 directions (Legland et al. 2007; the counts behind
    `skimage.measure.perimeter_crofton(directions=4)`): pi/4 for every pixel whose left or upper neighbour is
    outside the object, pi/(4 sqrt 2) for every pixel whose upper left or upper right one is.
    """
    if labels.ndim != 3:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected (B, H, W)")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {labels.dtype}; expected integers (0 = background)")
    n_images, height, width = labels.shape
    padded = F.pad(labels, (1, 1, 1, 0))
    above = padded[:, :-1, 1:-1] != labels
    diagonal = (padded[:, :-1, :-2] != labels).byte() + (padded[:, :-1, 2:] != labels)

    begins = padded[:, 1:, :-2] != labels
    begins[:, :, :1] = True
    at = begins.view(-1).nonzero().squeeze(1)  # every run, also of background
    ends = F.pad(at, (0, 1), value=labels.numel())[1:]
    own = look_up(labels.reshape(-1), at)
    some = own.nonzero().squeeze(1)
    at, ends, own = (look_up(x, some) for x in (at, ends, own))
    if not len(at):
        return _table(torch.zeros(0, 9, dtype=torch.float64, device=labels.device), at, own.long(), n_images)

    image, y, x = at // (height * width), at // width % height, at % width
    length = (ends - at).double()
    middle = x + (length - 1) / 2
    straight = _run_sums(above, at, ends) + 1  # the run's first pixel has another label to its left
    border = (x == 0) | (x + length == width) | (y == 0) | (y == height - 1)
    terms = (
        length,
        length * y,
        length * middle,
        length * y * y,
        length * middle**2 + length * (length**2 - 1) / 12,
        length * middle * y,
        straight,
        _run_sums(diagonal, at, ends),
        border,
    )
    key, span = _keys(image, own)
    sums = torch.stack([torch.bincount(key, weights=term.double(), minlength=span) for term in terms], 1)
    present = sums[:, 0].nonzero().squeeze(1)
    first = torch.empty(span, dtype=torch.int64, device=labels.device)
    first[key] = torch.arange(len(key), device=labels.device)  # any run of the object tells its image and label
    member = first[present]
    return _table(sums[present], image[member], own[member].long(), n_images)


def _run_sums(values: Tensor, at: Tensor, ends: Tensor) -> Tensor:
    """Sum of small integers over each run of pixels."""
    total = F.pad(values.reshape(-1).cumsum(0, dtype=torch.int64), (1, 0))
    return look_up(total, ends) - look_up(total, at)


def _keys(image: Tensor, label: Tensor) -> tuple[Tensor, int]:
    """One number an object, in the order image, label; and how many numbers there may be."""
    if not len(label):
        return image, 0
    low, high = (int(v) for v in label.aminmax())
    if low < 0:
        raise ValueError(f"labels hold the negative value {low}; expected 0 for background and positive ids")
    key = image * (high + 1) + label
    span = (int(image[-1]) + 1) * (high + 1)
    if span > 16 * len(key) + 4096:  # sparse ids: counting them would cost more memory than the image
        _, key = torch.unique(key, return_inverse=True)
        span = int(key.max()) + 1
    return key, span


def _table(sums: Tensor, image: Tensor, label: Tensor, n_images: int) -> Regions:
    area, sum_y, sum_x, sum_yy, sum_xx, sum_yx, straight, diagonal, border = sums.unbind(1)
    perimeter = math.pi / 4 * (straight + diagonal / math.sqrt(2))
    centroid_y, centroid_x = sum_y / area, sum_x / area
    # Covariance of the pixel centres; its eigenvalues are the squared half axes (over 4) of the ellipse with
    # the same second moments. No 1/12 for the pixel's own extent: scikit-image has none.
    var_y = (sum_yy / area - centroid_y**2).clamp(min=0)
    var_x = (sum_xx / area - centroid_x**2).clamp(min=0)
    cov = sum_yx / area - centroid_y * centroid_x
    gap = torch.sqrt((var_y - var_x) ** 2 + 4 * cov**2)
    major = (var_y + var_x + gap) / 2
    minor = ((var_y + var_x - gap) / 2).clamp(min=0)
    # An object whose variances are rounding residue (one pixel) has no direction.
    eccentricity = torch.where(major > 1e-9, torch.sqrt((1 - minor / major.clamp(min=1e-9)).clamp(min=0)), 0.0)
    return Regions(
        image=image,
        label=label,
        area=area.float(),
        perimeter=perimeter.float(),
        form_factor=(4 * math.pi * area / perimeter**2).float(),
        eccentricity=eccentricity.float(),
        centroid_y=centroid_y.float(),
        centroid_x=centroid_x.float(),
        touches_border=border > 0,
        n_images=n_images,
    )


def counts(regions: Regions) -> Tensor:
    """Objects an image: (B,) int64."""
    return torch.bincount(regions.image, minlength=regions.n_images)


def image_max(regions: Regions, values: Tensor) -> Tensor:
    """Largest of `values` (N,) in each image: (B,) float32, NaN where an image has no object."""
    out = torch.full((regions.n_images,), -math.inf, device=values.device)
    out = out.scatter_reduce(0, regions.image, values.float(), "amax")
    return torch.where(counts(regions) > 0, out, math.nan)


def image_mean(regions: Regions, values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of `values` (N,) over each image's objects: (B,) float32, NaN where there are none.

    where: (N,) bool, objects to use; an image of which no object is chosen is NaN too.
    """
    image = regions.image
    if where is not None:
        image, values = image[where], values[where]
    total = torch.bincount(image, weights=values.double(), minlength=regions.n_images)
    return (total / torch.bincount(image, minlength=regions.n_images)).float()


def nuclear_containment(nuclei: Tensor, cells: Tensor) -> Tensor:
    """Share of each image's nuclear pixels that lie in any cell: (B,) float32, NaN without a nuclear pixel.

    nuclei, cells: (B, H, W) integer labels (or masks), 0 = background. Raises ValueError when shapes differ.
    """
    if nuclei.shape != cells.shape:
        raise ValueError(f"nuclei have shape {tuple(nuclei.shape)}, cells {tuple(cells.shape)}; expected the same")
    nuclear = (nuclei > 0).flatten(1)
    inside = (nuclear & (cells > 0).flatten(1)).sum(1)
    return inside.float() / nuclear.sum(1).float()
