"""All labelled images of a folder in memory, as fitting needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biorewards.io.images import ImageError, read_image
from biorewards.io.manifest import ManifestError, read_manifest

ROLES = ("actin", "tubulin", "dna")


class Labelled(NamedTuple):
    """images (N, C, H, W) float16 in [0, 1]; rows with columns class, compound, plate, split, file; what was left out."""

    images: Tensor
    rows: pd.DataFrame
    channels: dict[str, int]
    pixel_size: float | None
    notes: list[str]


def read_labelled(
    path: Path,
    manifest: Path | None,
    channels: dict[str, int] | None,
    intensity_range: tuple[float, float] | None,
    control: str,
    split: Callable[[pd.DataFrame], pd.Series[str]] | None = None,
) -> Labelled:
    """Read every image that has a class (MoA column, or sub-folder) and can be read.

    A control row (STATE) without a class gets `control`. Rows without a class, unreadable files and other sizes than
    the commonest are left out and counted in `notes`. A `Split` column must say train, val or test; without one, or
    without val or test in it, whole plates of the training rows are drawn (`fitting.split_by_plate`).
    Raises ManifestError when nothing is left.
    """
    from biorewards.fitting import split_by_plate

    found = read_manifest(path, manifest=manifest)
    channels = channels or found.hints.channels or {role: i for i, role in enumerate(ROLES)}
    table = found.table
    label = table["Metadata_MoA"].where(table["Metadata_MoA"] != "", table["Metadata_Compound"])
    if "Metadata_State" in table:
        label = label.mask((table["Metadata_State"] == "control"), control)
    images: list[np.ndarray] = []
    kept: list[int] = []
    left_out: Counter[str] = Counter()
    for row, files in enumerate(found.files):
        if not label[row]:
            left_out["no class"] += 1
            continue
        try:
            if row in found.problems:
                raise ImageError(files[0], found.problems[row])
            images.append(
                read_image(list(files), max(channels.values()) + 1, intensity_range=intensity_range).astype(np.float16)
            )
            kept.append(row)
        except ImageError as error:
            left_out[error.message] += 1
    if not images:
        raise ManifestError(f"{path}: no labelled image could be read ({dict(left_out)})")
    common = Counter(i.shape for i in images).most_common(1)[0][0]
    fits = [i.shape == common for i in images]
    left_out[f"another size than {common}"] += len(fits) - sum(fits)
    kept = [k for k, ok in zip(kept, fits, strict=True) if ok]
    rows = pd.DataFrame({
        "class": label.iloc[kept].to_numpy(),
        "compound": table["Metadata_Compound"].iloc[kept].to_numpy(),
        "plate": table["Metadata_Plate"].iloc[kept].to_numpy(),
        "file": table["Metadata_File"].iloc[kept].to_numpy(),
    })  # fmt: skip
    rows["compound"] = rows["compound"].where(rows["compound"] != "", rows["class"])
    notes = [f"{n} images left out: {why}" for why, n in left_out.items() if n]
    given = table["Metadata_Split"].iloc[kept].str.lower().to_numpy() if "Metadata_Split" in table else None
    if given is not None and {"train", "val", "test"} <= set(given):
        rows["split"] = given
    else:
        rows["split"] = split_by_plate(rows, seed=0)
        notes.append("no SPLIT with train, val and test: whole plates were drawn for val and test")
    stack = torch.from_numpy(np.stack([i for i, ok in zip(images, fits, strict=True) if ok]))
    return Labelled(stack, rows.reset_index(drop=True), channels, found.hints.pixel_size, notes)
