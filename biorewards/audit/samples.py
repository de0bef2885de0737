"""The rows of an audit: real images in two parts, copies of controls, and what models made; scored and encoded.

The reference part of the real images is the yardstick: distances are taken to it, and copies are looked for in it. The
held-out part is the row that says what real images score. Copies of controls are the row that says what doing nothing
scores: for every held-out image a control image, judged as if it were of that image's class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from biorewards.assay import Assay
from biorewards.audit.encoder import Encoded, Encoder
from biorewards.io.images import FloatImage
from biorewards.io.manifest import Manifest, ManifestError
from biorewards.io.reading import Reader
from biorewards.io.targets import assign_targets
from biorewards.reward import Suite
from biorewards.scoring import score_folder

REAL, CONTROL, REFERENCE = "real", "copy-control", "reference"
#: Copies of controls and held-out real images are scored up to these numbers: intervals are narrow long before.
MOST_COPIES, MOST_REAL = 2_000, 10_000

Rows = npt.NDArray[np.intp]
#: progress(what, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """Scored images: one row of an audit.

    kind: real, control, reference or model. scores: as `score_folder` makes them (the reference has no rewards).
    encoded, manifest: of the same rows. read: row -> (C, H, W) image, for galleries. notes: on labels and files.
    """

    name: str
    kind: str
    scores: pd.DataFrame
    encoded: Encoded
    manifest: Manifest
    read: Callable[[int], FloatImage]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """(N,) the file could be read."""
        return np.asarray(np.isfinite(self.encoded.embedding).all(1), dtype=np.bool_)


@dataclass(frozen=True)
class Scorer:
    """How folders become samples: assay, suite and device, and `folder`, where finished work is kept for a rerun."""

    assay: Assay
    suite: Suite
    encoder: Encoder
    folder: Path
    plan: Callable[[Manifest], Reader]
    batch_size: int = 16
    workers: int = 4
    device: str = "cpu"
    progress: Progress | None = None

    def __call__(self, name: str, kind: str, manifest: Manifest) -> Sample:
        """Score a manifest, or take what an earlier run has finished of it."""
        rewards = Suite([], {}, self.assay.fingerprint) if kind == REFERENCE else self.suite
        reader = self.plan(manifest)
        notes = list(manifest.notes)
        tell = self.progress

        def run(resume: bool) -> Sample:
            found = score_folder(
                manifest, self.assay, rewards, reader=reader, batch_size=self.batch_size, workers=self.workers,
                device=self.device, features=self.encoder, resume_dir=self.folder / name, resume=resume,
                progress=None if tell is None else lambda done, total: tell(name, done, total),
            )  # fmt: skip
            unread = found.scores["Metadata_Error"] != ""
            if unread.all():
                raise ManifestError(f"{name}: no image can be read; the first: {found.scores['Metadata_Error'].iat[0]}")
            if unread.any():
                notes.append(f"{int(unread.sum())} of {len(found.scores)} files cannot be read and are left out")
            encoded = self.encoder.split(found.features)
            return Sample(
                name,
                kind,
                found.scores,
                encoded,
                manifest,
                lambda row: reader(row).pixels,
                tuple(notes + found.notes),
            )

        if not (self.folder / name / "settings.json").is_file():
            return run(resume=False)
        try:
            return run(resume=True)
        except ValueError as error:
            if "other settings" not in str(error):
                raise
            notes.append(f"an earlier run had other settings or files and was not used ({error})")
            return run(resume=False)


def subset(manifest: Manifest, rows: Iterable[int], table: pd.DataFrame | None = None) -> Manifest:
    """Some rows of a manifest; `table` (one row each) replaces their metadata."""
    chosen = [int(row) for row in rows]
    kept = manifest.table.iloc[chosen].reset_index(drop=True) if table is None else table.reset_index(drop=True)
    problems = {new: manifest.problems[old] for new, old in enumerate(chosen) if old in manifest.problems}
    return replace(manifest, table=kept, files=[manifest.files[row] for row in chosen], problems=problems, notes=[])


def split_real(manifest: Manifest, assay: Assay, seed: int) -> tuple[Rows, Rows, str]:
    """Rows of the reference and of the held-out part, and how they were parted.

    A SPLIT column with train and test (or val) decides: the reference is what models were trained on. Otherwise
    halves: by plate, else by well, else by image, whichever first leaves every class with two images on both sides.
    Raises ManifestError with fewer than four images.
    """
    table = manifest.table
    if "Metadata_Split" in table:
        said = table["Metadata_Split"].str.strip().str.lower()
        for held in ("test", "val"):
            if (said == held).sum() >= 2 and (said == "train").sum() >= 2:
                return _rows(said == "train"), _rows(said == held), f"SPLIT column: reference train, held out {held}"
    label = assign_targets(table, assay.classes, assay.compounds).target
    units = {
        "plate": table["Metadata_Plate"],
        "well": table["Metadata_Plate"] + "\0" + table["Metadata_Well"],
        "image": pd.Series(np.arange(len(table)).astype(str)),
    }
    rng = np.random.default_rng(seed)
    for what, unit in units.items():
        names = sorted(unit.unique())
        if len(names) < 2 or (what == "well" and not table["Metadata_Well"].str.strip().any()):
            continue
        odd = {name: place % 2 for place, name in enumerate(rng.permutation(names))}
        half = unit.map(odd).to_numpy()
        if what == "image":  # alternately within each class, in random order
            order = np.lexsort((rng.random(len(table)), label))
            half = np.empty(len(table), int)
            half[order] = np.arange(len(table)) % 2
        if pd.crosstab(label, half).reindex(columns=[0, 1], fill_value=0).to_numpy().min() >= 2:
            return _rows(half == 0), _rows(half == 1), f"halves by {what}, seed {seed}"
    raise ManifestError(f"{manifest.root}: too few real images to hold a half out: two of every class on both sides")


def thin(label: npt.NDArray[np.int64], rows: Rows, most: int, seed: int) -> Rows:
    """At most `most` of the rows, the classes thinned alike, in their order."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng(seed)
    order = rows[np.lexsort((rng.random(len(rows)), label[rows]))]
    return np.sort(order[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))])


