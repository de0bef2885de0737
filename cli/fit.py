"""`biorewards fit`: an assay from real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: biorewards fit images/ --manifest index.csv --channels actin=0,tubulin=1,dna=2 --out my_assay/"
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--manifest",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Table of the images (any layout that `score` reads).",
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the new assay.")
@click.option("--name", help="Name of the assay. Default: the folder's name.")
@click.option(
    "--channels", help="Roles and channels, numbered from 0. Default: actin=0,tubulin=1,dna=2, or what the folder says."
)
@click.option(
    "--pixel-size", type=click.FloatRange(min=0, min_open=True), help="um per px. Without it areas are in px^2."
)
@click.option(
    "--intensity-range",
    help="Stored values that mean 0 and 1, e.g. 0,4095 (12-bit camera). Default: full range of the file's type.",
)
@click.option("--control", default="DMSO", show_default=True, help="The class that is the control.")
@click.option("--segmenter", default="compact", show_default=True, help="Segmenter of the assay.")
@click.option(
    "--images-seen",
    type=click.IntRange(min=0),
    default=150_000,
    show_default=True,
    help="Crops shown to the classifier in training; 0: no classifier.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    path: Path, manifest: Path | None, out: Path, name: str | None, channels: str | None, pixel_size: float | None,
    intensity_range: str | None, control: str, segmenter: str, images_seen: int, seed: int,
) -> None:  # fmt: skip
    """Fit an assay to the labelled real images of PATH.

    Measures every image with the segmenter, keeps mean and spread per class, trains the MoA classifier on whole plates
    and prints what it achieves on plates and compounds that it has not seen, beside a classifier that sees only counts
    and sizes. A column SPLIT (train, val, test) is used as it is; otherwise whole plates are drawn.
    """
    if (out / "assay.json").exists():
        raise click.UsageError(f"{out} already holds an assay; choose another --out or remove it")
    from biorewards.classifier import Recipe
    from biorewards.fitting import fit_assay
    from biorewards.labelled import read_labelled
    from cli.options import parse_channels, parse_range

    data = read_labelled(path, manifest, parse_channels(channels), parse_range(intensity_range), control)
    for note in data.notes:
        click.echo(f"note: {note}", err=True)
    assay = fit_assay(
        data.images, data.rows, name=name or out.name, channels=data.channels, pixel_size=pixel_size or data.pixel_size,
        control=control, segmenter=segmenter, seed=seed,
        recipe=Recipe(images_seen=images_seen, seed=seed) if images_seen else None, progress=show_progress(),
    )  # fmt: skip
    assay.save(out)
    click.echo(describe(assay.card))
    click.echo(f"assay written to {out}; score with: biorewards score IMAGES --assay {out}")


def show_progress() -> Callable[[str, int, int], None]:
    """A callback that keeps one line on stderr up to date."""
    last = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if last and last != what:
            click.echo("", err=True)
        last = what
        click.echo(f"\r{what}: {done}/{total}   ", err=True, nl=done == total)

    return tell


TITLES = {
    "random": "random split, without the held-out compounds",
    "plate": "held-out plates, known compounds",
    "compound": "held-out compounds, known plates",
    "compound_and_plate": "held-out compounds on held-out plates",
    "shipped_on_held_out_plates": "the assay's classifier on held-out plates",
    "counts_and_sizes_only": "counts and sizes only, held-out plates",
}


def describe(card: dict[str, Any]) -> str:
    """The card as text: images per class, what the classifier achieves on which split, what real images score."""
    splits = card["images_per_class"]
    lines = ["images per class (train / val / test):"]
    lines += [
        f"  {name:32s} {n:6d} {splits['val'][name]:6d} {splits['test'][name]:6d}" for name, n in splits["train"].items()
    ]
    if figures := card.get("classifier"):
        lines.append("MoA classifier (balanced accuracy, 95 % interval over images):")
        for key in [k for k in TITLES if k in figures]:
            f = figures[key]
            low, high = f["interval_95"]
            score = f"{f['balanced_accuracy']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"  {TITLES[key]:46s} {score}  accuracy {f['accuracy']:.3f}  n {f['n']}")
        error = figures["shipped_on_held_out_plates"]["ece"]
        lines.append(f"  expected calibration error {error:.3f}, temperature {figures['temperature']}")
        c = figures["control_as_treated"]
        lines.append(f"  control crops, mean probability of a treated class: {c['mean']:.3f} over classes,")
        lines.append(f"  {c['largest_class']:.3f} for the likeliest; base rate {c['base_rate']:.3f}")
    means = {k: round(v["mean"], 3) for k, v in card["real_scores"].items()}
    return "\n".join([*lines, f"real held-out images score: {json.dumps(means)}"])
