"""A data set of phantom crops: plates, wells, fields; crops centred on nuclei; the IMPA / CellFlux index.

Every field draws its own random numbers from (seed, plate, well, field), so a crop is the same whatever else is
asked for; only which crops are taken, and their order, depends on n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biorewards.phantom.cells import Int
from biorewards.phantom.classes import AREA_PER_CELL, CLASSES, COMPOUNDS, DOSE_STRENGTH
from biorewards.phantom.field import MIN_PIXELS, Field, render_field, renumber
from biorewards.phantom.optics import draw_plate

#: Raised when the same seed gives other pixels.
VERSION = 2
#: um per pixel by crop size. 0.32 um is assumed for a 20x objective (6.45 um camera pixel / 20).
PIXEL_SIZE_UM = {96: 0.32, 64: 0.48, 48: 0.64}
CHANNELS = {"actin": 0, "tubulin": 1, "dna": 2}
INDEX = "index.csv"
HINT = "biorewards.json"

CROPS_PER_FIELD = 12
DMSO_WELLS = 4
DMSO_SHARE = 0.25
#: Splits by plate: of five plates three train, one validates, one tests.
SPLITS = ("train", "val", "train", "test", "train")
COLUMNS = ["SAMPLE_KEY", "SPLIT", "STATE", "CPD_NAME", "ANNOT", "DOSE", "BATCH", "PLATE", "WELL"]


class Crops(NamedTuple):
    """images (n, size, size, 3) uint8; nuclei and cells (n, size, size) int32; rows: the index, one row a crop."""

    images: NDArray[np.uint8]
    nuclei: Int
    cells: Int
    rows: pd.DataFrame


def sample_path(key: str) -> str:
    """Relative file of a SAMPLE_KEY: Batch1_1001_5_0_3.0 -> Batch1/1001/5_0_3.0.npy."""
    batch, plate, rest = key.split("_", 2)
    return f"{batch}/{plate}/{rest}.npy"


def _wells() -> list[tuple[str, float]]:
    """Compound and share of the crops for each well of a plate."""
    treated = [name for name in COMPOUNDS if name != "DMSO"]
    rivals = {effect: sum(COMPOUNDS[name].effect == effect for name in treated) for effect in CLASSES}
    share = (1 - DMSO_SHARE) / (len(CLASSES) - 1)
    wells = [("DMSO", DMSO_SHARE / DMSO_WELLS)] * DMSO_WELLS
    return wells + [(name, share / rivals[COMPOUNDS[name].effect]) for name in treated]


def _quotas(n: int) -> NDArray[np.int64]:
    """Crops to take from each (plate, well); sums to n, with classes and plates as even as n allows."""
    plates = 5 if n < 3000 else 10 if n < 8000 else 20
    wells = _wells()
    # Several crops of a field where n allows (a field costs as much for one crop as for twelve), but not so many
    # that a plate would lack classes: there are 13 on each.
    block = min(CROPS_PER_FIELD, max(1, n // (plates * len(CLASSES))))
    # Class by class, then plate by plate, then well by well, to and fro: what rounding leaves out is spread over all.
    names = list(CLASSES)
    effect = [names.index(COMPOUNDS[name].effect) for name, _ in wells]
    plate, well = np.divmod(np.arange(plates * len(wells)), len(wells))
    order = np.lexsort((np.where(plate % 2, -well, well), plate, np.take(effect, well)))
    share = np.take([share for _, share in wells], well[order])
    filled = block * np.rint(np.cumsum(share) * (n / plates / block)).astype(np.int64)
    filled[-1] = n
    quotas = np.zeros((plates, len(wells)), np.int64)
    quotas[plate[order], well[order]] = np.diff(filled, prepend=0)
    return quotas


def _field_side(effect: str) -> int:
    """Side of a field in px of the 96 px crop: about `CROPS_PER_FIELD` nuclei lie where a whole crop fits round them.

    A multiple of 12, so that 1.5 and 2 divide it.
    """
    room = np.sqrt(1.35 * CROPS_PER_FIELD * AREA_PER_CELL / CLASSES[effect].density)
    return 12 * round((96 + float(room)) / 12)


def _cut(field: Field, y: int, x: int, size: int, keep: float) -> tuple[NDArray[np.uint8], Int, Int]:
    here = slice(y - size // 2, y - size // 2 + size), slice(x - size // 2, x - size // 2 + size)
    return field.image[here], renumber(field.nuclei[here], keep), renumber(field.cells[here], keep)


def _field_crops(
    field: Field, rng: np.random.Generator, size: int
) -> Iterator[tuple[int, NDArray[np.uint8], Int, Int]]:
    """Crops (object, image, nuclei, cells) round nuclei whose crop lies inside the field, in random order."""
    height, width = field.nuclei.shape
    flat = field.nuclei.ravel()
    area = np.maximum(np.bincount(flat), 1)
    y = np.rint(np.bincount(flat, np.repeat(np.arange(height, dtype=float), width)) / area).astype(int)
    x = np.rint(np.bincount(flat, np.tile(np.arange(width, dtype=float), height)) / area).astype(int)
    half = size // 2
    inside = (y >= half) & (x >= half) & (y <= height - size + half) & (x <= width - size + half)
    inside[0] = False
    factor = 96 / size
    for number in rng.permutation(np.flatnonzero(inside))[:CROPS_PER_FIELD]:
        yield int(number), *_cut(field, y[number], x[number], size, MIN_PIXELS / factor**2)


def iterate(n: int, size: int = 96, seed: int = 0) -> Iterator[tuple[dict[str, object], NDArray[np.uint8], Int, Int]]:
    """Index row, image, nuclei, cells of n crops, one after the other. Arguments and errors as `render_dataset`."""
    if size not in PIXEL_SIZE_UM:
        raise ValueError(f"size {size} is not one of {sorted(PIXEL_SIZE_UM)}")
    if n < 1:
        raise ValueError(f"n = {n}; ask for at least one crop")
    factor = 96 / size
    wells = _wells()
    names = list(COMPOUNDS)
    for plate, quotas in enumerate(_quotas(n)):
        optics = draw_plate(np.random.default_rng([seed, plate, 1_000_003]))
        for well, quota in enumerate(quotas):
            name = wells[well][0]
            compound = COMPOUNDS[name]
            dose = (plate + names.index(name)) % 3
            row = {
                "SPLIT": SPLITS[plate % 5],
                "STATE": "control" if name == "DMSO" else "trt",
                "CPD_NAME": name,
                "ANNOT": compound.effect,
                "DOSE": compound.doses[dose],
                "BATCH": f"Batch{plate // 5 + 1}",
                "PLATE": str(1000 * (plate // 5 + 1) + plate % 5 + 1),
                "WELL": f"{'BCD'[well // 10]}{well % 10 + 2:02d}",
            }
            taken = number = 0
            while taken < quota:
                rng = np.random.default_rng([seed, plate, well, number])
                strength = 0.0 if name == "DMSO" else compound.strength * DOSE_STRENGTH[dose]
                side = round(_field_side(compound.effect) / factor)
                field = render_field(rng, (side, side), compound.effect, optics, strength=strength, pixel=factor)
                # Not the field's own generator: what was drawn before must not depend on the pixel size.
                pick = np.random.default_rng([seed, plate, well, number, 1])
                for thing, image, nuclei, cells in _field_crops(field, pick, size):
                    key = f"{row['BATCH']}_{row['PLATE']}_{well + 1}_{number + 1}_{thing}.0"
                    yield {"SAMPLE_KEY": key, **row}, image, nuclei, cells
                    taken += 1
                    if taken == quota:
                        break
                number += 1


def render_dataset(n: int, size: int = 96, seed: int = 0) -> Crops:
    """Render n crops of one size (96, 64 or 48 px: the same view at a coarser pixel) in memory.

    About a quarter are DMSO, the rest is spread evenly over the other classes; every plate has all of them, and
    SPLIT goes by plate. Raises ValueError for another size or n < 1.
    """
    rows, images, nuclei, cells = zip(*iterate(n, size, seed), strict=True)
    return Crops(np.stack(images), np.stack(nuclei), np.stack(cells), pd.DataFrame(list(rows), columns=COLUMNS))


def write_dataset(
    out: str | Path,
    n: int,
    size: int = 96,
    seed: int = 0,
    progress: Callable[[dict[str, object]], object] | None = None,
) -> pd.DataFrame:
    """Write a data set to the folder `out`; returns its index. Arguments and ValueErrors as `render_dataset`.

    `<BATCH>/<PLATE>/<table>_<image>_<object>.npy`: (size, size, 3) uint8. `masks/` beside them, same path,
    `.npz` with `nuclei` and `cells`, (size, size) int32. `index.csv` and `biorewards.json` come last, so a folder
    with an index is complete. progress: called with each index row when its crop is on disk.

    Raises FileExistsError when `out` holds anything.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another, or empty it first")
    rows = []
    for row, image, nuclei, cells in iterate(n, size, seed):
        path = sample_path(str(row["SAMPLE_KEY"]))
        file, mask = out / path, (out / "masks" / path).with_suffix(".npz")
        for parent in (file.parent, mask.parent):
            parent.mkdir(parents=True, exist_ok=True)
        np.save(file, image)
        np.savez_compressed(mask, nuclei=nuclei, cells=cells)
        rows.append(row)
        if progress is not None:
            progress(row)
    hint = {
        "assay": "phantom",
        "size": size,
        "pixel_size_um": PIXEL_SIZE_UM[size],
        "channels": CHANNELS,
        "seed": seed,
        "version": VERSION,
    }
    index = pd.DataFrame(rows, columns=COLUMNS)
    (out / HINT).write_text(json.dumps(hint, indent=2) + "\n", encoding="utf-8")
    index.to_csv(out / INDEX)
    return index