def controls_of(manifest: Manifest, assay: Assay) -> Rows:
    """Rows of untreated images: STATE control, or labelled with the assay's control class."""
    target = assign_targets(manifest.table, assay.classes, assay.compounds).target
    state = manifest.table.get("Metadata_State", pd.Series("", index=manifest.table.index))
    return _rows((target == 0) | (state == "control").to_numpy())


def copy_controls(
    held_out: Manifest, controls: Manifest, rows: Rows, assay: Assay, seed: int, most: int = MOST_COPIES
) -> Manifest:
    """The manifest of a model that returns a control image for everything that it is asked for.

    For each row of `held_out` a control from `rows` of `controls`: of the same plate, else of the same batch, else any;
    taken in turn, so that none is used much more than another; never the row's own file.
    """
    table = held_out.table
    label = assign_targets(table, assay.classes, assay.compounds).target
    wanted = thin(label, np.arange(len(table)), most, seed)
    pools = [_pools(controls.table, rows, columns, seed) for columns in (("Plate", "Batch"), ("Batch",), ())]
    chosen = []
    for row in wanted:
        for columns, pool in zip((("Plate", "Batch"), ("Batch",), ()), pools, strict=True):
            waiting = pool.get(_key(table, row, columns), [])
            # The one that waited longest, unless it is the asked image itself.
            place = next((k for k, one in enumerate(waiting) if controls.files[one] != held_out.files[row]), None)
            if place is not None:
                chosen.append(waiting[place])
                waiting.append(waiting.pop(place))
                break
        else:
            raise ManifestError(f"{controls.root}: one control image is too few to stand for itself; add more controls")
    metadata = table.iloc[wanted].reset_index(drop=True)
    metadata["Metadata_File"] = controls.table["Metadata_File"].iloc[chosen].to_numpy()
    return subset(controls, chosen, metadata)


def _pools(table: pd.DataFrame, rows: Rows, columns: tuple[str, ...], seed: int) -> dict[tuple[str, ...], list[int]]:
    pools: dict[tuple[str, ...], list[int]] = {}
    for row in np.random.default_rng(seed).permutation(rows):
        pools.setdefault(_key(table, row, columns), []).append(int(row))
    return pools


def _key(table: pd.DataFrame, row: int, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(table[f"Metadata_{name}"].iat[row]) if f"Metadata_{name}" in table else "" for name in columns)


def _rows(chosen: npt.ArrayLike) -> Rows:
    return np.flatnonzero(np.asarray(chosen))


def standardise(samples: list[Sample], reference: Sample) -> dict[str, torch.Tensor]:
    """Embeddings by sample name, (N, D) float32, in units of the reference's standard deviations."""
    known = reference.encoded.embedding[reference.readable]
    centre, spread = known.mean(0), known.std(0)
    spread[spread < 1e-6] = 1.0
    return {s.name: torch.from_numpy((s.encoded.embedding - centre) / spread) for s in samples}
