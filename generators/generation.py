"""A folder of generated images: which control, compound and seed each has, in the layout that `score` and `audit` read.

Image k of a compound follows from the generator, the controls, the seed, the compound and k alone: not from how many
images or which other compounds were asked for. So a run that stopped goes on, and one that is finished can be made
larger, without making an image again.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from biorewards import __version__
from biorewards.io.images import ImageError, read_image
from biorewards.io.manifest import HINTS_FILE, Manifest, ManifestError
from biorewards.io.reading import SAME_PIXEL
from biorewards.io.tables import atomic, write_table, write_text
from generators.base import Generator, seeded, to_uint8
from generators.embeddings import unknown_compound
from generators.pairs import Rows, read_rows, state_of
from generators.pictures import mosaic, write_picture

#: Files of the folder. The settings come first and the manifest last: with a manifest a folder is complete.
SETTINGS, MANIFEST, GRID = "generation.json", "manifest.csv", "grid.png"
#: Images of a compound in the grid.
SHOWN = 8
#: Settings that a run may change when it goes on: more images, more compounds, files moved (their content is checked).
_FREE = ("n", "compounds", "controls", "checkpoint")

#: progress(images done, images)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What will be made, one row an image: file, compound, moa, control, seed, and the control's plate, batch, well.

    rows: the control of each row, in `controls`. pool: hash of the files that controls were chosen from.
    """

    table: pd.DataFrame
    rows: Rows
    controls: Manifest
    compounds: list[str]
    pool: str


def pick_controls(manifest: Manifest, split: str | None = None) -> Rows:
    """Rows that are controls: STATE says so; without a STATE all. split: only rows with this SPLIT.

    Raises ManifestError where none is left, naming the column and what it holds.
    """
    table, state = manifest.table, state_of(manifest)
    keep = (state == "control") if (state != "").any() else np.ones(len(manifest), dtype=bool)
    if not keep.any():
        raise ManifestError(f"{manifest.root}: column STATE has no control (0 or control)")
    if split is not None:
        if "Metadata_Split" not in table:
            raise ManifestError(f"{manifest.root}: no column SPLIT to choose {split!r} by; leave --split out")
        splits = table["Metadata_Split"].str.strip().str.casefold()
        keep &= (splits == split.casefold()).to_numpy()
        if not keep.any():
            raise ManifestError(
                f"{manifest.root}: no control has SPLIT {split!r}; there are {', '.join(sorted(set(splits)))}"
            )
    return np.flatnonzero(keep)


def check_scale(generator: Generator, controls: Manifest) -> None:
    """Raise ValueError where generator and controls both name their pixel size and the two differ by more than 2 %.

    A network draws cells at the size at which it saw them; on other pixels it draws others, without a word.
    """
    known = getattr(getattr(generator, "origin", None), "args", {}).get("pixel_size_um")
    given = controls.hints.pixel_size
    if known is not None and given is not None and abs(given / known - 1) > SAME_PIXEL:
        raise ValueError(
            f"{controls.root}: its pixels are {given:g} um ({HINTS_FILE}), {generator.name} was trained on {known:g} "
            "um: resample the controls (phantoms of 0.64 um: biorewards phantom --size 48)"
        )


def make_plan(
    generator: Generator, controls: Manifest, compounds: Sequence[str] | None, n: int, seed: int,
    split: str | None = None,
) -> Plan:  # fmt: skip
    """Decide control and seed of n images of each compound. compounds: None takes all that the generator knows.

    Every compound goes through all controls in an order of its own before it takes one again. Raises ManifestError
    for controls that cannot be used, ValueError for an unknown compound or a generator without a table.
    """
    known = generator.compounds
    if compounds is None and known is None:
        raise ValueError(f"{generator.name} has no compound table here: load it with one (--set embeddings=TABLE.csv)")
    names = list(dict.fromkeys(compounds if compounds is not None else known or []))
    for name in names:
        if known is None or name not in known:
            raise ValueError(unknown_compound(name, known or [], generator.name))
    chosen = pick_controls(controls, split)
    table, mechanism = controls.table, _mechanisms(controls)
    lines: list[dict[str, Any]] = []
    rows: list[int] = []
    folders = _folders(known or [])
    codes = [zlib.crc32(name.encode()) for name in names]
    orders = [np.random.default_rng([seed, code]).permutation(chosen) for code in codes]
    # The k-th image of every compound, then the next: a larger n only adds rows, and few compounds fill a batch, too.
    for k in range(n):
        for name, code, order in zip(names, codes, orders, strict=True):
            row = int(order[k % len(order)])
            rows.append(row)
            lines.append({
                "file": f"{folders[name]}/{k:05d}", "compound": name, "moa": mechanism.get(name, ""),
                "plate": table["Metadata_Plate"].iat[row], "well": "",
                **{c.lower(): table[f"Metadata_{c}"].iat[row] for c in ("Batch", "Split") if f"Metadata_{c}" in table},
                "control": table["Metadata_File"].iat[row],
                "seed": int(np.random.SeedSequence([seed, code, k]).generate_state(1, np.uint64)[0] >> 1),
            })  # fmt: skip
    pool = "\n".join(table["Metadata_File"].iloc[chosen].tolist())
    digest = hashlib.sha256(pool.encode("utf-8", "replace")).hexdigest()[:16]
    return Plan(pd.DataFrame(lines), np.array(rows, dtype=np.int64), controls, names, digest)


