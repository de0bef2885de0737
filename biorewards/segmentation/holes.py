"""Filling holes of all objects of a batch at once.

A hole of an object is everything that cannot reach the image border without crossing that object, stepping
between pixels that share a side. Filling gives the hole's pixels, background or other labels, to the object.

The label images become graphs: runs of equal pixels in a row are joined to components, components that touch
are joined by edges. What is enclosed is then found on the graph, which is some hundred times smaller than the
images, so nothing loops over images, objects or pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biorewards.lookup import look_up


def connect(n: int, a: Tensor, b: Tensor) -> Tensor:
    """Connected components of a graph: (n,) int64, the smallest node of each node's component.

    a, b: (E,) int64, the two ends of each edge. Smaller roots are handed over the edges and paths are halved,
    so the rounds grow with the logarithm of the longest path.
    """
    root = torch.arange(n, device=a.device)
    while True:
        root_a, root_b = look_up(root, a), look_up(root, b)
        low = torch.minimum(root_a, root_b)
        new = root.scatter_reduce(0, root_a, low, "amin").scatter_reduce(0, root_b, low, "amin")
        new = look_up(new, new)
        new = look_up(new, new)
        if torch.equal(new, root):
            return root
        root = new


def fill_holes(labels: Tensor) -> Tensor:
    """Give every hole to the object that encloses it; with objects nested in objects, to the outermost.

    labels: (B, H, W) int64, 0 = background. Returns the same shape and dtype; ids never change, but those of
    enclosed objects disappear. Equals filling each object in turn (Cellpose with `fill_voids`), whatever the
    order, unless parts of two objects enclose parts of each other.
    """
    run, value, component, free, edges = _graph(labels)
    owner = _enclosed_by(value, free, edges)
    if not (owner > 0).any():
        return labels
    filled = torch.where(owner > 0, owner, value)
    return look_up(look_up(filled, component), run).view(labels.shape)


def _graph(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Components of equal, side-sharing pixels and which of them touch.

    Returns run (pixels,) the run of each pixel; value (K,) the label of each component; component (runs,) the
    component of each run; free (K,) bool, reaches the image border; edges (2, E) touching components.
    """
    height, width = labels.shape[1:]
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, :, 1:] = labels[:, :, 1:] != labels[:, :, :-1]
    run = torch.cumsum(begins.view(-1), 0) - 1
    at = begins.view(-1).nonzero().squeeze(1)  # first pixel of each run
    value = look_up(labels.reshape(-1), at)

    # Two runs one above the other meet first where one of them begins.
    meets = (begins[:, 1:] | begins[:, :-1]).nonzero()
    below = ((meets[:, 0] * height + meets[:, 1] + 1) * width) + meets[:, 2]
    lower, upper = look_up(run, below), look_up(run, below - width)
    same = look_up(value, lower) == look_up(value, upper)
    root = connect(len(at), lower[same], upper[same])
    roots, component = torch.unique(root, return_inverse=True)

    column, row = at % width, at // width % height
    last = torch.cat([column[1:] == 0, column.new_ones(1, dtype=torch.bool)])  # the run ends at the right edge
    border = (row == 0) | (row == height - 1) | (column == 0) | last
    free = torch.zeros(len(roots), dtype=torch.bool, device=labels.device)
    free[component[border]] = True

    beside = (column > 0).nonzero().squeeze(1)
    a = look_up(component, torch.cat([lower[~same], beside]))
    b = look_up(component, torch.cat([upper[~same], beside - 1]))
    return run, value[roots], component, free, torch.stack([a, b])


def _enclosed_by(value: Tensor, free: Tensor, edges: Tensor) -> Tensor:
    """For each component the label that encloses it, 0 for none.

    A component is free when no single label parts it from the border: it reaches the border itself, or it
    touches free background, or free components of two labels (no one label bars both ways). What is left
    falls into groups of touching components; a group whose free neighbours all carry one label is a hole of
    that label. A group with several is reached from more than one side: its outer members are free.
    """
    owner = torch.zeros_like(value)
    largest = torch.iinfo(value.dtype).max
    edges = torch.cat([edges, edges.flip(0)], 1)  # (from, to), both ways
    open_ = ~free
    while True:
        edges = edges[:, open_[edges[1]]]  # only edges into components that are not decided
        if not edges.shape[1]:
            return owner
        source, target = edges
        known = free[source]
        low = torch.full_like(value, largest).scatter_reduce(0, target[known], value[source[known]], "amin")
        high = torch.full_like(value, -1).scatter_reduce(0, target[known], value[source[known]], "amax")
        reached = open_ & (high >= 0) & ((low == 0) | (low < high))
        if not reached.any():
            group = connect(len(value), source[~known], target[~known])
            low = torch.full_like(low, largest).scatter_reduce(0, group, low, "amin")[group]
            outer = high >= 0
            high = torch.full_like(high, -1).scatter_reduce(0, group, high, "amax")[group]
            hole = open_ & (low == high)
            owner = torch.where(hole, low, owner)
            open_ = open_ & ~hole
            reached = open_ & outer
        free = free | reached
        open_ = open_ & ~reached
