"""`biorewards audit`: folders of several models in, one table and one page that says which to trust."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import parse_range
from cli.score import parse_pairs

if TYPE_CHECKING:
    from biorewards.audit.models import Audit
    from biorewards.audit.opinion import Opinion

#: Metrics on the terminal; the page has all.
SHOWN = ("moa", "frechet", "kernel", "coverage")
_FOLDER = click.Path(path_type=Path)
_SIZE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def parse_models(given: tuple[str, ...]) -> dict[str, Path]:
    """("a=x/", "b=y/") -> {"a": Path("x"), ...}. Raises click.BadParameter with the repair."""
    models: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (equals and path and re.fullmatch(r"[\w.+-]+", name)) or name.startswith("."):
            raise click.BadParameter(f"{text!r}: write NAME=DIR, the name of letters, digits and . + - _")
        if name in models:
            raise click.BadParameter(f"two models are called {name!r}; give one of them another name")
        models[name] = Path(path)
    return models


@click.command(
    epilog="Example: biorewards audit --assay phantom --real cells/ --model cellflux=a/ --model impa=b/ --out audit/"
)
@click.option("--assay", "assay_name", required=True, help="phantom, bbbc021, or the folder of an assay (`fit`).")
@click.option("--real", required=True, type=_FOLDER, help="Labelled real images: a folder or table, as for `score`.")
@click.option("--model", "given", multiple=True, required=True, metavar="NAME=DIR", help="Images of a model; repeat.")
@click.option("--control", type=_FOLDER, help="Untreated real images. Default: those of --real (STATE, or DMSO).")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the results.")
@click.option("--second-opinion", is_flag=True, help="Also ask independent judges; see below.")
@click.option("--channels", help="File channels from 0, of all folders: actin=0,tubulin=1,dna=2; or names of a table.")
@click.option("--pixel-size", type=_SIZE, help="um per file pixel, of all folders. Default: as each folder says.")
@click.option("--intensity-range", help="Stored values that mean 0 and 1: 0,4095 (12 bit). Default: the full range.")
@click.option("--device", help="cpu, cuda or cuda:1. Default: cuda where there is one.")
@click.option("--batch-size", type=_COUNT, help="Crops judged at once. Default: 16 on the CPU, 256 on a GPU.")
@click.option("--workers", type=_COUNT, help="Threads that read files. Default: 4, or the number of cores if fewer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of splits, draws and bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print audit.json on stdout, and nothing else there.")
@click.pass_context
def command(
    ctx: click.Context, assay_name: str, real: Path, given: tuple[str, ...], control: Path | None, out: Path,
    second_opinion: bool, channels: str | None, pixel_size: float | None, intensity_range: str | None,
    device: str | None, batch_size: int | None, workers: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Say which of several models to trust, beside held-out real images and copies of controls.

    Images of a model carry the labels that they were asked for: sub-folder, or a table with compound or MoA. Real
    images are parted into a reference (SPLIT train, else half) and a held-out part, the row "real". The row
    "copy-control" is what a model scores that returns a control image for everything.

    \b
    Written to --out:
      audit.html       ranking, tables, figures, failures of every model in every reward
      audit.json       the same numbers, with intervals and flags
      audit.parquet    one line a row, metric, class and compound
      scores/          the score table of every row
      finished/        scored parts; the same command goes on from them, or uses them again

    Images are scored once; ranks are given only as far as 95 % intervals settle them. A model whose images are copies
    of real ones, or of a few of its own, is not ranked.

    --second-opinion asks three independent judges about a part of the images, and says where the order changes: the
    classical segmenter, a MoA classifier of another architecture that is trained on other plates of --real, and, with
    pip install 'biorewards[profiles]', CellProfiler's features with retrieval among real images. Some minutes.
    """
    models = parse_models(given)
    roles = parse_pairs(channels, "ROLE=CHANNEL, e.g. actin=0,tubulin=1,dna=2")
    counts = parse_range(intensity_range)

    import torch

    from biorewards.assay import Assay
    from biorewards.audit.page import write_page
    from biorewards.audit.results import document, table
    from biorewards.audit.run import audit_folders
    from biorewards.io.manifest import read_manifest
    from biorewards.io.reading import plan_reading
    from biorewards.io.tables import write_tables, write_text
    from biorewards.rewards import suite

    assay = Assay.load(assay_name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: there is no CUDA device here; leave it out or pass cpu")
    found = {name: read_manifest(path) for name, path in models.items()}
    judge, reals = suite(assay), read_manifest(real)
    sizes = ", ".join(f"{name} {len(manifest)}" for name, manifest in {"real": reals, **found}.items())
    click.echo(f"assay {assay.name}, {assay.segmenter_name} segmenter on {device}; images: {sizes}", err=as_json)
    try:
        with progress() as tell:
            audited = audit_folders(
                assay, judge, reals, found, controls=None if control is None else read_manifest(control),
                folder=out / "finished",
                plan=lambda m: plan_reading(
                    m, assay, channels=roles, pixel_size=pixel_size, intensity_range=counts
                ),
                ask_second=second_opinion, batch_size=batch_size or (16 if device == "cpu" else 256),
                workers=workers or min(4, os.cpu_count() or 1), device=device, seed=seed, progress=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"\nstopped; what is done is kept in {out / 'finished'}: the same command goes on", err=True)
        raise
    for name, notes in audited.about["notes"].items():
        for note in notes:
            click.echo(f"note: {name}: {note}", err=True)
    about = audited.about | {"command": command_line(ctx)}
    answer = document(audited.audit, about)
    if audited.opinions:
        answer["second_opinions"] = [one.document() for one in audited.opinions]
    info = {"suite": judge.fingerprint, "assay": assay.name, "seed": seed}
    scores = {out / "scores" / f"{name}.parquet": sample.scores for name, sample in audited.samples.items()}
    write_tables({out / "audit.parquet": table(audited.audit), **scores}, info)
    text = json.dumps(answer, indent=1, ensure_ascii=False)
    write_text(out / "audit.json", text + "\n")
    shown = {key: value for key, value in about.items() if key != "notes"}
    write_page(out / "audit.html", audited, assay, shown | {"real_images_from": str(real)} | {
        f"model_{name}": str(path) for name, path in models.items()
    })  # fmt: skip
    if as_json:
        click.echo(text)
    else:
        print_table(audited.audit, audited.opinions)
        click.echo(f"wrote {out / 'audit.html'}, audit.json, audit.parquet and scores/")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each sample, where stderr is a terminal; else one line when a sample is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    live = sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not live) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)
            if not live and done == total:
                click.echo(f"{what}: {total} done", err=True)

        yield tell


