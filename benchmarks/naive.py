"""The loop that the engine replaces, and full-size Cellpose 3 networks without their weights.

The networks have the official size and layout (6.6 M parameters) with seeded weights, since the official ones cannot
be shipped; so that mask recovery and measuring see realistic masks, the output handed on is the bundled segmenter's for
the same crop. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from biorewards.assay import Assay
from biorewards.segmentation.compact import WORKING_DIAMETER, CompactSegmenter
from biorewards.segmentation.cpnet import CELL_DIAMETER, NUCLEUS_DIAMETER

Loop = Callable[[], list[tuple[Any, Any]]]


def stored_outputs(images: Tensor, assay: Assay) -> tuple[Tensor, Tensor]:
    """The bundled networks' flows and logits at the crops' own resolution: (N, 3, H, W) for nuclei and for cells."""
    segmenter = assay.segmenter
    assert isinstance(segmenter, CompactSegmenter)
    scaled = assay.normalised(images)
    dna = scaled[:, assay.channels["dna"]][:, None]
    bodies = scaled[:, [assay.channels["actin"], assay.channels["tubulin"]]]
    side = round(images.shape[-1] * WORKING_DIAMETER / assay.nucleus_diameter)
    nucleus_flow, nucleus_logit, _, *cells = segmenter._run((side, side), dna, bodies)
    raw = torch.cat([nucleus_flow, nucleus_logit, *cells], 1)
    full = nn.functional.interpolate(raw, images.shape[-2:], mode="bilinear", align_corners=False)
    return full[:, :3], full[:, 3:]


def run_for_its_cost(net: nn.Module, stored: Tensor) -> None:
    """Make a network compute as ever and then return stored outputs, one crop after the other."""
    full, done = net.forward, [0]

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        style = full(x)[1]
        out = torch.full((len(x), 3, *x.shape[-2:]), -5.0)
        places = [(done[0] + i) % len(stored) for i in range(len(x))]
        done[0] += len(x)
        top, left = ((a - b) // 2 for a, b in zip(x.shape[-2:], stored.shape[-2:], strict=True))
        out[:, :, top : top + stored.shape[-2], left : left + stored.shape[-1]] = stored[places]
        return out, style, None

    net.forward = forward  # type: ignore[method-assign]


def full_size_weights(folder: str, mkldnn: bool) -> list[tuple[Path, float]]:
    """Two files, for nuclei and for cells, of a seeded network of the official size, and their diameters."""
    from cellpose.resnet_torch import CPnet

    torch.manual_seed(0)
    files = []
    for diameter in (NUCLEUS_DIAMETER, CELL_DIAMETER):
        net = CPnet([2, 32, 64, 128, 256], nout=3, sz=3, mkldnn=mkldnn, diam_mean=diameter).eval()
        path = Path(folder) / f"{diameter:g}-{mkldnn}.pth"
        net.save_model(str(path))
        files.append((path, diameter))
    return files


def naive_loop(images: Tensor, assay: Assay, mkldnn: bool, folder: str, *, classify: bool = True) -> Loop:
    """Per image: two Cellpose 3 evaluations, region measures of both, the classifier. Returns the masks."""
    from cellpose import models
    from skimage.measure import regionprops_table

    judges = []
    for (path, diameter), stored in zip(full_size_weights(folder, mkldnn), stored_outputs(images, assay), strict=True):
        model = models.CellposeModel(pretrained_model=str(path), device=torch.device("cpu"), mkldnn=mkldnn)
        run_for_its_cost(model.net, stored)
        judges.append((model, diameter))
    arrays = (images * 65535).round().to(torch.int32).numpy().astype(np.uint16)
    dna, actin = assay.channels["dna"], assay.channels["actin"]
    wanted = ("label", "area", "centroid", "bbox", "perimeter_crofton", "eccentricity")

    def loop() -> list[tuple[Any, Any]]:
        found = []
        for crop, picture in zip(arrays, images, strict=True):
            pair = np.stack([crop[actin], crop[dna]], -1)
            masks = []
            for (model, diameter), channels in zip(judges, ([2, 0], [1, 2]), strict=True):
                masks.append(model.eval(pair, channels=channels, diameter=diameter)[0])
                regionprops_table(masks[-1].astype(np.int32), properties=wanted)
            if classify:
                with torch.inference_mode():
                    assay.class_probabilities(picture[None])
            found.append((masks[0], masks[1]))
        return found

    return loop
