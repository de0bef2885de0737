"""A run as it happens: JSONL that is always written and is the truth, a live line, trackers, parquet."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pandas as pd

from biorewards.io.tables import atomic, write_table

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG, TABLE = "metrics.jsonl", "metrics.parquet"
#: Short names of the seven on the live line; others are shown by their own.
SHORT = {
    "moa": "moa", "nucleus_in_cytoplasm": "in-cyto", "nucleus_roundness": "round", "nucleus_size": "n-size",
    "cytoplasm_size": "c-size", "nucleus_count": "n-count", "cytoplasm_count": "c-count",
}  # fmt: skip


class Journal:
    """Lines {"kind": train, eval or real, "step": ...} of a run. Only the main process writes."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps: int, stream: IO[str] | None = None) -> None:
        self.path, self.table, self.accelerator, self.steps = folder / LOG, folder / TABLE, accelerator, steps
        self.stream = stream or sys.stderr
        self.lines: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Keep what was logged up to `step`; what came later, or was cut short by a kill, is done again."""
        if not self.accelerator.is_main_process:
            return
        self.lines = [line for line in read_lines(self.path) if line["step"] <= step] if step else []
        with atomic(self.path) as (temporary,):
            temporary.write_text("".join(_text(line) for line in self.lines), encoding="utf-8")

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line, and hand its numbers to the trackers."""
        line = {"kind": kind, "step": step, **values}
        if self.accelerator.is_main_process:
            self.lines.append(line)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_text(line))
        numbers = {f"{kind}/{key}": v for key, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self.accelerator.log(numbers, step=step)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The last line of a kind."""
        return next((line for line in reversed(self.lines) if line["kind"] == kind), None)

    def first(self, kind: str) -> dict[str, Any] | None:
        """The first line of a kind."""
        return next((line for line in self.lines if line["kind"] == kind), None)

    def write_table(self) -> None:
        """All lines as one parquet table; `alarms` as text."""
        if self.accelerator.is_main_process and self.lines:
            table = pd.DataFrame(self.lines)
            if "alarms" in table:
                table["alarms"] = ["; ".join(a) if isinstance(a, list) else "" for a in table["alarms"]]
            write_table(self.table, table)

    def live(self, line: dict[str, Any]) -> None:
        """What a step did, on one line of stderr that is written over; a line each where stderr is a file."""
        if not self.accelerator.is_main_process:
            return
        rewards = " ".join(
            f"{SHORT.get(key.removeprefix('reward/'), key.removeprefix('reward/'))} {value:.2f}"
            for key, value in line.items()
            if key.startswith("reward/")
        )
        text = (
            f"step {line['step']}/{self.steps}  total {line['total']:.2f} ({rewards})  kl {line['kl']:.2g}  "
            f"r ±{line['r_sd']:.2f}  groups {100 * line['useful_groups']:.0f} %  {line['samples_per_s']:.1f} img/s  "
            f"scoring {100 * line['score_share']:.0f} %"
        )
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[2K" + text[:width], end="", file=self.stream, flush=True)
        else:
            print(text, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own on stderr."""
        if self.accelerator.is_main_process:
            print(("\r\x1b[2K" if self.stream.isatty() else "") + text, file=self.stream, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; [] where there is none."""
    found: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append({key: math.nan if v is None else v for key, v in json.loads(text).items()})
            except ValueError:
                continue  # cut short when the run was killed
    return found


def _text(line: dict[str, Any]) -> str:
    """JSON has no NaN: null."""
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    return json.dumps(plain, ensure_ascii=False) + "\n"
