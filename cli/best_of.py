"""`biorewards best-of`: of N samples keep the one that the verifiers like best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cli.rl import listed

_COUNT = click.IntRange(min=1)


@click.command(
    "best-of",
    epilog="Example: biorewards phantom --out cells --n 300 --size 48 && biorewards best-of --controls cells --n 4 "
    "--out kept",
)
@click.option("--generator", "name", default="cellflux", show_default=True, help="Any generator, or module:function.")
@click.option("--checkpoint", help="Its weights: a path or hf://owner/repo/path@revision. Default: the bundled model.")
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the generator. Repeatable.")
@click.option("--controls", required=True, type=click.Path(path_type=Path), help="Folder or index of untreated images.")
@click.option("--split", help="Only controls with this SPLIT, e.g. test. Default: all.")
@click.option("--assay", "assay_name", help="phantom, bbbc021 or a folder (`fit`). Default: what --controls names.")
@click.option("--pixel-size", type=click.FloatRange(min=0, min_open=True), help="um per pixel of the controls.")
@click.option("--compounds", help="Only these, e.g. taxol,AZ138. Default: all that generator and assay both know.")
@click.option("--n", default=4, show_default=True, type=_COUNT, help="Samples that one is kept of.")
@click.option("--images", default=8, show_default=True, type=_COUNT, help="Images kept of each compound.")
@click.option(
    "--method",
    type=click.Choice(["random", "search"]),
    default="random",
    show_default=True,
    help="search: round the best source so far, at the same cost; for flows.",
)
@click.option("--curve", is_flag=True, help="Also every reward for N = 1, 2, 4, ... from this pool (curve.csv).")
@click.option("--steps", type=_COUNT, help="Of the solver. Default: the checkpoint's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--batch-size", default=32, show_default=True, type=_COUNT, help="Images drawn at once.")
@click.option("--device", help="cpu, cuda or cuda:1. Default: cuda where there is one.")
def command(**given: Any) -> None:
    """Draw N samples of every control and compound and keep the one with the highest total.

    Works with every stochastic generator. The verifier that selects is the one that scores, so the score of what is
    kept is too good: judge it by something else, too (biorewards audit --second-opinion).

    \b
    Written to --out:
      <compound>/<k>.png     the kept images (8 bit)
      manifest.csv           compound, control, which of the N it is, its rewards; `score` and `audit` read it
      pool.parquet           rewards of all samples
      curve.csv              with --curve: each reward at N = 1, 2, 4, ..., its interval, and the cost in network passes
      biorewards.json
    """
    from cli.options import parse_settings

    options = parse_settings(given["options"])
    if given["checkpoint"] is None and given["name"] != "cellflux":
        raise click.UsageError(f"--generator {given['name']} needs its --checkpoint")
    if given["curve"] and given["method"] == "search":
        raise click.UsageError("--curve takes independent samples: --method random")
    out: Path = given["out"]
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; choose another --out")

    import numpy as np
    import pandas as pd
    import torch

    import generators
    from biorewards.assay import Assay
    from biorewards.io.manifest import HINTS_FILE, read_manifest
    from biorewards.io.reading import plan_reading
    from biorewards.io.tables import write_table, write_text
    from biorewards.rewards import suite
    from cli.score_output import progress_bar
    from generators.base import to_uint8
    from generators.generation import check_scale, make_plan
    from generators.pairs import read_rows
    from generators.pictures import write_picture
    from rl.best_of_n import Prompts, best_of_n, curve
    from rl.pool import read_real, usable_compounds
    from rl.rewards import Judge, fitted

    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: there is no CUDA device here; leave it out or pass cpu")
    found = read_manifest(given["controls"])
    assay_name = given["assay_name"] or found.hints.assay
    if assay_name is None:
        raise click.UsageError(f"{given['controls']} names no assay; say which with --assay")
    assay = Assay.load(assay_name)
    generator = generators.load(given["name"], given["checkpoint"] or generators.MINI_CELLFLUX, **options).to(device)
    if generator.capabilities.channels != 3:
        raise click.UsageError(f"{generator.name} draws {generator.capabilities.channels} channels; PNG holds three")
    check_scale(generator, found)
    compounds, targets, notes = usable_compounds(assay, generator.compounds, listed(given["compounds"]))
    reader = plan_reading(found, assay, pixel_size=given["pixel_size"])
    if reader.scale != 1:
        click.echo("measuring the assay's statistics at the pixel size of these images", err=True)
        assay, more = fitted(assay, read_real(found, reader, assay, given["seed"])[0], reader.scale)
        notes += more
    assay = assay.to(device)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    plan = make_plan(generator, found, compounds, given["images"], given["seed"], given["split"])
    class_of = dict(zip(compounds, targets.tolist(), strict=True))
    table = plan.table.drop(columns="seed")
    names = list(table["compound"])
    table["moa"] = [assay.classes[class_of[name]] for name in names]
    control = read_rows(found, plan.rows, generator.capabilities.channels)
    prompts = Prompts(control, names, torch.tensor([class_of[name] for name in names]))
    judge = Judge(suite(assay), assay, scale=reader.scale)
    click.echo(
        f"{len(names)} images of {len(compounds)} compounds, each the best of {given['n']} ({given['method']}); "
        f"{generator.name} on {device}, assay {assay.name}, fingerprint {judge.fingerprint}"
    )
    with progress_bar(len(names) * given["n"]) as tell:
        kept = best_of_n(
            generator, judge, prompts, given["n"], method=given["method"], seed=given["seed"], steps=given["steps"],
            batch_size=given["batch_size"], device=device, progress=tell,
        )  # fmt: skip
    rows = torch.arange(len(names))
    place = kept.place.clamp(min=0)
    for k, reward in enumerate(judge.names):
        table[f"reward_{reward}"] = kept.value[rows, place, k].numpy()
    table = table.assign(reward_total=kept.total[rows, place].numpy(), sample=kept.place.numpy(), of=given["n"])
    table["file"] += ".png"
    for file, image in zip(table["file"], to_uint8(kept.image, generator.capabilities.floors), strict=True):
        write_picture(out / file, image.permute(1, 2, 0).numpy())
    pool = pd.DataFrame(kept.value.flatten(0, 1).numpy(), columns=[f"Reward_{name}" for name in judge.names])
    pool.insert(0, "Metadata_File", np.repeat(table["file"].to_numpy(), given["n"]))
    pool.insert(1, "Metadata_Sample", np.tile(np.arange(given["n"]), len(names)))
    info = {"suite": judge.fingerprint, "assay": assay.name, "seed": given["seed"], "generator": generator.describe()}
    write_table(out / "pool.parquet", pool.assign(Reward_total=kept.total.flatten().numpy()), info)
    hints = {"assay": found.hints.assay, "channels": found.hints.channels, "pixel_size_um": found.hints.pixel_size}
    write_text(out / HINTS_FILE, json.dumps({k: v for k, v in hints.items() if v is not None}, indent=1) + "\n")
    if given["curve"]:
        found_curve = curve(kept, judge.names, unit=pd.factorize(table["control"])[0].tolist(), seed=given["seed"])
        write_table(out / "curve.csv", found_curve)
        print_curve(found_curve, judge.names)
    write_table(out / "manifest.csv", table)
    mean = float(kept.total.double().nanmean())
    click.echo(
        f"total: {mean:.2f} for one sample, {table['reward_total'].mean():.2f} for the best of {given['n']}, "
        f"which costs {kept.passes:.0f} network passes an image"
    )
    if unscored := int((kept.place < 0).sum()):
        click.echo(f"note: {unscored} images could not be scored; the first sample was kept", err=True)
    click.echo(f"wrote {out / 'manifest.csv'} and the images. Next: biorewards score {out}")


def print_curve(table: Any, names: list[str]) -> None:
    """Rewards by N on stdout."""
    from rich.console import Console
    from rich.table import Table

    from rl.monitor import SHORT

    shown = Table(box=None, pad_edge=False)
    for column in ("N", "passes", *(SHORT.get(name, name) for name in names), "total", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        values = [f"{row[name]:.2f}" for name in (*names, "total")]
        shown.add_row(
            f"{row['n']}", f"{row['passes']:.0f}", *values, f"{row['total_low']:.2f} to {row['total_high']:.2f}"
        )
    Console().print(shown)
