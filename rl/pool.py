"""What rollouts start from: controls, compounds and their classes; and real images to hold results against."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.io.images import ImageError
from biorewards.io.targets import assign_targets
from rl.policy import seed_of

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from biorewards.io.manifest import Manifest
    from biorewards.io.reading import Reader

#: Controls held in memory, and real images of each class: more change no mean by much.
MOST_CONTROLS, MOST_REAL = 1024, 100
#: Share of the plates (of the rows, where there is one plate) held out where no column SPLIT says.
HELD_OUT = 0.2


class Group(NamedTuple):
    """One (control, compound): number among a step's groups, row of the controls, index of the compound."""

    number: int
    control: int
    compound: int


@dataclass(frozen=True)
class Pool:
    """controls: (N, C, H, W) float32 in [0, 1], CPU. plate: (N,) whatever controls share that look alike.
    compounds: P names; targets: (P,) int64, their class in the assay."""

    controls: Tensor
    plate: npt.NDArray[np.int64]
    compounds: list[str]
    targets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.controls) or not self.compounds:
            raise ValueError(f"{len(self.controls)} controls and {len(self.compounds)} compounds: at least one of each")

    def groups(self, seed: int, step: int, count: int) -> list[Group]:
        """The groups of a step: every compound equally often, every control equally often, in orders drawn anew for
        each round. A function of its arguments, so there is no position to keep."""
        first = step * count
        compounds = _endless(seed, 1, first, count, len(self.compounds))
        controls = _endless(seed, 2, first, count, len(self.controls))
        return [Group(k, int(a), int(b)) for k, (a, b) in enumerate(zip(controls, compounds, strict=True))]

    @cached_property
    def _members(self) -> dict[int, npt.NDArray[np.int64]]:
        return {int(p): np.flatnonzero(self.plate == p) for p in np.unique(self.plate)}

    def neighbour(self, row: int, key: Sequence[int]) -> int:
        """A control of the same plate, drawn by `key`; it may be the row itself."""
        same = self._members[int(self.plate[row])]
        return int(same[seed_of(*key) % len(same)])

    def only(self, names: Collection[str]) -> Pool:
        """The same controls with some of the compounds."""
        kept = [k for k, name in enumerate(self.compounds) if name in names]
        return replace(self, compounds=[self.compounds[k] for k in kept], targets=self.targets[kept])


