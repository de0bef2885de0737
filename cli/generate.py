"""`biorewards generate`: controls in, images of treated cells out."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command(
    epilog="Example: biorewards phantom --out cells --n 300 --size 48 && biorewards generate --controls cells "
    "--out drawn && biorewards score drawn"
)
@click.option("--generator", "name", help="cellflux, impa, phendiff, mit, or your own as module:function.")
@click.option(
    "--checkpoint",
    help="Its weights: a path, or hf://owner/repo/path@revision. Default: the bundled mini CellFlux, which knows the "
    "compounds of the phantom and takes its crops of 48 px.",
)
@click.option(
    "--controls",
    required=True,
    type=_PATH,
    help="Untreated images: a folder or an index. Where it has a STATE, only rows with 0 or control.",
)
@click.option("--split", help="Only controls with this SPLIT, e.g. test. Default: all.")
@click.option(
    "--compounds", multiple=True, metavar="NAME[,NAME...]", help="Which to draw; repeatable. Default: all it knows."
)
@click.option("--n", default=16, show_default=True, type=click.IntRange(1), help="Images of each compound.")
@click.option("--steps", type=click.IntRange(1), help="Of the solver. Default: the checkpoint's. IMPA takes none.")
@click.option(
    "--cfg",
    type=float,
    help="Guidance weight w, in the generator's own scale; what means none differs: 0 for cellflux, 1 for mit and for "
    "phendiff's default form (cellflux w = mit w - 1 = imagen w - 1). Default: the checkpoint's.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option of the generator, e.g. embeddings=emb_fp.csv, weights=raw, bfloat16=true. Repeatable.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Same seed, same images.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Images drawn at once.")
@click.option("--device", help="cpu, cuda or cuda:1. Default: cuda where there is one.")
def command(
    name: str | None, checkpoint: str | None, controls: Path, split: str | None, compounds: tuple[str, ...], n: int,
    steps: int | None, cfg: float | None, settings: tuple[str, ...], seed: int, out: Path, batch_size: int,
    device: str | None,
) -> None:  # fmt: skip
    """Draw treated cells from the untreated ones of CONTROLS, n of each compound.

    The same command goes on with an interrupted run, and a larger --n or more compounds add to a finished one: no image
    is made twice. Image k of a compound depends on the seed and on k, not on how many there are.

    \b
    Written to --out:
      <compound>/<k>.png   the images (8 bit; .npy where there are other than 1 or 3 channels)
      manifest.csv         compound, control, seed and settings of every image; `score` and `audit` read it
      grid.png             a row a compound: a control, then samples of it
      generation.json      everything that decides an image
      biorewards.json      assay, channels and pixel size, as the controls have them
    """
    from cli.options import parse_settings

    options = parse_settings(settings)
    if cfg is not None:
        options["guidance"] = cfg
    if checkpoint is None and name is not None:
        raise click.UsageError(f"--generator {name} needs its --checkpoint")
    if checkpoint is not None and name is None:
        raise click.UsageError("--checkpoint needs the --generator that it belongs to: cellflux, impa, phendiff or mit")

    import torch

    import generators
    from biorewards.io.manifest import read_manifest
    from cli.score_output import progress_bar
    from generators.generation import check_scale, generate, make_plan

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: there is no CUDA device here; leave it out or pass cpu")
    found = read_manifest(controls)
    loaded = generators.load(name or "cellflux", checkpoint or generators.MINI_CELLFLUX, **options).to(device)
    check_scale(loaded, found)
    chosen = [one.strip() for text in compounds for one in text.split(",") if one.strip()] or None
    plan = make_plan(loaded, found, chosen, n, seed, split)
    click.echo(
        f"{len(plan.table)} images of {len(plan.compounds)} compounds from {len(set(plan.rows.tolist()))} controls; "
        f"{loaded.name} ({checkpoint or 'the bundled mini CellFlux'}) on {device}"
    )
    try:
        with progress_bar(len(plan.table)) as tell:
            generate(loaded, plan, out, seed=seed, steps=steps, batch=batch_size, device=device, progress=tell)
    except KeyboardInterrupt:
        click.echo(f"\nstopped; what is done is kept in {out}: the same command goes on", err=True)
        raise
    click.echo(f"wrote {out / 'manifest.csv'}, {out / 'grid.png'} and the images. Next: biorewards score {out}")
