"""`biorewards score`: a folder of images in, a table of scores out."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import parse_range

if TYPE_CHECKING:
    from biorewards.assay import Assay
    from biorewards.io.manifest import Manifest
    from biorewards.io.reading import Reader

DEFAULT_ASSAY = "bbbc021"
#: Files looked at before the run for counts that do not fill 16 bits, and bad rows named without --strict.
PROBED, LISTED = 24, 5
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_SIZE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def parse_pairs(text: str | None, what: str) -> dict[str, str] | None:
    """ "a=1,b=x" -> {"a": "1", "b": "x"}; None stays None. Raises click.BadParameter with the repair."""
    if text is None:
        return None
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value) or name in pairs:
            raise click.BadParameter(f"{part!r}: write {what}, each name once")
        pairs[name] = value
    return pairs


def parse_weights(text: str | None) -> dict[str, float] | None:
    """ "moa=5,nucleus_size=0.5" -> numbers by name. Raises click.BadParameter with the repair."""
    pairs = parse_pairs(text, "NAME=NUMBER, e.g. moa=5,nucleus_size=0.5")
    try:
        return None if pairs is None else {name: float(value) for name, value in pairs.items()}
    except ValueError:
        raise click.BadParameter(f"{text!r}: write NAME=NUMBER, e.g. moa=5,nucleus_size=0.5") from None


@click.command(epilog="Example: biorewards score generated/ --assay bbbc021 --out scores.parquet --report scores.html")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--assay", "assay_name", help="bbbc021, phantom, or a folder. Default: what PATH names, else bbbc021.")
@click.option("--channels", help="File channels from 0: actin=0,tubulin=1,dna=2; or names from a load_data.csv.")
@click.option("--pixel-size", type=_SIZE, help="um per file pixel; images are resampled to the assay's (the default).")
@click.option("--intensity-range", help="Stored values that mean 0 and 1: 0,4095 (12 bit). Default: the full range.")
@click.option("--manifest", type=_FILE, help="Table of the images (CSV, TSV, parquet), where PATH is their folder.")
@click.option("--images", type=_FOLDER, help="Folder that the table's paths are under. Default: the table's own.")
@click.option("--out", type=_FILE, help="Score table, .parquet or .csv. Without it no scores are written.")
@click.option("--objects", type=_FILE, help="Table with one row a nucleus or cell, .parquet or .csv.")
@click.option("--report", type=_FILE, help="Report, one HTML file.")
@click.option("--rewards", help="Only these rewards, e.g. nucleus_count,nucleus_size. Default: all seven.")
@click.option("--weights", help="Weights in the total, e.g. moa=5,nucleus_size=0.5. Default: the paper's.")
@click.option("--segmenter", help="Instead of the assay's: compact, classical, a weight FILE, cpsam_v2, ...")
@click.option("--device", help="cpu, cuda or cuda:1. Default: cuda where there is one.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the networks. bfloat16 is faster where the processor has it, and moves scores a little.",
)
@click.option(
    "--batch-size",
    type=_COUNT,
    help="Crops a batch. Default: 16 on the CPU, 256 on a GPU, fewer where memory is short.",
)
@click.option("--workers", type=_COUNT, help="Threads that read files. Default: 4, or the number of cores if fewer.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same --out.")
@click.option("--strict", is_flag=True, help="Exit status 1, with a list, when a file or a label cannot be used.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap intervals.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout, and nothing else there.")
@click.pass_context
def command(
    ctx: click.Context, path: Path, assay_name: str | None, channels: str | None, pixel_size: float | None,
    intensity_range: str | None, manifest: Path | None, images: Path | None, out: Path | None, objects: Path | None,
    report: Path | None, rewards: str | None, weights: str | None, segmenter: str | None, device: str | None,
    precision: str, batch_size: int | None, workers: int | None, resume: bool, strict: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Score the images of PATH with the seven verifiers.

    PATH is a folder (sub-folder = compound or class), a table of images (manifest, IMPA/CellFlux index, load_data.csv),
    or one image; PNG, TIFF, OME-TIFF or NPY. A bad file is a row without scores and says why; it moves no other row.
    """
    if resume and out is None:
        raise click.UsageError("--resume goes on with the run of an --out; name it")
    roles = parse_pairs(channels, "ROLE=CHANNEL, e.g. actin=0,tubulin=1,dna=2")
    counts, factors = parse_range(intensity_range), parse_weights(weights)

    import torch

    from biorewards import rewards as bundled
    from biorewards.assay import Assay
    from biorewards.io.manifest import read_manifest
    from biorewards.io.reading import plan_reading
    from biorewards.io.tables import check_suffix, write_tables
    from biorewards.memory import choose_batch_size, keep_freed_memory
    from biorewards.scoring import BATCH_PIXELS, bad_rows, score_folder, summarise
    from biorewards.scoring_journal import discard
    from biorewards.segmentation import load_segmenter
    from cli.score_output import first_line, progress_bar, result_table

    keep_freed_memory()
    written = [file for file in (out, objects, report) if file is not None]
    if len(set(written)) < len(written):
        raise click.UsageError("--out, --objects and --report need a file each")
    for table in (out, objects):
        if table is not None:
            check_suffix(table)
    found = read_manifest(path, manifest=manifest, images=images)
    assay = Assay.load(assay_name or found.hints.assay or DEFAULT_ASSAY)
    if segmenter is not None:
        assay = assay.with_segmenter(load_segmenter(segmenter))
    assay = assay.with_precision(precision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: there is no CUDA device here; leave it out or pass cpu")
    judge = bundled.suite(assay, rewards.split(",") if rewards else None, factors)
    reader = plan_reading(found, assay, channels=roles, pixel_size=pixel_size, intensity_range=counts)
    judges = torch.get_num_threads() if device == "cpu" else 1
    batch = batch_size or choose_batch_size(device, BATCH_PIXELS, judges)
    click.echo(first_line(ctx, found, assay, reader, device, batch), err=as_json)
    for note in (*found.notes, *warnings(found, assay, reader, segmenter)):
        click.echo(f"note: {note}", err=True)

    journal = None if out is None else out.with_name(f"{out.name}.partial")
    try:
        with progress_bar(len(found)) as tell:
            scored = score_folder(
                found, assay, judge, reader=reader, batch_size=batch,
                workers=workers or min(4, os.cpu_count() or 1), device=device, objects=objects is not None,
                resume_dir=journal, resume=resume, progress=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        if journal is not None:
            click.echo(f"\nstopped; what is done is kept in {journal}: add --resume to go on", err=True)
        raise
    for note in scored.notes:
        click.echo(f"note: {note}", err=True)
    summary = summarise(scored.scores, assay, judge, seed=seed)
    info = {"suite": judge.fingerprint, "assay": assay.name, "weights": judge.weights, "reading": reader.settings()}
    tables = {out: scored.scores, objects: scored.objects}
    write_tables({file: table for file, table in tables.items() if file is not None and table is not None}, info)
    if report is not None:
        from biorewards.report import write_report

        write_report(
            report, scored.scores, assay=assay, manifest=found.table, read=lambda row: reader(row).pixels, suite=judge,
            summary=summary,
            settings={"source": str(path), "command": command_line(ctx), "device": device, **reader.settings()},
        )  # fmt: skip
    if journal is not None:
        discard(journal)
    if as_json:
        click.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        result_table(summary, judge)
        for file in written:
            click.echo(f"wrote {file}")
    ctx.exit(finish(bad_rows(scored.scores), summary, strict))


def finish(bad: Any, summary: dict[str, Any], strict: bool) -> int:
    """Name the bad rows on stderr and return the exit status."""
    shown = bad if strict else bad.head(LISTED)
    if len(bad):
        click.echo(f"{len(bad)} of {summary['images']} rows are bad (--strict makes this an error):", err=True)
    for row, file, problem in zip(shown.index, shown["Metadata_File"], shown["problem"], strict=True):
        click.echo(f"  row {row + 1}  {printable(file)}: {printable(problem)}", err=True)
    if len(shown) < len(bad):
        click.echo(
            f"  ... and {len(bad) - len(shown)} more: columns Metadata_Error and Reason_*, or --strict", err=True
        )
    if summary["unreadable"] == summary["images"]:
        click.echo("error: no image could be read", err=True)
        return 2
    return 1 if strict and len(bad) else 0


def warnings(found: Manifest, assay: Assay, reader: Reader, segmenter: str | None) -> list[str]:
    """What is likely to be a mistake, before any time is spent."""
    from biorewards.io.images import ImageError

    notes = []
    if segmenter is not None:
        notes.append(
            f"the reference statistics of assay {assay.name} were measured with its own segmenter, not {segmenter}: "
            "sizes and counts are compared across segmenters"
        )
    peaks, sides = [], set()
    for row in sorted({len(found) * k // PROBED for k in range(PROBED)}):
        try:
            image = reader(row)
        except ImageError:
            continue
        sides.add(image.pixels.shape[1:])
        if image.dtype == "uint16":
            peaks.append(image.peak)
    side = assay.card.get("crop_size")
    if other := sorted(f"{h} x {w}" for h, w in sides if side and (h, w) != (side, side)):
        notes.append(
            f"images are {', '.join(other)} px, the statistics of assay {assay.name} stand on crops of {side} px: "
            "largest objects and counts are not comparable"
        )
    for limit, bits in ((255, 8), (4095, 12)):
        if peaks and reader.intensity_range is None and max(peaks) <= limit:
            notes.append(
                f"{len(peaks)} files that were looked at are uint16 and none exceeds {max(peaks):.0f}: they will look "
                f"dark. For {bits}-bit counts pass --intensity-range 0,{limit}"
            )
            break
    return notes


def command_line(ctx: click.Context) -> str:
    """The command with the options that were given."""
    words = ["biorewards", "score", str(ctx.params["path"])]
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        given = ctx.get_parameter_source(option.name or "") is not click.core.ParameterSource.DEFAULT
        if isinstance(option, click.Option) and given and value is not None:
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


def printable(text: str) -> str:
    """Text without control characters, for a terminal."""
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
