"""Which treated image is trained with which control: an index in the IMPA / CellFlux layout, matched by batch or plate.

One item a treated row; its control is drawn anew each time from the control rows of the same split with the same batch
(or plate). What a step sees is a function of the seed and the step alone: a run that is stopped and resumed sees what
it would have seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biorewards.io.images import ImageError, decode
from biorewards.io.manifest import Manifest, ManifestError, read_manifest
from generators.embeddings import unknown_compound

Rows = npt.NDArray[np.int64]
#: What a control may share with its treated image -> column of a manifest.
MATCHES = {"batch": "Metadata_Batch", "plate": "Metadata_Plate"}
#: rxrx1 says in ANNOT what the other data sets say in STATE.
_ANNOT = {"treated": "treated", "negative_control": "control"}


@dataclass(frozen=True)
class Pairs:
    """The treated rows of one split and the controls that each may be drawn with.

    treated: (N,) rows of `manifest`. compounds: the name of each. group: (N,) index into `controls`.
    controls: rows of the controls of each batch or plate, none empty.
    """

    manifest: Manifest
    treated: Rows
    compounds: list[str]
    group: Rows
    controls: list[Rows]

    def __len__(self) -> int:
        return len(self.treated)

    @property
    def names(self) -> list[str]:
        """Unique compounds, sorted by code point as CellFlux and IMPA number them."""
        return sorted(set(self.compounds))

    @property
    def channels(self) -> int:
        """Of the first treated image. Raises ImageError where it cannot be read."""
        return int(read_rows(self.manifest, self.treated[:1], None).shape[1])

    def order(self, seed: int, first: int, count: int) -> Rows:
        """Items first .. first + count - 1 (count,) of an endless sequence: every item once, in an order drawn anew."""
        places = np.arange(first, first + count)
        rounds = {
            int(r): np.random.default_rng([seed, int(r), 1]).permutation(len(self)) for r in set(places // len(self))
        }
        return np.array([rounds[int(p // len(self))][p % len(self)] for p in places], dtype=np.int64)

    def draw(self, seed: int, step: int, size: int) -> tuple[Rows, Rows]:
        """Items (size,) of a step and the rows (size,) of their controls."""
        items = self.order(seed, step * size, size)
        rng = np.random.default_rng([seed, step, 2])
        return items, np.array([rng.choice(self.controls[self.group[item]]) for item in items], dtype=np.int64)


def state_of(manifest: Manifest) -> npt.NDArray[np.object_]:
    """ "treated", "control" or "" of every row: STATE (1, trt, 0, control), or ANNOT where it says so (rxrx1)."""
    table = manifest.table
    if "Metadata_State" in table:
        return table["Metadata_State"].where(table["Metadata_State"].isin(["treated", "control"]), "").to_numpy(object)
    return table["Metadata_MoA"].map(lambda text: _ANNOT.get(text.strip().casefold(), "")).to_numpy(object)


def read_pairs(
    path: Path, *, split: str | None = "train", match: str = "batch", held_out: Collection[str] = (),
    only: Collection[str] = (),
) -> Pairs:  # fmt: skip
    """The pairs of an index (a folder with one, or the table). Held-out compounds are left out, `only` keeps those.

    split: rows with this SPLIT (any case); None takes all. match: "batch" (BBBC021, rxrx1) or "plate" (cpg0000).
    Raises ManifestError naming column and value: no such column or split, unknown compound, a batch without control,
    a file that the index names and that may not be read.
    """
    if match not in MATCHES:
        raise ManifestError(f"match={match!r}: one of {', '.join(MATCHES)}")
    found = read_manifest(path)
    table, state = found.table, state_of(found)
    keep = np.ones(len(found), dtype=bool)
    if split is not None:
        if "Metadata_Split" not in table:
            raise ManifestError(f"{path}: no column SPLIT (train, test); add one, plates or batches whole")
        splits = table["Metadata_Split"].str.strip().str.casefold().to_numpy(object)
        keep = splits == split.casefold()
        if not keep.any():
            raise ManifestError(f"{path}: SPLIT has no {split!r}; it has {_some(splits)}")
    if not (state == "treated").any():
        raise ManifestError(f"{path}: no row is treated; column STATE says 1 or trt for treated, 0 or control")
    column = MATCHES[match]
    if column not in table or not (table[column] != "").any():
        other = next((m for m in MATCHES if m != match), "")
        raise ManifestError(f"{path}: no column {match.upper()}, by which controls are matched; match by {other}?")
    compound = table["Metadata_Compound"].str.strip().to_numpy(object)
    known = sorted(set(compound[state == "treated"]))
    for name in (*held_out, *only):
        if name not in known:
            raise ManifestError(unknown_compound(name, known, str(path)))
    chosen = keep & (state == "treated") & ~np.isin(compound, list(held_out))
    if only:
        chosen &= np.isin(compound, list(only))
    treated = np.flatnonzero(chosen)
    if not len(treated):
        raise ManifestError(f"{path}: no treated row is left in split {split!r} after the choice of compounds")
    for row in treated:
        if not compound[row]:
            raise ManifestError(f"{path}: row {row + 1} ({table['Metadata_File'][row]}) has no compound (CPD_NAME)")
    where = table[column].to_numpy(object)
    groups = sorted(set(where[treated]))
    controls = [np.flatnonzero(keep & (state == "control") & (where == group)) for group in groups]
    for group, rows in zip(groups, controls, strict=True):
        if not len(rows):
            raise ManifestError(
                f"{path}: {match} {group!r} has treated rows and no control (STATE 0) in split {split!r}; add "
                f"controls, take these rows out, or match by {next(m for m in MATCHES if m != match)}"
            )
    for row in (*treated, *np.concatenate(controls)):
        if int(row) in found.problems:
            raise ManifestError(f"{path}: row {row + 1}: {found.problems[int(row)]}")
    number = {group: i for i, group in enumerate(groups)}
    return Pairs(found, treated, list(compound[treated]), np.array([number[g] for g in where[treated]]), controls)


def _some(values: Iterable[object]) -> str:
    return ", ".join(repr(v) for v in sorted(set(map(str, values)))[:6])


def read_rows(manifest: Manifest, rows: Rows, channels: int | None, size: tuple[int, int] | None = None) -> Tensor:
    """The images of rows, (N, C, H, W) float32 in [0, 1]. Raises ImageError naming the file that cannot be read or
    has other channels or another size than (H, W) `size` (default: that of the first)."""
    images = []
    for row in rows:
        files = manifest.files[int(row)]
        if int(row) in manifest.problems:
            raise ImageError(str(manifest.table["Metadata_File"].iat[int(row)]), manifest.problems[int(row)])
        pixels = decode(files, channels).pixels
        size = size or (pixels.shape[1], pixels.shape[2])
        if pixels.shape[1:] != size:
            raise ImageError(files[0], f"is {pixels.shape[1]} x {pixels.shape[2]} px, others are {size[0]} x {size[1]}")
        images.append(pixels)
    return torch.from_numpy(np.stack(images))
