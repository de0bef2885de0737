"""`biorewards pretrain`: a CellFlux of one's own from an image index."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_SHARE = click.FloatRange(0, 1)
_POSITIVE = click.FloatRange(0, min_open=True)


def names_in(given: tuple[str, ...]) -> list[str]:
    """("a,b", "c") -> ["a", "b", "c"]."""
    return [one.strip() for text in given for one in text.split(",") if one.strip()]


def numbers_in(text: str, what: str) -> tuple[int, ...]:
    """ "1,2,3" -> (1, 2, 3); "" -> (). Raises click.BadParameter with the repair."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{text!r}: write {what}, whole numbers") from None


@contextmanager
def bar(steps: int, done: int, shown: bool) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar on stderr with loss and speed, where stderr is a terminal; else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    live = shown and sys.stderr.isatty()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not live) as progress:
        task = progress.add_task("", total=steps, completed=done)

        def tell(step: int, line: dict[str, float]) -> None:
            text = f"loss {line['loss']:.4f}, {line['images_per_s']:.0f} images/s"
            progress.update(task, completed=step, description=text)
            if shown and not live:
                click.echo(f"step {step} of {steps}: {text}", err=True)

        yield tell


@click.command(
    epilog="Example: biorewards phantom --out cells --n 12000 --size 48 && biorewards pretrain cells --out run "
    "--width 32 --mult 1,2,3 --blocks 1 --attention 4 --dropout 0 --rate 1.5e-3 --steps 3600. "
    "Several GPUs: accelerate launch -m cli.main pretrain ..."
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.")
@click.option(
    "--embeddings",
    type=_PATH,
    help="CSV of compounds (name, then numbers), as CellFlux reads. Default: a learned embedding of each compound.",
)
@click.option("--match", default="batch", show_default=True, type=click.Choice(["batch", "plate"]),
              help="What a control shares with its treated image (BBBC021, rxrx1: batch; cpg0000: plate).")  # fmt: skip
@click.option("--held-out", multiple=True, metavar="NAME[,NAME...]", help="Compounds never trained on; repeatable.")
@click.option("--validation", default="val", show_default=True, help="SPLIT of the validation images; '' for none.")
@click.option("--start", help="Go on from a CellFlux checkpoint (.pth or .safetensors) in place of a fresh network.")
@click.option("--width", default=128, show_default=True, type=click.IntRange(1), help="Base width.")
@click.option("--mult", default="2,2,2", show_default=True, help="Width of each level over the base width.")
@click.option("--blocks", default=4, show_default=True, type=click.IntRange(1), help="Residual blocks a level.")
@click.option("--attention", default="2", show_default=True, help="Downsampling factors with attention; '' for none.")
@click.option("--dropout", default=0.3, show_default=True, type=_SHARE)
@click.option(
    "--source",
    default="control_plus_noise",
    show_default=True,
    type=click.Choice(["noise", "control", "control_plus_noise"]),
    help="Where the flow starts.",
)
@click.option("--noise-level", default=1.0, show_default=True, type=click.FloatRange(0), help="Of control_plus_noise.")
@click.option("--noise", default=0.5, show_default=True, type=_SHARE, help="Share of images that get that noise.")
@click.option("--drop", default=0.2, show_default=True, type=_SHARE, help="Share of images without their compound.")
@click.option("--times", default="skewed", show_default=True, type=click.Choice(["skewed", "uniform"]))
@click.option("--augment", default=0.3, show_default=True, type=_SHARE, help="Probability of each flip.")
@click.option("--steps", default=10_000, show_default=True, type=click.IntRange(1), help="Raise it to train on.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images a step, over all GPUs.")
@click.option("--rate", default=1e-4, show_default=True, type=_POSITIVE, help="Learning rate of AdamW.")
@click.option("--warmup", default=0, show_default=True, type=click.IntRange(0), help="Steps that it rises.")
@click.option("--cooldown", default=0.0, show_default=True, type=_SHARE, help="Last share of the steps; it falls to 0.")
@click.option("--clip", default=0.0, show_default=True, type=click.FloatRange(0), help="Of the gradient norm; 0: none.")
@click.option("--ema", default=0.999, show_default=True, type=_SHARE, help="Decay of the averaged weights.")
@click.option("--bfloat16", is_flag=True, help="Mixed precision.")
@click.option("--validate-every", default=500, show_default=True, type=click.IntRange(1), help="Steps.")
@click.option("--save-every", default=500, show_default=True, type=click.IntRange(1), help="Steps; so much is lost.")
@click.option("--snapshots", is_flag=True, help="Keep the averaged weights of every validation.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--cpu", is_flag=True, help="Even where there is a GPU.")
def command(
    path: Path, out: Path, embeddings: Path | None, match: str, held_out: tuple[str, ...], validation: str,
    start: str | None, width: int, mult: str, blocks: int, attention: str, dropout: float, source: str,
    noise_level: float, noise: float, drop: float, times: str, augment: float, steps: int, batch: int, rate: float,
    warmup: int, cooldown: float, clip: float, ema: float, bfloat16: bool, validate_every: int, save_every: int,
    snapshots: bool, seed: int, cpu: bool,
) -> None:  # fmt: skip
    """Pre-train a CellFlux on the images of PATH, an index in the IMPA / CellFlux layout or a folder with one.

    Columns: SAMPLE_KEY (or file), CPD_NAME, STATE (1 or trt, 0 or control), BATCH or PLATE, SPLIT. Every treated image
    of SPLIT train is paired with a control of the same batch, drawn anew each time. Defaults are those of CellFlux's
    published training.

    The same command goes on with an interrupted run and ends at the same weights, on a CPU bit for bit.

    \b
    Written to --out:
      generator.safetensors  averaged weights (+ .json): --generator cellflux --checkpoint of `generate`
      state.safetensors      what a resumed run needs
      log.jsonl              loss, gradient norm, learning rate, speed; validation loss
      pictures/<step>.png    a row a compound: control, two real images, three samples
    """
    import torch

    from generators.cellflux import CellFlux, load
    from generators.embeddings import CompoundTable
    from generators.pairs import read_pairs
    from generators.pretrain import Run, accelerator_of
    from generators.steps import Settings

    settings = Settings(
        steps=steps, batch=batch, rate=rate, warmup=warmup, cooldown=cooldown, clip=clip, ema=ema, drop=drop,
        noise=noise, skewed=times == "skewed", augment=augment, seed=seed, bfloat16=bfloat16,
    )  # fmt: skip
    hidden = names_in(held_out)
    pairs = read_pairs(path, match=match, held_out=hidden)
    checked = read_pairs(path, split=validation, match=match, held_out=hidden) if validation else None
    table = None if embeddings is None else CompoundTable.read_csv(embeddings)
    if start is not None:
        generator = load(start, embeddings=table, source=source, noise_level=noise_level)
    else:
        torch.manual_seed(seed)
        generator = CellFlux.create(
            compounds=pairs.names if table is None else table.subset(pairs.names), channels=pairs.channels,
            width=width, mult=numbers_in(mult, "1,2,3"), blocks=blocks, attention=numbers_in(attention, "2,4"),
            dropout=dropout, source=source, noise_level=noise_level,
        )  # fmt: skip
    accelerator = accelerator_of(settings, cpu)
    run = Run(
        generator, pairs, checked, settings, out, accelerator, validate=validate_every, save=save_every,
        snapshots=snapshots,
    )  # fmt: skip
    main = accelerator.is_main_process
    if main:
        size = sum(p.numel() for p in generator.net.parameters())
        click.echo(
            f"{len(pairs)} treated images of {len(pairs.names)} compounds, {len(pairs.controls)} {match}(es) with "
            f"{sum(map(len, pairs.controls))} controls; {size:,} parameters on {accelerator.device}"
            + (f"; goes on after step {run.step}" if run.step else "")
        )
    with bar(steps, run.step, main) as tell:
        run.train(tell)
    if main:
        click.echo(f"wrote {out / 'generator.safetensors'}; draw with: biorewards generate --generator cellflux "
                   f"--checkpoint {out / 'generator.safetensors'} --controls {path} --out drawn")  # fmt: skip
