"""Flows from masks: what a flow network is trained on, and what the flow check compares with.

Every object gets unit vectors towards its centre, found by letting heat diffuse from the centre inside the
object and following its gradient (Stringer et al. 2021; the CPU variant of Cellpose 3, in which each object
is treated alone, so neighbours that touch do not mix).

All objects of a batch diffuse together: their bounding boxes are stacked into one tall strip of common width,
separated by a blank row and column, and one round is five shifted additions over the strip. Objects that need
the most rounds come first, so that an object whose rounds are over drops off the strip's end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.lookup import look_up

#: Flow errors this near to the threshold are worked out anew in float64; float32 moves none by more than 0.02.
DOUBT = 0.05


def unique_ids(labels: Tensor) -> Tensor:
    """Labels made unique over the batch: (B, H, W) int64, 0 stays background, order within an image kept."""
    span = int(labels.max()) + 1 if labels.numel() else 1
    image = torch.arange(len(labels), device=labels.device)[:, None, None]
    return torch.where(labels > 0, labels + image * span, 0)


def flows_from_masks(labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors towards each object's centre.

    labels: (B, H, W) integer labels, 0 = background. dtype: of the heat.
    Returns (B, 2, H, W) float32, order Y, X; zero outside objects and where the heat has no slope.

    The centre is the object's pixel nearest to its mean position (first in raster order on ties). With h and
    w the sides of its bounding box, each plus 2, heat is added at the centre and averaged over the 3x3
    neighbourhood within the object 2 (h + w) times. The flow is the central difference, divided by its length.
    Heat is float64: far from the centre it falls below float32's resolution (flow errors off by up to 0.02), which
    takes half the time.
    """
    n_images, height, width = labels.shape
    out = torch.zeros(n_images * height * width, 2, device=labels.device)
    ids = unique_ids(labels).reshape(-1)
    pixel = ids.nonzero().squeeze(1)
    if not len(pixel):
        return out.view(n_images, height, width, 2).permute(0, 3, 1, 2)
    x, y = (look_up(side, pixel) for side in _places(n_images, height, width, labels.device))
    present, own = torch.unique(look_up(ids, pixel), return_inverse=True)
    n_objects = len(present)

    top, bottom, left, right = _boxes(own, y, x, n_objects)
    box_height, box_width = bottom - top + 1, right - left + 1
    rounds = 2 * (box_height + box_width + 4)
    order = torch.argsort(rounds, descending=True, stable=True)
    stride = int(box_width.max()) + 1
    ends = torch.cumsum(box_height[order] + 1, 0)  # rows used up to and with each object
    start = torch.empty_like(ends)
    start[order] = ends - box_height[order] - 1
    place = look_up((start - top + 1) * stride - left + 1, own) + y * stride + x
    centre = place[_centres(own, y, x, n_objects)]

    # How many objects (the first so many of the strip) take part in each round.
    needed = torch.bincount(rounds).flip(0).cumsum(0).flip(0)[1:]
    heat = _diffuse(place, centre[order], ends, needed.tolist(), stride, dtype)
    up, down, left, right = (look_up(heat, place + step) for step in (-stride, stride, -1, 1))
    gradient = torch.stack([down - up, right - left], 1)
    # Where opposite slopes cancel (the centre of a symmetric object) rounding leaves a residue without direction.
    length = gradient.square().sum(1).sqrt()
    least = 1e-10 if dtype == torch.float64 else 1e-6
    gradient = gradient * torch.where(length > least * look_up(heat, place), 1 / length, 0)[:, None]
    out.index_copy_(0, pixel, gradient.float())
    return out.view(n_images, height, width, 2).permute(0, 3, 1, 2).contiguous()


