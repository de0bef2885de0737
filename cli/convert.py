"""`biorewards convert`: a foreign checkpoint to safetensors and JSON, once."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="Example: biorewards convert checkpoint.pth --generator cellflux --set embeddings=emb_fp.csv "
    "--out cellflux.safetensors"
)
@click.argument("checkpoint")
@click.option("--generator", required=True, help="cellflux, impa, phendiff, mit, or your own as module:function.")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="NAME.safetensors; NAME.json is written beside it. CellFlux: NAME.pth writes its official layout.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the generator, kept in the new file, e.g. weights=raw, embeddings=emb_fp.csv. Repeatable.",
)
def command(checkpoint: str, generator: str, out: Path, settings: tuple[str, ...]) -> None:
    """Convert CHECKPOINT (a path, or hf://owner/repo/path@revision) so that its pickle is never read again.

    A pickle can hold code. It is read here without running any; what holds more than data is refused. The new pair of
    files holds the weights, the compound table and the settings of sampling, and is all that the other commands need.
    The result is read back and compared before this command says that it is done.
    """
    from cli.options import parse_settings

    for path in {out, out.with_suffix(".json") if out.suffix == ".safetensors" else out}:
        if path.exists():
            raise click.UsageError(f"{path} is there already; choose another --out or remove it")
    options = parse_settings(settings)

    import generators
    from generators.base import digest

    loaded = generators.load(generator, checkpoint, **options)
    loaded.save(out)
    written = generators.load(generator, out)
    if digest(loaded.net) != digest(written.net):
        raise click.ClickException(f"{out}: what was written does not read back as the same weights; do not use it")
    parameters = sum(p.numel() for p in written.net.parameters())
    compounds = "no compound table" if written.compounds is None else f"{len(written.compounds)} compounds"
    click.echo(f"{out}: {parameters:,} parameters, {compounds}, weights {digest(written.net)}")
    click.echo(f"use it with: --generator {generator} --checkpoint {out}")
