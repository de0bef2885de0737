"""A folder of images to a table of scores: read, judge, collect.

Files are decoded in threads while the batch before them is judged. Rows come out in input order. The number that an
image gets does not depend on what lies beside it in the folder: only readable images enter batches, in input order,
and every batch has one constant size (the last is filled up with zeros), so good rows are judged by the same
arithmetic whether or not there are bad ones among them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from biorewards.assay import Assay
from biorewards.batch import Batch
from biorewards.io.images import FloatImage, ImageError
from biorewards.io.manifest import Manifest, read_manifest
from biorewards.io.reading import Reader, plan_reading
from biorewards.io.targets import assign_targets
from biorewards.reward import Suite
from biorewards.scoring_journal import Journal
from biorewards.scoring_summary import summarise
from biorewards.scoring_tables import (
    Part,
    bad_rows,
    join,
    no_objects,
    object_array,
    object_table,
    score_table,
    unread,
    value_array,
)

#: Decoded images that may wait for their turn, and those that wait for their batch to fill, bytes each. With one
#: batch at work they bound memory, whatever the number of files.
WINDOW_BYTES = PENDING_BYTES = 256 << 20
#: `batch_size` counts images of up to this many pixels; of larger ones a batch takes proportionally fewer.
BATCH_PIXELS = 128 * 128

__all__ = ["Scored", "bad_rows", "score_folder", "summarise"]

#: progress(rows done, rows)
Progress = Callable[[int, int], None]
#: Rows and images of one shape that are judged together.
_Group = list[tuple[int, FloatImage]]


class Features(Protocol):
    """What else is kept of every image: a batch to (B, width) float32. Asked before the suite, with the same batch."""

    width: int
    fingerprint: str

    def __call__(self, batch: Batch) -> Tensor: ...


class Scored(NamedTuple):
    """scores: one row an image, in input order. objects: one row a nucleus or cell, or None. notes: on labels.

    features: (N, width) float32 in input order, width 0 when none were asked for.
    """

    scores: pd.DataFrame
    objects: pd.DataFrame | None
    notes: list[str]
    features: npt.NDArray[np.float32]


def score_folder(
    source: Manifest | Path | str,
    assay: Assay,
    suite: Suite,
    *,
    reader: Reader | None = None,
    batch_size: int = 16,
    workers: int = 4,
    device: torch.device | str = "cpu",
    objects: bool = False,
    features: Features | None = None,
    resume_dir: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Scored:
    """Score every image of a folder or manifest.

    reader: how files are read (`plan_reading`); default: the folder's own word, else the assay's order and pixel.
    batch_size: images of up to 128 x 128 px a batch; larger images come in smaller batches.
    workers: threads that decode. objects: also make the table of nuclei and cells. features: what else to keep of
        every image, computed from the same batches.
    resume_dir: folder for finished parts, kept when the run stops early; `resume` goes on from it. The caller
        discards it once the tables are safe.

    Columns: `Metadata_*` with `Metadata_Error` (why a file is not scored), `Metadata_Assay` and `Metadata_Suite` (its
    fingerprint); `Reward_<name>`, `Reward_total`, `Reward_total_label_free`; `Reason_<name>`; `Measure_<name>`.

    Raises ManifestError or ValueError when nothing can be scored; a bad file is a row, never an error.
    """
    manifest = source if isinstance(source, Manifest) else read_manifest(source)
    reader = plan_reading(manifest, assay) if reader is None else reader
    targets = assign_targets(manifest.table, assay.classes, assay.compounds)
    assay.to(device)
    judge = _Judge(assay, suite, torch.from_numpy(targets.target), torch.device(device), objects, features)
    journal = None
    parts: list[Part] = []
    if resume_dir is not None:
        settings = {
            "suite": suite.fingerprint,
            "files": _digest(manifest, targets.target),
            "reading": reader.settings(),
            "batch_size": batch_size,
            "device": str(device),
            "objects": objects,
            "features": "" if features is None else features.fingerprint,
        }
        journal = Journal(resume_dir, settings, resume=resume)
        parts += journal.parts
    done = {int(row) for part in parts for row in part.rows}
    todo = [row for row in range(len(manifest)) if row not in done]
    finished = len(done)
    try:
        for part in _judged(judge, _decoded(reader, todo, workers, batch_size), batch_size):
            parts.append(part)
            finished += len(part.rows)
            if journal is not None:
                journal.add(part)
            if progress is not None:
                progress(finished, len(manifest))
    finally:
        if journal is not None:
            journal.flush()
    whole = join(parts)
    table = score_table(targets.table, whole, assay, suite)
    found = object_table(targets.table, whole.objects) if objects else None
    return Scored(table, found, targets.notes, whole.features[np.argsort(whole.rows, kind="stable")])


def _decoded(
    reader: Reader, rows: Iterable[int], workers: int, batch_size: int
) -> Iterator[tuple[int, FloatImage | ImageError]]:
    """(row, image or what is wrong) in the order of `rows`, decoded ahead by `workers` threads."""

    def attempt(row: int) -> FloatImage | ImageError:
        try:
            return reader(row).pixels
        except ImageError as error:
            return error

    waiting: deque[tuple[int, Future[FloatImage | ImageError]]] = deque()
    upcoming = iter(rows)
    ahead = workers
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(waiting) < ahead and (row := next(upcoming, None)) is not None:
                    waiting.append((row, pool.submit(attempt, row)))
                if not waiting:
                    return
                row, future = waiting.popleft()
                found = future.result()
                if not isinstance(found, ImageError):
                    # Far enough ahead to fill the next batch while this one is judged, as memory allows.
                    ahead = max(workers, min(2 * batch_size + workers, WINDOW_BYTES // found.nbytes))
                yield row, found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Judge:
    """Turns a batch of images into a part of the result."""

    assay: Assay
    suite: Suite
    target: Tensor
    device: torch.device
    objects: bool
    features: Features | None = None

    @property
    def width(self) -> int:
        return 0 if self.features is None else self.features.width

    def __call__(self, rows: list[int], images: FloatImage) -> Part:
        """Judge images (B, C, H, W), of which the first len(rows) are wanted and the rest are filling."""
        target = torch.full((len(images),), -1)
        target[: len(rows)] = self.target[rows]
        with torch.inference_mode():
            batch = Batch(torch.from_numpy(images).to(self.device), target.to(self.device), self.assay)
            kept = np.zeros((len(rows), 0), np.float32)
            if self.features is not None:
                kept = self.features(batch)[: len(rows)].float().cpu().numpy()
            values = value_array(self.suite(batch), len(rows))
            regions = (batch.nucleus_regions, batch.cell_regions) if self.objects else None
            objects = object_array(regions, torch.tensor(rows)) if regions else no_objects()
        return Part(np.array(rows), np.full(len(rows), ""), values, objects, kept)


def _judged(judge: _Judge, images: Iterator[tuple[int, FloatImage | ImageError]], batch_size: int) -> Iterator[Part]:
    """Parts of the result: images of one shape in batches of one size, bad rows as they come.

    On a CPU every thread that torch may use judges a batch of its own: hundreds of small operations a batch divide
    badly over threads.
    """
    judges = torch.get_num_threads() if judge.device.type == "cpu" else 1
    with _judging(judge, judges) as submit:
        working: deque[Future[Part]] = deque()
        for found in _groups(judge, images, batch_size):
            if isinstance(found, Part):
                yield found
                continue
            working.append(submit(found, batch_size))
            if judges == 1 or len(working) > judges:
                yield working.popleft().result()
        while working:
            yield working.popleft().result()


@contextmanager
def _judging(judge: _Judge, judges: int) -> Iterator[Callable[[_Group, int], Future[Part]]]:
    """A function that starts judging a group: at once with one judge, else in a pool of threads of one core each."""
    if judges == 1:

        def at_once(group: _Group, batch_size: int) -> Future[Part]:
            done: Future[Part] = Future()
            done.set_result(_judge_group(judge, group, batch_size))
            return done

        yield at_once
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(judges, thread_name_prefix="judge")
    try:
        yield lambda group, batch_size: pool.submit(_judge_group, judge, group, batch_size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(judges)


def _groups(
    judge: _Judge, images: Iterator[tuple[int, FloatImage | ImageError]], batch_size: int
) -> Iterator[_Group | Part]:
    """What may be judged together, in the order in which batches fill; rows that cannot be read as parts."""
    pending: dict[tuple[int, ...], _Group] = {}
    held = 0
    for row, image in images:
        if isinstance(image, ImageError):
            yield unread(row, image.message, judge.suite, judge.width)
            continue
        group = pending.setdefault(image.shape, [])
        group.append((row, image))
        held += image.nbytes
        full = len(group) == _batch_length(image.shape, batch_size)
        if full or held > PENDING_BYTES:
            shape = image.shape if full else max(pending, key=lambda one: _bytes(pending[one]))
            ready = pending.pop(shape)
            held -= _bytes(ready)
            yield ready
    yield from pending.values()


def _judge_group(judge: _Judge, group: _Group, batch_size: int) -> Part:
    shape = group[0][1].shape
    images = np.zeros((_batch_length(shape, batch_size), *shape), dtype=np.float32)
    for place, (_, image) in enumerate(group):
        images[place] = image
    return judge([row for row, _ in group], images)


def _batch_length(shape: tuple[int, ...], batch_size: int) -> int:
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // (shape[-2] * shape[-1])))


def _bytes(group: _Group) -> int:
    return sum(image.nbytes for _, image in group)


def _digest(manifest: Manifest, target: npt.NDArray[np.int64]) -> str:
    """Hash of what is scored: targets, and every file's name, size and time of change."""
    digest = hashlib.sha256(target.tobytes())
    for file in (one for files in manifest.files for one in files):
        state: Any = file.stat() if file.exists() else None
        digest.update(repr((str(file), state and (state.st_size, state.st_mtime_ns))).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]
