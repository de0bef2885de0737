"""Instance masks from a network's flows, for a whole batch at once.

Every foreground pixel walks along the flows to where its object's pixels meet; pixels that meet make one
object (Stringer et al. 2021). With `method="bilinear"` and Cellpose's parameters the masks are those of
Cellpose 3 on CPU. `method="doubling"` is the fast route: a few exact steps, rounded to a map from pixel to
pixel, which composed with itself doubles the steps each time.

Walks, seeds, labels and sizes are handled for all images together, with no loop over images or objects; ties
are broken by position. The masks of one image do not depend on the others of its batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from biorewards.lookup import highest_near, look_up
from biorewards.segmentation.flow_targets import flow_errors
from biorewards.segmentation.holes import fill_holes as fill

#: Bilinear steps before doubling. Rounding stops what moves less than half a pixel in so many steps, ...
FIRST_STEPS = 8
#: ... so the few pixels where walks end (about seven a 96-pixel crop) walk on, unrounded, for so many steps. With a
#: compact network on real images F1 at IoU 0.5 is then within 0.002 of all steps unrounded; without, cells lose 0.04.
LAST_STEPS = 100
#: Bilinear steps of an outline pixel on the coarser flow grid: enough to leave the contact zone of two objects,
#: where rounding to a flow pixel could put it on the wrong side.
OUTLINE_STEPS = 3
#: Points that no longer move are taken off the list after every so many steps.
STEPS_PER_ROUND = 25
#: Half side of the window in which a seed may grow, bins, one for each round of growth.
REACH = 5


def masks_from_flows(
    flows: Tensor,
    logit: Tensor,
    *,
    steps: int = 200,
    method: Literal["bilinear", "doubling"] = "bilinear",
    threshold: float = 0.0,
    flow_threshold: float = 0.0,
    min_size: int = 15,
    min_size_inside: int = 0,
    max_size_fraction: float | None = None,
    fill_holes: bool = True,
    seed_pixels: int = 10,
    bin_pixels: int = 2,
    outline_logit: Tensor | None = None,
) -> Tensor:
    """Instance labels from flows and foreground logits.

    flows: (B, 2, h, w) float, 5 x unit flow towards the object's centre, order Y, X (a network's output).
    logit: (B, h, w) float, foreground where above `threshold`.
    steps: unit steps that a pixel walks; Cellpose: 200, or 200 x diameter / diameter the network was trained at.
    flow_threshold: objects whose mean squared distance between flows and the flows of their mask is above it
        are dropped (Cellpose: 0.4); 0 = no check.
    min_size: px; smaller objects are dropped, before and after holes are filled. 0 = keep all.
    min_size_inside: px; the same for objects that do not touch the image's border, in the end.
    max_size_fraction: objects larger than this share of the image are dropped (Cellpose: 0.4); None = keep all.
    seed_pixels, bin_pixels: more than so many walks must end in a bin for it to be a seed, and to belong to a
        seed's surroundings. Cellpose has 10 and 2.
    outline_logit: (B, H, W) float, H >= h, W >= w: walks run on the flow grid, but objects are made of the
        pixels of this finer grid, each of which joins the object that it walks to.

    Returns (B, h, w), or (B, H, W) with `outline_logit`, int32: 0 = background, the objects of each image
    numbered from 1 in raster order of their first pixel. Raises ValueError for shapes that do not fit or an
    unknown method.
    """
    n_images, axes, height, width = flows.shape
    if axes != 2 or logit.shape != (n_images, height, width):
        raise ValueError(f"flows {tuple(flows.shape)}, logit {tuple(logit.shape)}: expected (B, 2, h, w), (B, h, w)")
    if method not in ("bilinear", "doubling"):
        raise ValueError(f"method {method!r}; choose 'bilinear' or 'doubling'")
    foreground = logit > threshold
    outline, walkable = foreground, foreground
    if outline_logit is not None:
        if outline_logit.ndim != 3 or len(outline_logit) != n_images:
            raise ValueError(f"outline_logit {tuple(outline_logit.shape)}: expected ({n_images}, H, W)")
        outline = outline_logit > threshold
        # Outline pixels may start up to one flow pixel outside the flow grid's own foreground.
        walkable = highest_near(foreground)
    field = flows.float() / 5 * walkable[:, None]
    sink = _sinks(field, walkable, steps, doubling=method == "doubling")
    ends = sink.masked_select(foreground.reshape(-1))
    basin, n_seeds = _basins(ends, (n_images, height, width), seed_pixels, bin_pixels)
    own = look_up(basin, sink)
    if outline_logit is not None:
        own = _on_finer_grid(own.view(foreground.shape), field, outline)
    own = own * outline.reshape(-1)
    sizes = torch.bincount(own, minlength=n_seeds + 1)
    keep = sizes >= min_size
    if max_size_fraction is not None:
        keep &= sizes <= max_size_fraction * outline[0].numel()
    labels = _kept(own, keep).view(outline.shape)
    if flow_threshold > 0 and n_seeds:
        native = flows if outline_logit is None else F.interpolate(flows.float(), outline.shape[1:], mode="bilinear")
        error = flow_errors(labels, native, flow_threshold)
        labels = _kept(labels, error <= flow_threshold)  # error is NaN, so never kept, for absent ids
    if fill_holes:
        labels = fill(labels)
    if fill_holes or min_size_inside > min_size:
        sizes = torch.bincount(labels.view(-1))
        keep = sizes >= max(min_size, min_size_inside)
        if min_size_inside > min_size:
            at_border = torch.zeros_like(keep)
            for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
                at_border[edge.reshape(-1)] = True
            keep |= at_border & (sizes >= min_size)
        labels = _kept(labels, keep)
    return renumber(labels)


def _kept(labels: Tensor, keep: Tensor) -> Tensor:
    """Labels (...) int64 with 0 for those that `keep` (largest id + 1,) says no to."""
    return look_up(torch.arange(len(keep), device=keep.device) * keep, labels)


def follow(field: Tensor, image: Tensor, y: Tensor, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Walk points along a field with bilinear interpolation.

    field: (B, 2, h, w) float32, step per pixel, order Y, X. image: (P,) int64, ascending. y, x: (P,) float32,
    px, pixel centres at integers. Each step is p <- clip(p + field(p), 0, side - 1). Returns the final y, x.
    """
    end = torch.stack([x, y], 1)  # grid_sample wants X before Y
    field = field.flip(1)
    moving, at = torch.arange(len(image), device=image.device), end
    while steps > 0 and len(moving):
        length, place, of_row = _rows(image, field)
        own = field if of_row is None else field.index_select(0, of_row)
        point = field.new_zeros(len(own) * length, 2).index_copy_(0, place, at).view(len(own), length, 2)
        point = point.mT[:, :, None]
        earlier = _steps(own, point, max(0, min(steps, STEPS_PER_ROUND) - 2))
        before = _steps(own, earlier, 1) if steps > 1 else earlier
        point = _steps(own, before, 1)
        steps = max(0, steps - STEPS_PER_ROUND)
        # Who stands still, or goes back and forth between two places, ends where the steps that are left lead.
        circling = (point == earlier).all(1, keepdim=True)
        last = torch.where(circling, before, point) if steps % 2 else point
        at = last[:, :, 0].mT.reshape(-1, 2).index_select(0, place)
        end.index_copy_(0, moving, at)
        on = look_up(~circling.view(-1), place).nonzero().squeeze(1)
        moving, image, at = look_up(moving, on), look_up(image, on), at.index_select(0, on)
    return end[:, 1], end[:, 0]


