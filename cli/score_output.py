"""What `biorewards score` prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from biorewards.assay import Assay
from biorewards.io.manifest import Manifest
from biorewards.io.reading import Reader
from biorewards.memory import free_bytes
from biorewards.reward import Reason, Suite

#: Why a value is missing, in the words of the summary.
MISSING = {
    Reason.BAD_IMAGE: "files not readable",
    Reason.NO_TARGET: "images without a label",
    Reason.UNKNOWN_TARGET: "labels that the assay does not know",
    Reason.NO_REFERENCE: "labels that the assay has no reference for",
}


def first_line(ctx: click.Context, found: Manifest, assay: Assay, reader: Reader, device: str, batch: int) -> str:
    """Assay, channel roles, intensity range and pixel size, where each comes from, and how to change it."""
    given, hints = ctx.params, found.hints
    origin = "given" if given["assay_name"] else "named by the folder" if hints.assay else "default"
    names = found.channel_names
    in_order = sorted(assay.channels.items(), key=lambda pair: pair[1])
    picked = reader.channels or tuple(range(assay.n_channels))
    roles = ", ".join(f"{role}={names[picked[k]] if names else picked[k]}" for role, k in in_order)
    by = "given" if given["channels"] else "named by the folder" if hints.channels else "assay's order"
    if names and not given["channels"]:
        by = "by name"
    if reader.intensity_range is None:
        counts = "full range of the files' integers"
    else:
        counts = f"{reader.intensity_range[0]:g} to {reader.intensity_range[1]:g}"
    size = given["pixel_size"] or hints.pixel_size or assay.pixel_size
    pixel = "unknown" if assay.pixel_size is None else f"{size:g} um"
    if reader.scale != 1:
        pixel += f" resampled to {assay.pixel_size:g} um"
    scale = "given" if given["pixel_size"] else "named by the folder" if hints.pixel_size else "the assay's"
    return (
        f"{len(found)} images; assay {assay.name} ({origin}; --assay), channels {roles} ({by}; --channels), "
        f"intensity {counts} (--intensity-range LO,HI), pixel {pixel} ({scale}; --pixel-size UM); "
        f"{assay.segmenter_name} segmenter on {device}, {assay.precision}, batches of {batch} "
        f"({'given' if given['batch_size'] else f'{free_bytes(device) / 2**30:.1f} GiB free'}; --batch-size)"
    )


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while the block runs, where stderr is a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, _: bar.update(task, completed=done)


def result_table(summary: dict[str, Any], suite: Suite) -> None:
    """The summary as a table on stdout, and which class is furthest from real images in what."""
    table = Table(box=None, pad_edge=False)
    table.add_column("reward", no_wrap=True)
    for name in ("n", "mean", "95 % CI", "real", "worst value", "missing", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("lowest class", no_wrap=True)
    for name, one in summary["rewards"].items():
        interval = f"{_number(one['ci_low'])} to {_number(one['ci_high'])}" if one["ci_low"] is not None else "-"
        share = "-" if one["worst_share"] is None else f"{100 * one['worst_share']:.1f} %"
        spread = "-" if one["spread_ratio"] is None else f"{one['spread_ratio']:.2f}"
        worst = one["worst_class"]
        lowest = f"{worst} ({_number(one['classes'][worst]['mean'])})" if worst and len(one["classes"]) > 1 else "-"
        values = [str(one["n"]), _number(one["mean"]), interval, _number(one["real_mean"]), share]
        table.add_row(name, *values, str(one["missing"]), spread, lowest.replace("[", "\\["))
    # As wide as it needs to be: a narrow terminal wraps lines itself, and nothing is cut off.
    Console(highlight=False, width=Console(width=1000).measure(table).maximum).print(table)
    if missing := _missing(summary):
        click.echo(f"Missing: {missing}. A total is missing where any of its parts is.")
    if far := summary["furthest"]:
        click.echo(
            f"Furthest from real images: {far['class']} in {far['reward']}, mean {_number(far['mean'])} where real "
            f"ones score {_number(far['real_mean'])}."
        )
    click.echo(
        f"real: what held-out real images score. spread: standard deviation of the measure / that of real images, "
        f"within classes; well below 1 means too alike. Suite {summary['fingerprint']}: compare only tables with it."
    )


def _missing(summary: dict[str, Any]) -> str:
    """How many values are missing for which reason, and in which rewards: "288 no reference for the class (moa)"."""
    counts: dict[tuple[str, int], list[str]] = {}
    for name, one in summary["rewards"].items():
        for reason, words in MISSING.items():
            if number := one["reasons"].get(reason.name):
                counts.setdefault((words, number), []).append(name)
    return ", ".join(f"{number} {words} ({', '.join(names)})" for (words, number), names in counts.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
