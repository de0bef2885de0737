"""The real crops of BBBC021 beside the checkout, in a form that `biorewards score` reads. Never part of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

SIDE = 68
#: What the files hold (README of bbbc021_crops68 and bbbc021_pairs96).
CHANNELS = "dna=0,tubulin=1,actin=2"
#: Counts of the 12-bit camera between which these fields lie; above them are rounded cells.
RANGE = "40,600"


def write_crops68(data: Path, out: Path, every: int = 1) -> Path:
    """Cut the strips of `data`/bbbc021_crops68 into uint16 (68, 68, 3) NPY files with a manifest; returns `out`."""
    source = data / "bbbc021_crops68"
    table = pd.read_csv(source / "crops.csv", dtype=str).iloc[::every]
    out.mkdir(parents=True)
    strips = {name: np.asarray(Image.open(source / name), dtype=np.uint16) for name in table["file"].unique()}
    names = []
    for strip, index in zip(table["file"], table["index"].astype(int), strict=True):
        crops = strips[strip].reshape(3, SIDE, -1, SIDE).transpose(2, 1, 3, 0)
        names.append(f"{Path(strip).stem}_{index}.npy")
        np.save(out / names[-1], crops[index])
    columns = table[["compound", "moa", "plate", "well", "site", "split"]]
    columns.assign(file=names).to_csv(out / "manifest.csv", index=False)
    return out
