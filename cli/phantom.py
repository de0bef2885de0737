"""`biorewards phantom`: draw a synthetic data set with exact masks."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.command(
    epilog="Example: biorewards phantom --out cells --n 2000 && biorewards score cells --out scores.parquet",
)
@click.option("--out", required=True, type=_FOLDER, help="Folder to write; must be empty or new.")
@click.option("--n", default=2000, show_default=True, type=click.IntRange(1), help="Number of crops.")
@click.option(
    "--size",
    default="96",
    show_default=True,
    type=click.Choice(["96", "64", "48"]),
    help="Side of a crop in px. All sizes show the same 31 um view; 64 and 48 do so with coarser pixels.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Same seed, same bytes.")
def command(out: Path, n: int, size: str, seed: int) -> None:
    """Draw a synthetic BBBC021-like data set: single-cell crops with exact masks of nuclei and cells.

    Each crop is centred on a nucleus and shows actin, tubulin and DNA (channels 0, 1, 2; uint8, .npy). A quarter
    are untreated (DMSO); the rest show one of twelve effects, such as actin_collapse or honeycomb_nuclei. Plates
    differ in stain, focus and lamp, and train, val and test are different plates.

    \b
    Written to --out:
      index.csv           one row a crop, in the IMPA / CellFlux layout
      <BATCH>/<PLATE>/    the crops
      masks/              the true masks: .npz with nuclei and cells (int32 labels)
      biorewards.json     assay, pixel size and channels; `biorewards score` reads it
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from biorewards.phantom.dataset import PIXEL_SIZE_UM, write_dataset

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("drawing crops", total=n)
            index = write_dataset(out, n, int(size), seed, progress=lambda row: progress.advance(task))
    except OSError as error:
        raise click.UsageError(str(error)) from error

    table = Table(
        title=f"{n} crops of {size} px on {index.PLATE.nunique()} plates, {PIXEL_SIZE_UM[int(size)]} um per px"
    )
    table.add_column("class")
    for split in ("train", "val", "test"):
        table.add_column(split, justify="right")
    for name, rows in index.groupby("ANNOT", sort=False):
        table.add_row(str(name), *(str((rows["SPLIT"] == split).sum()) for split in ("train", "val", "test")))
    console = Console()
    console.print(table)
    console.print(f"Written to {out}. Next: biorewards score {out}", soft_wrap=True)