def _endless(seed: int, kind: int, first: int, count: int, size: int) -> npt.NDArray[np.int64]:
    places = np.arange(first, first + count)
    rounds = {
        int(r): np.random.default_rng([seed, kind, int(r)]).permutation(size) for r in np.unique(places // size)
    }  # fmt: skip
    return np.array([rounds[int(p // size)][p % size] for p in places], dtype=np.int64)


class Real(NamedTuple):
    """Real treated images, (M, C, H, W) float32 in [0, 1] as large as the generator's; target: (M,) int64."""

    images: Tensor
    target: Tensor


class Data(NamedTuple):
    """train, test: controls that are trained on and those of held-out plates. real, real_test: treated images of the
    same plates, empty where there are none. scale: pixels of the assay a pixel of these images. unseen: compounds
    that are only evaluated."""

    train: Pool
    test: Pool
    real: Real
    real_test: Real
    scale: float
    unseen: list[str]
    notes: list[str]


def read_data(
    found: Manifest, reader: Reader, assay: Assay, known: Sequence[str] | None, *, hold_out: Collection[str] = (),
    only: Collection[str] = (), seed: int = 0,
) -> Data:  # fmt: skip
    """Controls and, where the table has them, real treated images, at their own pixel size.

    found, reader: of `read_manifest` and `plan_reading`. known: compounds that the generator can draw.
    Controls are rows whose STATE says so, else rows of the assay's control class; a table without any label is all
    controls. Held out are rows whose SPLIT is not train, else a fifth of the plates. hold_out: compounds that are
    evaluated and not trained on; only: no others. Raises ValueError, ImageError.
    """
    rows = _rows(found, assay, seed)
    rng = np.random.default_rng([seed, 7])
    scale, table, own = reader.scale, rows.table, replace(reader, scale=1.0, crop_size=None)
    plates = table["Metadata_Plate"].where(table["Metadata_Plate"] != "", table.get("Metadata_Batch", ""))
    plate = pd.factorize(plates)[0].astype(np.int64)
    compounds, targets, notes = usable_compounds(assay, known, only, hold_out)
    pools = []
    for part in (rows.trained, ~rows.trained):
        chosen = _some(np.flatnonzero(rows.control & rows.usable & part), MOST_CONTROLS, rng)
        if not len(chosen):
            raise ValueError(
                f"{found.root}: no control is left {'to train on' if part is rows.trained else 'to evaluate on'}; "
                "SPLIT needs train and another word, or there must be more than one control"
            )
        pools.append(Pool(_read(own, chosen), plate[chosen], compounds, targets))
    real, real_test = read_real(found, reader, assay, seed)
    train = pools[0].only([name for name in compounds if name not in set(hold_out)])
    return Data(train, pools[1], real, real_test, scale, sorted(hold_out), [*rows.notes, *notes])


def read_real(found: Manifest, reader: Reader, assay: Assay, seed: int = 0) -> tuple[Real, Real]:
    """Real treated images at their own pixel size, at most 100 a class: of training plates and of held-out ones.

    Which they are depends on the table alone (and, where it names no split, on seed), so whoever measures statistics
    on them measures the same. Raises ValueError, ImageError.
    """
    rows, parts = _rows(found, assay, seed), []
    reader = replace(reader, scale=1.0, crop_size=None)
    for number, part in enumerate((rows.trained, ~rows.trained)):
        rng = np.random.default_rng([8, number])
        treated = [
            _some(np.flatnonzero((rows.target == k) & ~rows.control & rows.usable & part), MOST_REAL, rng)
            for k in range(1, len(assay.classes))
        ]
        chosen = np.concatenate(treated) if treated else np.zeros(0, dtype=np.int64)
        images = _read(reader, chosen) if len(chosen) else torch.zeros(0, 3, 1, 1)
        parts.append(Real(images, torch.from_numpy(rows.target[chosen])))
    return parts[0], parts[1]


class _Rows(NamedTuple):
    """What each row of a table is, (N,) each."""

    table: pd.DataFrame
    target: npt.NDArray[np.int64]
    control: npt.NDArray[np.bool_]
    usable: npt.NDArray[np.bool_]
    trained: npt.NDArray[np.bool_]
    notes: list[str]


def _rows(found: Manifest, assay: Assay, seed: int) -> _Rows:
    labelled = assign_targets(found.table, assay.classes, assay.compounds)
    table, target = labelled.table, labelled.target
    state = table["Metadata_State"].to_numpy(object) if "Metadata_State" in table else np.full(len(table), "")
    control = (state == "control") if (state == "control").any() else target == 0
    if not control.any():
        if (target >= 0).any():
            raise ValueError(
                f"{found.root}: no row is a control: STATE 0 or control, or compound or class {assay.classes[0]!r}"
            )
        control = np.ones(len(table), dtype=bool)
    usable = np.array([row not in found.problems for row in range(len(table))])
    return _Rows(table, target, control, usable, _training_rows(table, seed), labelled.notes)


def usable_compounds(
    assay: Assay, known: Sequence[str] | None, only: Collection[str] = (), hold_out: Collection[str] = ()
) -> tuple[list[str], npt.NDArray[np.int64], list[str]]:
    """Names that the generator can draw and whose treated class the assay knows, their classes (P,), and notes.

    Raises ValueError for a name in `only` or `hold_out` that is none of them, and where none is left.
    """
    if known is None:
        raise ValueError("the generator has no compound table; load it with embeddings=CSV (--set embeddings=...)")
    names = pd.DataFrame({"Metadata_Compound": list(known), "Metadata_MoA": ""})
    target = assign_targets(names, assay.classes, assay.compounds).target
    kept = {name: int(k) for name, k in zip(known, target, strict=True) if k > 0}
    if missing := sorted((set(only) | set(hold_out)) - set(kept)):
        raise ValueError(
            f"compound {missing[0]!r} cannot be rolled out: the generator does not know it, or assay {assay.name} has "
            f"no treated class for it. Usable: {', '.join(kept) or 'none'}"
        )
    left_out = [name for name, k in zip(known, target, strict=True) if k < 0]
    if only:
        kept = {name: k for name, k in kept.items() if name in {*only, *hold_out}}
    if not set(kept) - set(hold_out):
        raise ValueError(f"no compound of the generator ({', '.join(known)}) is in a treated class of {assay.name}")
    notes = []
    if left_out:
        notes.append(
            f"{len(left_out)} compounds of the generator have no class in {assay.name} and are not rolled out: "
            + ", ".join(left_out)
        )
    return list(kept), np.array(list(kept.values()), dtype=np.int64), notes


def _training_rows(table: pd.DataFrame, seed: int) -> npt.NDArray[np.bool_]:
    if "Metadata_Split" in table and (table["Metadata_Split"] != "").any():
        training: npt.NDArray[np.bool_] = (table["Metadata_Split"].str.casefold() == "train").to_numpy(bool)
        return training
    rng = np.random.default_rng([seed, 6])
    unit = table["Metadata_Plate"].to_numpy(object)
    if len(set(unit)) < 2:
        unit = np.arange(len(table)).astype(object)
    plates = np.array(sorted(set(unit)), dtype=object)
    held = rng.permutation(plates)[: max(1, round(HELD_OUT * len(plates)))]
    return ~np.isin(unit, held)


def _some(rows: npt.NDArray[np.int64], most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _read(reader: Reader, rows: npt.NDArray[np.int64]) -> Tensor:
    images = [reader(int(row)).pixels for row in rows]
    for row, image in zip(rows, images, strict=True):
        if image.shape != images[0].shape:
            sizes = " x ".join(map(str, image.shape[1:])), " x ".join(map(str, images[0].shape[1:]))
            raise ImageError(
                str(reader.manifest.table["Metadata_File"].iat[int(row)]), f"is {sizes[0]} px, others {sizes[1]}"
            )
    return torch.from_numpy(np.stack(images))