def _rows(image: Tensor, field: Tensor) -> tuple[int, Tensor, Tensor | None]:
    """Points of the images (P,), ascending, dealt out to rows of equal length, each of one image.

    Images differ in how many points they have, more so as points come to rest: a row an image would be half empty.
    Returns the rows' length, the place of each point in them, and the image of each row (None: a row an image).
    """
    many = torch.bincount(image, minlength=len(field))
    most = many.amax()
    if len(field) > 1:  # rows have a copy of their image's field, so they are not short
        most = most.clamp(max=max(len(image) // (4 * len(field)), field[0, 0].numel() // 8))
    rows = (many + most - 1) // most
    length, n_rows = torch.stack([most, rows.sum()]).tolist()
    first = (rows.cumsum(0) - rows) * length - many.cumsum(0) + many
    place = torch.arange(len(image), device=image.device) + look_up(first, image)
    if len(field) == 1:
        return length, place, None
    images = torch.arange(len(field), device=image.device)
    return length, place, torch.repeat_interleave(images, rows, output_size=n_rows)


def _steps(field: Tensor, point: Tensor, steps: int) -> Tensor:
    """So many steps of equally many points an image: field (B, 2, h, w), point (B, 2, 1, P), order X, Y, px."""
    limit = torch.tensor([side - 1.0 for side in field.shape[:1:-1]], device=field.device).view(1, 2, 1, 1)
    scale = 2 / limit.clamp(min=1)
    for _ in range(steps):
        # The fastest bilinear look-up that torch has on CPU: 4 ns a point, gathers of the corners take 40.
        grid = (point * scale).sub_(1).permute(0, 2, 3, 1)
        step = F.grid_sample(field, grid, "bilinear", "border", align_corners=True)
        point = torch.minimum(step.add_(point).clamp_(min=0), limit)
    return point


def _grid(shape: tuple[int, int], like: Tensor, *, cells: tuple[int, int] | None = None) -> Tensor:
    """Centres of the pixels of a grid, (2, H * W) float32, in px of the grid `cells` that covers the same area."""
    sides = [
        ((torch.arange(side, device=like.device) + 0.5) * (into / side) - 0.5).clamp(0, into - 1)
        for side, into in zip(shape, cells or shape, strict=True)
    ]
    return torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)


def renumber(labels: Tensor) -> Tensor:
    """Number the objects of each image from 1 in raster order of their first pixel: (B, H, W) int32.

    labels: (B, H, W) int64, ids unique over the batch, 0 = background.
    """
    flat = labels.reshape(-1)
    pixel = flat.nonzero().squeeze(1)
    if not len(pixel):
        return torch.zeros_like(labels, dtype=torch.int32)
    own = look_up(flat, pixel)
    absent = flat.numel()
    first = torch.full((int(own.max()) + 1,), absent, device=flat.device)
    first = first.scatter_reduce(0, own, pixel, "amin")
    order = torch.argsort(first)[: int((first < absent).sum())]
    image = look_up(first, order) // labels[0].numel()
    many = torch.bincount(image, minlength=len(labels))
    number = torch.zeros(len(first), dtype=torch.int32, device=flat.device)
    place = torch.arange(len(order), device=flat.device) - look_up(many.cumsum(0) - many, image)
    number[order] = (place + 1).int()
    return look_up(number, labels)


def _sinks(field: Tensor, walkable: Tensor, steps: int, *, doubling: bool) -> Tensor:
    """Where each pixel's walk ends: (B * h * w,) int64 flat pixel index; a pixel that may not walk stays."""
    height, width = field.shape[2:]
    walkable = walkable.reshape(-1)
    sink = torch.arange(len(walkable), device=field.device)
    starts = walkable
    if doubling:
        start = _grid((height, width), field).expand(len(field), -1, -1)
        end = _steps(field.flip(1), start.flip(1)[:, :, None], min(steps, FIRST_STEPS))[:, :, 0]
        end = _flat(end.flip(1).round(), height, width)
        sink = torch.where(walkable, end, sink)
        for _ in range(math.ceil(math.log2(max(steps / FIRST_STEPS, 1)))):
            sink = look_up(sink, sink)
        starts = torch.zeros_like(walkable).index_fill_(0, sink.masked_select(walkable), True)
        steps = min(steps, LAST_STEPS)
    pixel = starts.nonzero().squeeze(1)
    image = pixel // (height * width)
    y, x = follow(field, image, (pixel // width % height).float(), (pixel % width).float(), steps)
    last = torch.arange(len(walkable), device=field.device)
    last[pixel] = (image * height + y.long()) * width + x.long()
    return look_up(last, sink)


def _flat(point: Tensor, height: int, width: int) -> Tensor:
    """Flat pixel index, (B * P,) int64, of points (B, 2, P) on a grid."""
    image = torch.arange(len(point), device=point.device)[:, None] * (height * width)
    y, x = point.long().unbind(1)
    return (image + y * width + x).view(-1)


def _on_finer_grid(own: Tensor, field: Tensor, outline: Tensor) -> Tensor:
    """The object of each pixel of a finer grid: (B * H * W,) int64, meaningless outside `outline` (B, H, W).

    own: (B, h, w) int64, the object of each pixel of the flow grid. Where only one object is near, a pixel is its;
    the few that lie between objects (one in ten) walk `OUTLINE_STEPS` and join the object that they come to.
    """
    height, width = outline.shape[1:]
    farthest = highest_near(own)
    # The nearest id is found as the highest of ids counted from the other end, in which background comes last.
    end = farthest.amax() + 1
    nearest = end - highest_near((end - own) * (own > 0))
    single = farthest - (farthest + 1) * ((nearest != farthest) & (nearest != end))  # -1 where there are two
    start = _grid((height, width), field, cells=(own.shape[1], own.shape[2]))
    pixel = start.round().long()
    found = single.flatten(1).gather(1, (pixel[0] * own.shape[2] + pixel[1]).expand(len(own), -1)).view(-1)
    between = ((found < 0) & outline.reshape(-1)).nonzero().squeeze(1)
    image, place = between // (height * width), between % (height * width)
    y, x = follow(field, image, look_up(start[0], place), look_up(start[1], place), OUTLINE_STEPS)
    at = (image * own.shape[1] + y.round().long()) * own.shape[2] + x.round().long()
    return found.index_copy_(0, between, look_up(own.view(-1), at))


def _basins(ends: Tensor, shape: tuple[int, int, int], seed_pixels: int, bin_pixels: int) -> tuple[Tensor, int]:
    """Which seed's surroundings each bin belongs to: (B * h * w,) int64, 0 = none; and the number of seeds.

    ends: flat bin index of every walk's end. A seed is a bin with more than `seed_pixels` ends and no fuller bin
    within 2 px. It grows for 5 rounds over touching bins (3x3) with more than `bin_pixels` ends. Where two
    surroundings overlap the fuller seed has it, on equality the later one in raster order.
    """
    n_images, height, width = shape
    ends = torch.bincount(ends, minlength=n_images * height * width)
    count = F.pad(ends.view(shape), (REACH, REACH, REACH, REACH)).reshape(-1)
    stride = width + 2 * REACH

    def window(reach: int) -> Tensor:
        side = torch.arange(-reach, reach + 1, device=count.device)
        return (side[:, None] * stride + side).view(1, -1)

    seed = (count > seed_pixels).nonzero()
    seed = seed[look_up(count, seed).squeeze(1) == look_up(count, seed + window(2)).amax(1)]
    seed = seed[torch.argsort(look_up(count, seed).squeeze(1), stable=True)]
    around = seed + window(REACH)
    side = 2 * REACH + 1
    open_ = (look_up(count, around) > bin_pixels).view(-1, side, side)
    grown = torch.zeros_like(open_)
    grown[:, REACH, REACH] = True
    for _ in range(REACH):
        grown = highest_near(grown) & open_
    rank = torch.arange(1, len(seed) + 1, device=count.device)[:, None] * grown.view(-1, side * side)
    basin = torch.zeros_like(count).scatter_reduce(0, around.view(-1), rank.view(-1), "amax")
    basin = basin.view(n_images, height + 2 * REACH, stride)[:, REACH:-REACH, REACH:-REACH]
    return basin.reshape(-1), len(seed)
