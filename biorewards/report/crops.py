"""The crops a report shows: which ones, their composite colours, and the outlines of their masks."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from biorewards.batch import Batch
from biorewards.io.images import FloatImage, ImageError

if TYPE_CHECKING:
    from biorewards.assay import Assay

#: Longest side of an embedded picture, px. A 96 px crop is embedded as it is; a whole field becomes a thumbnail.
SIDE = 192
#: Pixels segmented at once: 113 crops of 96 px, or one field of 1080 px.
PIXELS = 2**20
ROLE_COLOUR = {"actin": 0, "tubulin": 1, "dna": 2}


@dataclass(frozen=True)
class Crop:
    """One embedded picture. `nuclei` and `cells` are SVG path data in the picture's own pixels (width, height)."""

    row: int
    width: int
    height: int
    jpeg: str
    nuclei: str
    cells: str
    n_nuclei: int
    n_cells: int
    error: str


def best_and_worst(value: pd.Series, empty: pd.Series, count: int = 4) -> tuple[list[int], list[int]]:
    """Row positions of the best and the worst crops of a reward, best first and worst first.

    value: (N,) the reward, NaN where missing. empty: (N,) bool, nothing was found in the crop.
    No crop is in both lists. Of the worst, at most half are crops where nothing was found (more only where there
    are too few others), so that a batch of blanks does not hide what is wrong with crops that show cells. Ties go
    to the earlier row.
    """
    ranked = value.reset_index(drop=True).dropna().sort_values(kind="stable", ascending=False)
    best = ranked.index[: min(count, (len(ranked) + 1) // 2)].tolist()
    rest = ranked.drop(best).sort_values(kind="stable").index
    nothing = empty.to_numpy(bool)[rest]
    allowed = max(count // 2, count - int((~nothing).sum()))
    worst = rest[~nothing | (np.cumsum(nothing) <= allowed)][:count].tolist()
    return best, worst


def composite(image: FloatImage, assay: Assay) -> npt.NDArray[np.uint8]:
    """(C, H, W) float32 in [0, 1] to (H, W, 3) uint8: actin red, tubulin green, DNA blue, in the assay's range."""
    colour = np.zeros((*image.shape[1:], 3), np.float32)
    for role, channel in assay.channels.items():
        if role in ROLE_COLOUR and channel < len(image):
            low, high = assay.intensity.get(role, (0.0, 1.0))
            colour[..., ROLE_COLOUR[role]] = np.clip((np.nan_to_num(image[channel]) - low) / (high - low), 0, 1)
    return np.asarray(np.round(colour * 255), np.uint8)


def outline(labels: npt.NDArray[np.int32], scale: float) -> str:
    """SVG path data round every object of a label image (H, W), in pixels times `scale`, straightened by 0.25 px."""
    parts = []
    for label in np.unique(labels[labels > 0]):
        inside = np.pad(labels == label, 1)
        for contour in find_contours(inside.astype(np.float32), 0.5):
            # Pad moved the picture by one pixel; a pixel's middle lies at +0.5 in SVG.
            points = approximate_polygon((contour[:, ::-1] - 0.5) * scale, 0.25)
            parts.append("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points[:-1]) + "Z")
    return "".join(parts)


def load_crops(rows: list[int], read: Callable[[int], FloatImage], assay: Assay) -> dict[int, Crop]:
    """Read the rows again and find their masks as the scoring did, pictures of one size in one batch.

    Moves the assay's networks to the CPU: fifty crops are not worth a device.
    """
    assay.to("cpu")
    images: dict[int, FloatImage] = {}
    crops: dict[int, Crop] = {}
    for row in rows:
        try:
            images[row] = read(row)
        except (ImageError, OSError) as error:
            crops[row] = Crop(row, 96, 96, "", "", "", 0, 0, str(error))
    for shape in sorted({image.shape for image in images.values()}):
        members = [row for row, image in images.items() if image.shape == shape]
        step = max(1, PIXELS // (shape[1] * shape[2]))
        for part in (members[k : k + step] for k in range(0, len(members), step)):
            batch = Batch(torch.from_numpy(np.stack([images[row] for row in part])), None, assay)
            with torch.inference_mode():
                nuclei, cells = (labels.cpu().numpy() for labels in batch.masks)
            for k, row in enumerate(part):
                crops[row] = _crop(row, images[row], nuclei[k], cells[k], assay)
    return crops


def _crop(
    row: int, image: FloatImage, nuclei: npt.NDArray[np.int32], cells: npt.NDArray[np.int32], assay: Assay
) -> Crop:
    scale = min(1.0, SIDE / max(image.shape[1:]))
    picture = Image.fromarray(composite(image, assay))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92, subsampling=0)
    return Crop(
        row=row,
        width=picture.width,
        height=picture.height,
        jpeg=base64.b64encode(stream.getvalue()).decode(),
        nuclei=outline(nuclei, scale),
        cells=outline(cells, scale),
        n_nuclei=int(np.count_nonzero(np.unique(nuclei))),
        n_cells=int(np.count_nonzero(np.unique(cells))),
        error="",
    )