def _mechanisms(manifest: Manifest) -> dict[str, str]:
    """Compound -> mechanism, as the treated rows beside the controls have it."""
    treated = manifest.table[state_of(manifest) != "control"]
    named = treated[(treated["Metadata_Compound"] != "") & (treated["Metadata_MoA"] != "")]
    return dict(zip(named["Metadata_Compound"], named["Metadata_MoA"], strict=True))


def _folders(names: Sequence[str]) -> dict[str, str]:
    """A folder for each compound that a generator knows: its name, signs that files cannot have as %XX.

    From the whole table and not from what is drawn now, so that a compound has one folder in every run. Names that a
    file system may take for one, and long ones, have a checksum.
    """
    plain = {name: re.sub(r"^[.]", "%2E", quote(name, safe=" +(),;=")) for name in names}
    often = Counter(folder.casefold() for folder in plain.values())
    return {
        name: f"{folder[:80]}~{zlib.crc32(name.encode()):08x}"
        if often[folder.casefold()] > 1 or len(folder) > 120
        else folder
        for name, folder in plain.items()
    }


def generate(
    generator: Generator, plan: Plan, out: Path, *, seed: int, steps: int | None = None, batch: int = 16,
    device: torch.device | str = "cpu", progress: Progress | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Make the images of a plan in `out`; what is there already stays. Returns the manifest.

    Written: `generation.json` (everything that decides an image), `<compound>/<k>.png` (uint8; .npy for other than 1
    or 3 channels), `grid.png`, `biorewards.json` (assay, channels and pixel size of the controls) and `manifest.csv`.
    Raises ValueError where `out` was begun with other settings (it names them), FileExistsError where it holds
    something else, ManifestError for a control that cannot be read, ValueError for images that are no numbers.
    """
    channels = generator.capabilities.channels
    suffix = ".png" if channels in (1, 3) else ".npy"
    settings = _settings(generator, plan, seed, steps, batch)
    _begin(out, settings)
    table = plan.table.assign(file=plan.table["file"] + suffix)
    files = [out / name for name in table["file"]]
    size: tuple[int, int] | None = None
    done = 0
    for start in range(0, len(table), batch):
        these = slice(start, start + batch)
        if not all(file.exists() for file in files[these]):
            control = _read(plan, plan.rows[these], channels, size)
            size = (control.shape[2], control.shape[3])
            # The whole batch again, so that an image has the same neighbours in a run that goes on.
            images = generator.sample(
                control.to(device), list(table["compound"][these]), steps=steps,
                generator=seeded(table["seed"][these].tolist()),
            )  # fmt: skip
            if not bool(torch.isfinite(images).all()):
                raise ValueError(f"{generator.name} drew NaN or infinity; its weights or settings are unusable")
            for file, image in zip(files[these], to_uint8(images.cpu(), generator.capabilities.floors), strict=True):
                if not file.exists():
                    _write(file, image)
        done += len(files[these])
        if progress is not None:
            progress(done, len(table))
    write_picture(out / GRID, _grid(plan, files, channels))
    hints = plan.controls.hints
    kept = {"assay": hints.assay, "channels": hints.channels, "pixel_size_um": hints.pixel_size}
    write_text(out / HINTS_FILE, json.dumps({k: v for k, v in kept.items() if v is not None}, indent=1) + "\n")
    about = {key: settings[key] for key in ("generator", "digest", "guidance", "solver", "steps") if key in settings}
    table = table.assign(**{key: "" if value is None else str(value) for key, value in about.items()})
    table = table.sort_values("file", ignore_index=True)
    write_table(out / MANIFEST, table)
    return table


def _read(plan: Plan, rows: Rows, channels: int, size: tuple[int, int] | None) -> Tensor:
    try:
        return read_rows(plan.controls, rows, channels, size)
    except ImageError as error:
        raise ManifestError(f"control {error}") from error


def _settings(generator: Generator, plan: Plan, seed: int, steps: int | None, batch: int) -> dict[str, Any]:
    about = {
        "biorewards": __version__, **generator.describe(), "seed": seed, "batch": batch, "control_files": plan.pool,
        "controls": str(plan.controls.root), "compounds": plan.compounds, "n": len(plan.rows) // len(plan.compounds),
    }  # fmt: skip
    return about if steps is None else about | {"steps": steps}


def _begin(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error}); choose another --out") from None
        changed = [key for key in settings | before if key not in _FREE and before.get(key) != settings.get(key)]
        if changed:
            was, now = before.get(changed[0]), settings.get(changed[0])
            raise ValueError(
                f"{out}: was begun with {changed[0]} {was!r}, now it is {now!r}; choose another --out, or give what it "
                "was begun with to go on"
            )
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no {SETTINGS}; choose another --out")
    # A folder that is being extended is not complete until its manifest is written again.
    (out / MANIFEST).unlink(missing_ok=True)
    write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _write(file: Path, image: Tensor) -> None:
    """(C, H, W) uint8 as PNG (C = 1 or 3) or NPY (H, W, C)."""
    pixels = image.permute(1, 2, 0).numpy()
    with atomic(file) as (temporary,):
        if file.suffix == ".npy":
            with temporary.open("wb") as stream:
                np.save(stream, pixels)
        else:
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(temporary, format="PNG")


def _grid(plan: Plan, files: Sequence[Path], channels: int) -> Any:
    """A row a compound: the control of its first image, then its first images."""
    rows = []
    for name in plan.compounds:
        mine = np.flatnonzero((plan.table["compound"] == name).to_numpy())[:SHOWN]
        drawn = [torch.from_numpy(read_image(files[i], channels)) for i in mine]
        rows.append(torch.cat([read_rows(plan.controls, plan.rows[mine[:1]], channels), torch.stack(drawn)]))
    return mosaic(rows)
