"""All labelled images of a folder in memory, as fitting needs them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.io.images import ImageError
from biorewards.io.manifest import ManifestError, read_manifest
from biorewards.io.reading import plan_reading

ROLES = ("actin", "tubulin", "dna")


class Labelled(NamedTuple):
    """images (N, C, H, W) float16 in [0, 1]; rows: class, compound, plate, split, file; notes: what was left out."""

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
) -> Labelled:
    """Read every image that has a class (MoA column, or sub-folder) and can be read.

    Channels come out in the order actin, tubulin, DNA (those that are given), which is the order of the new assay.
    A control row (STATE) without a class gets `control`. Rows without a class, unreadable files and other sizes than
    the commonest are left out and counted in `notes`. A `Split` column must say train, val and test; without one
    whole plates are drawn (`split_by_plate`). Raises ManifestError when nothing is left.
    """
    found = read_manifest(path, manifest=manifest)
    given = channels or found.hints.channels
    order = {role: i for i, role in enumerate(r for r in ROLES if given is None or r in given)}
    draft = Assay(
        name="to be fitted", channels=order, pixel_size=None, crop_size=None, intensity={}, classes=[], compounds={},
        nucleus_diameter=1.0, statistics=pd.DataFrame(),
    )  # fmt: skip
    read = plan_reading(found, draft, channels=given, intensity_range=intensity_range)
    table = found.table
    label = table["Metadata_MoA"].where(table["Metadata_MoA"] != "", table["Metadata_Compound"])
    if "Metadata_State" in table:
        label = label.mask((table["Metadata_State"] == "control"), control)
    images: list[npt.NDArray[Any]] = []
    kept: list[int] = []
    left_out: Counter[str] = Counter()
    for row in range(len(found)):
        if not label[row]:
            left_out["no class"] += 1
            continue
        try:
            images.append(read(row).pixels.astype(np.float16))
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
    said = table["Metadata_Split"].iloc[kept].str.lower().to_numpy() if "Metadata_Split" in table else None
    if said is not None and {"train", "val", "test"} <= set(said):
        rows["split"] = said
    else:
        rows["split"] = split_by_plate(rows, seed=0)
        notes.append("no SPLIT with train, val and test: whole plates were drawn for val and test")
    stack = torch.from_numpy(np.stack([i for i, ok in zip(images, fits, strict=True) if ok]))
    return Labelled(stack, rows.reset_index(drop=True), order, found.hints.pixel_size, notes)


def split_by_plate(rows: pd.DataFrame, seed: int) -> pd.Series:
    """train, val or test for each row, by whole plates: about 15 % of the plates each for val and test.

    With fewer than three plates the rows themselves are drawn; the card then says that plates are not held out.
    """
    rng = np.random.default_rng(seed)
    plates = sorted(rows.plate.astype(str).unique())
    unit = rows.plate.astype(str) if len(plates) >= 3 else pd.Series(np.arange(len(rows)), index=rows.index)
    names = rng.permutation(sorted(unit.unique()))
    each = max(1, round(0.15 * len(names)))
    role = (
        dict.fromkeys(names, "train")
        | dict.fromkeys(names[:each], "test")
        | dict.fromkeys(names[each : 2 * each], "val")
    )
    return unit.map(role)
