"""`biorewards segment`: label images of nuclei and cells, for any image."""

from __future__ import annotations

from pathlib import Path

import click


def channel_list(text: str | None) -> list[int]:
    """ "0,1" -> [0, 1]; None -> []. Raises click.BadParameter for anything else or more than two."""
    if text is None:
        return []
    try:
        channels = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no channel list; write one or two numbers from 0, such as 0 or 0,1"
        ) from None
    if len(channels) > 2 or min(channels) < 0:
        raise click.BadParameter(f"{text!r}: one or two channels, numbered from 0")
    return channels


@click.command(
    epilog="Example: biorewards segment plate1/ --out masks/ --nucleus-channel 2 --cell-channel 0,1 --overlay"
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
@click.option("--nucleus-channel", type=click.IntRange(min=0), help="Channel of the DNA stain, numbered from 0.")
@click.option("--cell-channel", help="One or two channels that show the cell body, numbered from 0: 0 or 0,1.")
@click.option(
    "--segmenter",
    default="compact",
    show_default=True,
    help="compact, classical, a Cellpose 1-3 weight FILE (or two: nuclei,cells), cpsam_v2, cpsam, cpdino.",
)
@click.option(
    "--diameter",
    type=click.FloatRange(min=2),
    help="Diameter of a nucleus in px (of a cell without nucleus channel). Default: found in each image.",
)
@click.option(
    "--flow-threshold",
    type=click.FloatRange(min=0),
    help="Drop masks whose flow error is above this (Cellpose weights: 0.4; compact: off).",
)
@click.option("--overlay", "with_overlay", is_flag=True, help="Also write <stem>_overlay.png.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
def command(
    path: Path, out: Path, nucleus_channel: int | None, cell_channel: str | None, segmenter: str,
    diameter: float | None, flow_threshold: float | None, with_overlay: bool, device: str,
) -> None:  # fmt: skip
    """Find nuclei and cells in PATH (an image or a folder of images, any size).

    Writes <stem>_nuclei.tif and <stem>_cells.tif (int32 labels, 0 = background; they open in napari and Fiji). Give the
    channel of the nuclei, of the cells, or both. A grey image without either option is taken as a nucleus channel.
    """
    import tifffile
    from PIL import Image
    from rich.console import Console
    from rich.progress import Progress

    from biorewards.io.images import ImageError, read_image
    from biorewards.io.manifest import read_manifest
    from biorewards.segmentation import load_segmenter
    from biorewards.segmentation.images import overlay, segment_image

    cytoplasm = channel_list(cell_channel)
    engine = load_segmenter(segmenter, flow_threshold=flow_threshold).to(device)
    manifest = read_manifest(path)
    # A row whose path was refused has no file: its own text names it in the message.
    shown = [Path(manifest.root / text) for text in manifest.table["Metadata_File"]]
    files = [row[0] if row else text for row, text in zip(manifest.files, shown, strict=True)]
    names = output_names(files, manifest.root)
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with Progress(console=Console(stderr=True)) as bar:
        for row in bar.track(range(len(files)), description="segmenting"):
            try:
                if row in manifest.problems:
                    raise ImageError(files[row], manifest.problems[row])
                image = read_image(manifest.files[row])
                nucleus = nucleus_channel
                if nucleus is None and not cytoplasm:
                    if len(image) != 1:
                        many = f"has {len(image)} channels; say which with --nucleus-channel and --cell-channel"
                        raise ImageError(files[row], many)
                    nucleus = 0
                result = segment_image(
                    image, engine, nucleus=nucleus, cytoplasm=cytoplasm, diameter=diameter, device=device
                )
            except ValueError as error:
                failed += 1
                click.echo(f"\nskipped: {error}", err=True)
                continue
            target = out / names[row]
            target.parent.mkdir(parents=True, exist_ok=True)
            counted = []
            if nucleus is not None:
                tifffile.imwrite(f"{target}_nuclei.tif", result.nuclei, compression="zlib")
                counted.append(f"{result.nuclei.max()} nuclei")
            if cytoplasm:
                tifffile.imwrite(f"{target}_cells.tif", result.cells, compression="zlib")
                counted.append(f"{result.cells.max()} cells")
            if with_overlay:
                picture = overlay(image, result.nuclei, result.cells, nucleus, cytoplasm)
                Image.fromarray(picture).save(f"{target}_overlay.png")
            click.echo(f"{names[row]}: {', '.join(counted)}, diameter {result.diameter:.1f} px")
    click.echo(f"{len(files) - failed} of {len(files)} images segmented; label images are in {out}")
    if failed:
        raise SystemExit(1)


def output_names(files: list[Path], root: Path) -> list[str]:
    """A name for each file's results: its path under `root`; the suffix stays only where two would collide."""
    stems = [str(f.relative_to(root.absolute()).with_suffix("")) for f in files]
    return [s if stems.count(s) == 1 else f"{s}{f.suffix}" for s, f in zip(stems, files, strict=True)]
