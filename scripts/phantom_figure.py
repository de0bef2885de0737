"""Draw docs/phantom.jpg: eight phantom crops of each class. `python scripts/phantom_figure.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from biorewards.phantom import CLASSES, render_dataset

OUT = Path(__file__).resolve().parents[1] / "docs" / "phantom.jpg"
COLUMNS, SIZE, LABEL = 8, 96, 190
#: Brightened for the eye: grey level 160 is shown as full.
FULL = 160


def main() -> None:
    """Write the figure."""
    crops = render_dataset(1300, SIZE, seed=11)
    sheet = Image.new("RGB", (LABEL + COLUMNS * SIZE, len(CLASSES) * SIZE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for row, name in enumerate(CLASSES):
        draw.text((6, row * SIZE + SIZE // 2 - 9), name, fill="black", font=font)
        rows = np.flatnonzero(crops.rows["ANNOT"] == name)
        # Spread over plates and wells.
        for column, i in enumerate(rows[np.linspace(0, len(rows) - 1, COLUMNS).astype(int)]):
            shown = np.minimum(crops.images[i].astype(float) * 255 / FULL, 255).astype(np.uint8)
            sheet.paste(Image.fromarray(shown), (LABEL + column * SIZE, row * SIZE))
    sheet.save(OUT, quality=88)
    print(OUT)


if __name__ == "__main__":
    main()
