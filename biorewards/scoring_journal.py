"""Finished parts of a scoring run on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from biorewards.io.tables import atomic, write_text
from biorewards.scoring_tables import Part, join

#: A part is written after this many rows or seconds, whichever comes first: at most this much is lost.
PART_ROWS, PART_SECONDS = 512, 20.0
SETTINGS = "settings.json"


class Journal:
    """A folder of parts, with the settings that they were made with.

    settings: everything that moves a number or the meaning of a row. A journal of other settings is never continued.
    resume: continue what is there. Otherwise an earlier journal in this folder is discarded.

    Raises ValueError when `resume` meets other settings (it names them), or the folder holds something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self._waiting: list[Part] = []
        self._since = time.monotonic()
        text = json.dumps(settings, sort_keys=True, indent=1)
        if folder.exists():
            if not (folder / SETTINGS).is_file():
                raise ValueError(f"{folder}: is no unfinished run of biorewards; move it away or choose another --out")
            if resume:
                self._continue(json.loads(text))
            else:
                shutil.rmtree(folder)
        if not folder.exists():
            write_text(folder / SETTINGS, text)

    def _continue(self, settings: dict[str, Any]) -> None:
        then = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        changed = sorted(key for key in settings.keys() | then.keys() if settings.get(key) != then.get(key))
        if changed:
            what = "; ".join(f"{key} was {then.get(key)}, is {settings.get(key)}" for key in changed)
            raise ValueError(
                f"{self.folder}: was made with other settings ({what}); undo that, or start anew without --resume"
            )
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                self.parts.append(Part(*(stored[name] for name in Part._fields)))

    def add(self, part: Part) -> None:
        """Take a finished part; it is on disk after `PART_ROWS` rows or `PART_SECONDS`, or at `flush`."""
        self._waiting.append(part)
        rows = sum(len(one.rows) for one in self._waiting)
        if rows >= PART_ROWS or time.monotonic() - self._since > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            whole = join(self._waiting)
            with atomic(self.folder / f"{len(self.parts):06d}.npz") as (path,), path.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **whole._asdict())
            self.parts.append(whole)
            self._waiting = []
        self._since = time.monotonic()


def discard(folder: Path) -> None:
    """Delete a journal, once the tables are written."""
    if (folder / SETTINGS).is_file():
        shutil.rmtree(folder)