def _places(n_images: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of every pixel of a batch, flat: a table is ten times as fast as dividing its index."""
    x, y = torch.arange(width, device=device), torch.arange(height, device=device)
    return x.repeat(n_images * height), y.repeat_interleave(width, output_size=height * width).repeat(n_images)


def flow_errors(ids: Tensor, flows: Tensor, threshold: float | None = None) -> Tensor:
    """How far a network's flows are from those of the masks they gave.

    ids: (B, H, W) int64, unique over the batch (`unique_ids`). flows: (B, 2, H, W), 5 x unit flow, as a network
    gives them. threshold: only on which side of it errors lie matters, so those far from it may be rough (to 0.02).
    Returns (largest id + 1,) float64: for each id the mean over its pixels of the squared distance between the two
    flows (0 to 4 for unit vectors); NaN for ids that do not occur.
    """
    if threshold is None:
        return _errors(ids, flows, torch.float64)
    rough = _errors(ids, flows, torch.float32)
    doubtful = (rough - threshold).abs() < DOUBT
    if not doubtful.any():
        return rough
    exact = _errors(ids * look_up(doubtful, ids), flows, torch.float64)
    return torch.where(doubtful, F.pad(exact, (0, len(rough) - len(exact))), rough)


def _errors(ids: Tensor, flows: Tensor, dtype: torch.dtype) -> Tensor:
    distance = ((flows_from_masks(ids, dtype) - flows.float() / 5) ** 2).sum(1).reshape(-1)
    flat = ids.reshape(-1)
    pixel = flat.nonzero().squeeze(1)
    own = look_up(flat, pixel)
    total = torch.bincount(own, weights=look_up(distance, pixel).double(), minlength=int(ids.max()) + 1)
    return total / torch.bincount(own, minlength=len(total))


def _boxes(own: Tensor, y: Tensor, x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = torch.zeros(n, dtype=torch.int64, device=own.device)

    def extreme(values: Tensor, reduce: str) -> Tensor:
        return empty.scatter_reduce(0, own, values, reduce, include_self=False)

    return extreme(y, "amin"), extreme(y, "amax"), extreme(x, "amin"), extreme(x, "amax")


def _centres(own: Tensor, y: Tensor, x: Tensor, n: int) -> Tensor:
    """Index (into the pixel list) of each object's pixel nearest to its mean; exact, in integers."""
    size = torch.bincount(own, minlength=n)
    empty = torch.zeros(n, dtype=torch.int64, device=own.device)
    far_y = look_up(size, own) * y - look_up(empty.scatter_add(0, own, y), own)
    far_x = look_up(size, own) * x - look_up(empty.scatter_add(0, own, x), own)
    distance = far_y * far_y + far_x * far_x
    nearest = distance == look_up(empty.scatter_reduce(0, own, distance, "amin", include_self=False), own)
    candidate = nearest.nonzero().squeeze(1)
    return empty.scatter_reduce(0, look_up(own, candidate), candidate, "amin", include_self=False)


def _diffuse(place: Tensor, centre: Tensor, ends: Tensor, needed: list[int], stride: int, dtype: torch.dtype) -> Tensor:
    """Heat in the strip after every object's own number of rounds.

    place: (P,) position of each object pixel in the strip. centre: (N,) the centres, most rounds first.
    ends: (N,) rows up to and with each object. needed: objects that still take part, for each round.
    """
    size = (int(ends[-1]) + 1) * stride + 1
    weight = torch.zeros(size, dtype=dtype, device=place.device)
    weight.index_fill_(0, place, 1 / 9)
    heat, across, block = torch.zeros(3, size, dtype=dtype, device=place.device).unbind(0)
    source = torch.ones(len(centre), dtype=dtype, device=place.device)
    rows = ends.tolist()
    for active in needed:
        end = rows[active - 1] * stride  # objects whose rounds are over lie from here on and keep their heat
        reach = end + stride + 1
        heat.index_add_(0, centre[:active], source[:active])
        torch.add(heat[: reach - 2], heat[2:reach], out=across[1 : reach - 1])
        across[1 : reach - 1] += heat[1 : reach - 1]
        inner = slice(stride + 1, end)
        torch.add(across[1 : end - stride], across[2 * stride + 1 : end + stride], out=block[inner])
        block[inner] += across[inner]
        torch.mul(block[inner], weight[inner], out=heat[inner])
    return heat
