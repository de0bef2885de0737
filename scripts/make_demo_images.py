"""Make the bundled demo images: crops of real JUMP U2OS cells, and a drawn set with rows that must score badly.

    python scripts/make_demo_images.py [../shared/data/cell_bodies]

With the folder of JUMP tiles (named in biorewards/assets/demo/README.md) the real crops are cut again; the drawn set
is made in any case. The same tiles and the same drawing code give the committed files, byte for byte.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from biorewards.phantom import PIXEL_SIZE_UM, render_dataset

DEMO = Path(__file__).resolve().parents[1] / "biorewards" / "assets" / "demo"
SIDE = 96
JUMP_CROPS = 24
#: Drawn rows: five for each of the twelve treated classes (fewer, and no class is called the worst), six of each
#: other kind.
TREATED_PER_CLASS, OTHERS = 5, 6
SEED = 20


def save(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, optimize=True)


def jump(source: Path) -> None:
    """Cut crops round whole nuclei, spread over the tiles; channels AGP (actin), RNA, DNA, each scaled by tile set.

    The tiles hold DNA, AGP, RNA in that order, 8 bits over the whole field; a crop is a copy of their pixels.
    """
    tiles = sorted((source / "images").glob("jump_u2os_*.png"))
    if not tiles:
        raise SystemExit(f"no jump_u2os_*.png under {source / 'images'}")
    rng = np.random.default_rng(SEED)
    for number, tile in enumerate(tiles):
        image = np.asarray(Image.open(tile))[..., [1, 2, 0]]
        nuclei = np.asarray(Image.open(source / "nuclei" / tile.name))
        centres = []
        for label in np.unique(nuclei[nuclei > 0]):
            y, x = np.nonzero(nuclei == label)
            top, left = round(y.mean()) - SIDE // 2, round(x.mean()) - SIDE // 2
            if len(y) >= 200 and 0 <= top <= image.shape[0] - SIDE and 0 <= left <= image.shape[1] - SIDE:
                centres.append((top, left))
        wanted = JUMP_CROPS * (number + 1) // len(tiles) - JUMP_CROPS * number // len(tiles)
        for top, left in sorted(centres[k] for k in rng.permutation(len(centres))[:wanted]):
            name = f"{tile.stem}_y{top:03d}_x{left:03d}.png"
            save(DEMO / "jump" / name, image[top : top + SIDE, left : left + SIDE])


def phantom(folder: Path) -> None:
    """Draw treated and control crops; label other controls, noise and blanks as if they were treated ones."""
    crops = render_dataset(240, SIDE, SEED)
    index = crops.rows.reset_index(drop=True)
    treated = index[index["STATE"] == "trt"].groupby("ANNOT", sort=False).head(TREATED_PER_CLASS)
    controls = index[index["STATE"] == "control"].head(2 * OTHERS)
    pretended = treated.drop_duplicates("ANNOT").head(OTHERS)  # one label each, of six classes
    rng = np.random.default_rng(SEED)
    noise = rng.integers(0, 256, (OTHERS, SIDE, SIDE, 3), dtype=np.uint8)
    levels = np.linspace(0, 255, OTHERS).astype(np.uint8)
    blank = np.broadcast_to(levels[:, None, None, None], noise.shape)
    rows = [
        *_rows(folder, "treated", crops.images[treated.index], treated[["CPD_NAME", "ANNOT"]].to_numpy()),
        *_rows(folder, "control", crops.images[controls.index[:OTHERS]], controls[["CPD_NAME", "ANNOT"]].to_numpy()),
        *_rows(
            folder,
            "copy-of-control",
            crops.images[controls.index[OTHERS:]],
            pretended[["CPD_NAME", "ANNOT"]].to_numpy(),
        ),
        *_rows(folder, "noise", noise, pretended[["CPD_NAME", "ANNOT"]].to_numpy()),
        *_rows(folder, "blank", blank, pretended[["CPD_NAME", "ANNOT"]].to_numpy()),
    ]
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    hints = {
        "assay": "phantom",
        "channels": {"actin": 0, "tubulin": 1, "dna": 2},
        "pixel_size_um": PIXEL_SIZE_UM[SIDE],
    }
    (folder / "biorewards.json").write_text(json.dumps(hints, indent=2) + "\n", encoding="utf-8")


def _rows(folder: Path, kind: str, images: np.ndarray, labels: Sequence[Sequence[str]]) -> list[Mapping[str, str]]:
    """Write the images of one kind and return their manifest rows; `labels` are (compound, class) pairs."""
    rows = []
    for number, (image, (compound, effect)) in enumerate(zip(images, labels, strict=False), start=1):
        name = f"{kind}_{number:02d}.png"
        save(folder / name, image)
        rows.append({"file": name, "compound": compound, "moa": effect, "Kind": kind})
    return rows


if __name__ == "__main__":
    if len(sys.argv) > 1:
        jump(Path(sys.argv[1]))
    phantom(DEMO / "phantom")