def print_table(audit: Audit, opinions: Sequence[Opinion]) -> None:
    """The main rows on stdout, and what must be known before they are believed."""
    from rich.console import Console
    from rich.table import Table

    from biorewards.audit.bootstrap import bounded
    from biorewards.audit.wording import fine, sentences

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("rank", "gap", "95 % CI", "total", *SHOWN):
        table.add_column(title, justify="right", no_wrap=True)
    beyond = {name: {m for flag in flags for m in flag.metrics} for name, flags in audit.flags.items()}
    for row in audit.rows.values():
        place = audit.places.get(row.name)
        rank = "" if place is None else "-" if place.best is None else f"{place.best}"
        if place is not None and place.best != place.worst:
            rank = f"{place.best}-{place.worst}"
        low, high = bounded(row.draws["gap"])
        cells = [
            fine(float(row.draws[name][0])) + "!" * (name in beyond.get(row.name, ()))
            for name in ("total", *SHOWN)
            if name in row.draws
        ]
        spread = f"{fine(low)} to {fine(high)}" if row.kind == "model" else ""
        table.add_row(row.name, rank, fine(float(row.draws["gap"][0])), spread, *cells)
    Console().print(table)
    click.echo("gap: distance of all rewards from real. ! better than real images by more than chance: a warning.")
    for _, text in sentences(audit, opinions):
        click.echo(text)


def command_line(ctx: click.Context) -> str:
    """The command with the options that were given."""
    words = ["biorewards", "audit"]
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        given = ctx.get_parameter_source(option.name or "") is not click.core.ParameterSource.DEFAULT
        if isinstance(option, click.Option) and given and value is not None:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0]] if one is True else [option.opts[0], str(one)]
    return shlex.join(words)
