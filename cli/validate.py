"""`biorewards validate`: judge the judges. Real images in; checks, a page and a card for every reward out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.audit import command_line
from cli.options import parse_range
from cli.rl import load_object
from cli.score import parse_pairs

if TYPE_CHECKING:
    from biorewards.validate.run import Validation

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command(epilog="Example: biorewards validate --assay phantom --real cells/ --out validated/")
@click.option("--assay", "assay_name", required=True, help="phantom, bbbc021, or the folder of an assay (`fit`).")
@click.option("--real", required=True, type=_PATH, help="Labelled real images: a folder or table, as for `score`.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of page, cards and finished parts."
)
@click.option("--check", "wanted", multiple=True, metavar="NAME", help="Only this check; repeat.")
@click.option(
    "--reward", "own", multiple=True, metavar="MODULE:NAME",
    help="A reward of your own on trial, too; one that is called like one of the seven takes its place. Repeat.",
)  # fmt: skip
@click.option(
    "--positive-control", "planted", metavar="NAME",
    help="Put a verifier with a known fault on trial, which must fail: plain_roundness, zero_on_failure, leaky_split, "
    "batch_style.",
)  # fmt: skip
@click.option("--n", type=click.IntRange(min=8), default=40, show_default=True, help="Images damaged at every dose.")
@click.option("--pool", type=_COUNT, default=800, show_default=True, help="Most real images that are used at all.")
@click.option("--channels", help="File channels from 0: actin=0,tubulin=1,dna=2; or names of a table.")
@click.option(
    "--pixel-size", type=click.FloatRange(min=0, min_open=True), help="um per file pixel. Default: as --real says."
)
@click.option("--intensity-range", help="Stored values that mean 0 and 1: 0,4095 (12 bit). Default: the full range.")
@click.option("--device", help="cpu, cuda or cuda:1. Default: cuda where there is one.")
@click.option("--batch-size", type=_COUNT, help="Crops judged at once. Default: 16 on the CPU, 256 on a GPU.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print validate.json on stdout, and nothing else there.")
@click.pass_context
def command(
    ctx: click.Context, assay_name: str, real: Path, out: Path | None, wanted: tuple[str, ...], own: tuple[str, ...],
    planted: str | None, n: int, pool: int, channels: str | None, pixel_size: float | None, intensity_range: str | None,
    device: str | None, batch_size: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Audit the verifiers: does each see what it should, and only that, before its gains are believed?

    Real images are damaged in known ways and by known doses, mislabelled, blanked and collapsed; every reward must
    answer as it should. A figure is held against a threshold that is stated beside it. What cannot be judged with the
    images at hand (one plate, no classifier, one class) says so, and neither passes nor fails. Checks: oracle,
    invariance, dose_response, specificity, counting, missing_biology, variance_collapse, calibration and more.

    \b
    Written to --out:
      validate.html        table, specificity matrix, dose-response curves, every figure
      validate.json        the same numbers
      cards/<reward>.html  context of use, limits, failures first; .json beside it
      finished/            finished checks and scores; the same command goes on from them

    Exit status: 0 every figure that could be judged passes, 1 one fails, 2 wrong usage or unusable input.
    """
    roles = parse_pairs(channels, "ROLE=CHANNEL, e.g. actin=0,tubulin=1,dna=2")
    counts = parse_range(intensity_range)

    import torch

    from biorewards.assay import Assay
    from biorewards.io.manifest import read_manifest
    from biorewards.io.reading import plan_reading
    from biorewards.reward import Suite
    from biorewards.rewards import suite
    from biorewards.validate import CHECKS, Bench
    from biorewards.validate.controls import plant
    from biorewards.validate.page import write_pages
    from biorewards.validate.run import validate

    if unknown := [name for name in wanted if name not in CHECKS]:
        raise click.UsageError(f"no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    assay = Assay.load(assay_name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: there is no CUDA device here; leave it out or pass cpu")
    seven = suite(assay)
    judge = seven
    if own:
        given = {reward.name: reward for reward in map(load_object, own)}
        weights = seven.weights | {name: 1.0 for name in given if name not in seven.weights}
        judge = Suite(list((seven.rewards | given).values()), weights, assay.fingerprint)
    manifest = read_manifest(real)
    folder = None if out is None else out / "finished"
    with progress(as_json) as (tell, checked):
        reader = plan_reading(manifest, assay, channels=roles, pixel_size=pixel_size, intensity_range=counts)
        bench = Bench.build(
            assay, manifest, judge, reader=reader, n=n, pool=pool, seed=seed,
            batch_size=batch_size or (16 if device == "cpu" else 256), device=device, folder=folder, tell=tell,
        )  # fmt: skip
        about = f"assay {assay.name}, {assay.segmenter_name} segmenter on {device}; {len(bench)} real images"
        click.echo(f"{about}, {len(bench.controls)} of them untreated", err=True)
        for note in bench.notes:
            click.echo(f"note: {note}", err=True)
        if planted is not None:
            bench = plant(planted, bench)
            assay, judge = bench.assay, bench.suite
        try:
            found = validate(bench, CHECKS, wanted or None, folder=folder, progress=checked)
        except KeyboardInterrupt:
            if folder is not None:
                click.echo(f"\nstopped; what is done is kept in {folder}: the same command goes on", err=True)
            raise
    if out is not None:
        write_pages(out, found, assay, judge, {"real_images_from": str(real), "command": command_line(ctx)})
    if as_json:
        click.echo(json.dumps(found.document(), indent=1, ensure_ascii=False))
    else:
        print_table(found)
        if out is not None:
            click.echo(f"wrote {out / 'validate.html'}, validate.json and cards/")
    ctx.exit(1 if found.failed else 0)


@contextmanager
def progress(quiet: bool) -> Iterator[tuple[Callable[[int], None], Callable[[str, str], None]]]:
    """Two callbacks: images judged, and a check that starts or is done. A live line on stderr, or one line a check."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    live = sys.stderr.isatty()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[images]} images judged"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not live) as bar:
        task = bar.add_task("reading", total=None, images=0)
        images = 0

        def tell(judged: int) -> None:
            nonlocal images
            images += judged
            bar.update(task, images=images)

        def checked(name: str, said: str) -> None:
            bar.update(task, description=name)
            if said:
                click.echo(f"{name}: {said}; {images} images judged so far", err=True)

        yield tell, checked


def print_table(found: Validation) -> None:
    """Every figure that fails, then one line a check and reward."""
    from rich.console import Console
    from rich.table import Table

    from biorewards.validate.wording import figure, sentence, title, verdict

    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("reward", no_wrap=True)
    table.add_column("passed", justify="right", no_wrap=True)
    table.add_column("figure (95 % interval)", no_wrap=True)
    table.add_column("threshold", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check, own in found.findings.items():
        for name in [*found.rewards, None]:
            here = [one for one in own if one.reward == name]
            judged = [one for one in here if one.passed is not None]
            if not here:
                continue
            # The first failure stands for the rest; the page has all of them.
            first = next((one for one in judged if not one.passed), (judged or here)[0])
            table.add_row(title(check), name or "(suite)", f"{sum(bool(one.passed) for one in judged)}/{len(judged)}",
                          figure(first), first.threshold, verdict(first).replace("fail", "FAIL"))  # fmt: skip
    Console().print(table)
    for one in found.failed:
        click.echo(
            f"FAIL {title(one.check)}, {one.reward or 'suite'}: {one.what} {figure(one)}, wanted {one.threshold}"
        )
    passed = sum(one.passed is True for one in found.all)
    click.echo(sentence(len(found.failed), passed, sum(one.passed is None for one in found.all)))
