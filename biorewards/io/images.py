"""Image files to float32 (C, H, W) in [0, 1].

One picture gives the same floats (within 1e-6) from PNG, TIFF, OME-TIFF or NPY, and as uint8 or uint16 (v * 257).
Every problem with a file is an `ImageError` that names it; nothing is guessed from pixel values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from biorewards.io.formats import READERS, FormatError, Raw, read_raw, within_budget

#: Suffixes that are read.
SUFFIXES = frozenset(READERS)
#: A 3-D array's axis longer than this is no channel axis when the file does not name its axes.
MAX_CHANNELS = 16
#: Floats may leave [0, 1] by this much (rounding of a division or of a resampling to float32).
FLOAT_SLACK = 1e-6

FloatImage = npt.NDArray[np.float32]


class ImageError(ValueError):
    """A file that cannot be scored: `path`, and `message` with what is wrong and how to repair it."""

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[Path, str]]:
        return ImageError, (self.path, self.message)


class Decoded(NamedTuple):
    """pixels: (C, H, W) float32 in [0, 1]; dtype: of the file; peak: its largest stored value."""

    pixels: FloatImage
    dtype: str
    peak: float


def read_image(
    path: Path | str | Sequence[Path],
    n_channels: int | None = None,
    *,
    channels: Sequence[int] | None = None,
    intensity_range: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> FloatImage:
    """Read one image, (C, H, W) float32 in [0, 1].

    path: PNG, TIFF, OME-TIFF or NPY; or one single-channel file a channel, joined in the order given.
    n_channels: channels that the file must have. It also settles whether an array that does not name its axes
        is (C, H, W) or (H, W, C); None takes any number.
    channels: which file channel becomes channel 0, 1, ... of the result; other file channels are left out.
    intensity_range: stored values that become 0 and 1; values outside are clipped. None: uint8 is divided by 255,
        uint16 by 65535, floats must lie in [0, 1].
    scale: new size / stored size; other than 1 the image is resampled (`resize`).

    Raises ImageError.
    """
    return decode(path, n_channels, channels=channels, intensity_range=intensity_range, scale=scale).pixels


def decode(
    path: Path | str | Sequence[Path],
    n_channels: int | None = None,
    *,
    channels: Sequence[int] | None = None,
    intensity_range: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> Decoded:
    """`read_image`, with what was stored in the file."""
    paths = [Path(path)] if isinstance(path, str | Path) else list(path)
    current = paths[0]
    try:
        if len(paths) == 1:
            planes = channels_first(read_raw(current), None if channels else n_channels, 1 + max(channels or [0]))
        else:
            single = []
            for current in paths:
                single.append(channels_first(read_raw(current), 1, 1))
                if single[-1].shape != single[0].shape or single[-1].dtype != single[0].dtype:
                    raise FormatError(
                        f"is {_size(single[-1])} {single[-1].dtype}, the first channel's file {paths[0].name} "
                        f"is {_size(single[0])} {single[0].dtype}"
                    )
            planes = np.concatenate(single)
            if n_channels is not None and channels is None and len(planes) != n_channels:
                raise FormatError(f"{len(planes)} files were joined, {n_channels} channels are wanted")
        if channels is not None:
            planes = planes[list(channels)]
        peak = float(planes.max())
        pixels = to_unit(planes, intensity_range)
        return Decoded(pixels if scale == 1 else resize(pixels, scale), planes.dtype.name, peak)
    except FormatError as error:
        raise ImageError(current, str(error)) from error
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ImageError(current, reason) from error


def channels_first(raw: Raw, exactly: int | None, at_least: int) -> npt.NDArray[Any]:
    """(C, H, W), any dtype. `exactly` channels are wanted, or any number that is no fewer than `at_least`."""
    pixels = raw.pixels
    match raw.axes:
        case "YX":
            planes = pixels[None]
        case "CYX":
            planes = pixels
        case "YXC":
            planes = np.moveaxis(pixels, -1, 0)
        case _:
            planes = _resolve_axes(pixels, exactly, at_least)
    if exactly is not None and len(planes) != exactly:
        raise FormatError(
            f"has {len(planes)} channel{'s' * (len(planes) > 1)}, {exactly} are wanted; where a file has more, say "
            "which to take (--channels role=index,...)"
        )
    if len(planes) < at_least:
        raise FormatError(f"has {len(planes)} channels; channel {at_least - 1} (counted from 0) was asked for")
    return planes


def _resolve_axes(pixels: npt.NDArray[Any], exactly: int | None, at_least: int) -> npt.NDArray[Any]:
    def fits(side: int) -> bool:
        return side == exactly if exactly is not None else at_least <= side <= MAX_CHANNELS

    first, last = fits(pixels.shape[0]), fits(pixels.shape[2])
    wanted = f"{exactly}" if exactly is not None else f"{at_least} to {MAX_CHANNELS}"
    if first and last:
        raise FormatError(
            f"has shape {pixels.shape}: the first and the last axis could both be the channels ({wanted} wanted); "
            "save it as OME-TIFF with named axes"
        )
    if not first and not last:
        raise FormatError(f"has shape {pixels.shape}: neither the first nor the last axis has {wanted} channels")
    return pixels if first else np.moveaxis(pixels, -1, 0)


def to_unit(planes: npt.NDArray[Any], intensity_range: tuple[float, float] | None) -> FloatImage:
    """float32 in [0, 1] from stored values (C, H, W). Raises FormatError for non-finite or unscaled floats."""
    kind = planes.dtype.kind
    if kind == "f" and not (finite := np.isfinite(planes)).all():
        raise FormatError(f"has {int((~finite).sum())} pixels that are NaN or infinite")
    if intensity_range is not None:
        low, high = intensity_range
        counts: npt.NDArray[np.floating[Any]] = planes.astype(np.float64 if planes.dtype.itemsize > 2 else np.float32)
        return np.ascontiguousarray(((counts - low) / (high - low)).clip(0, 1), dtype=np.float32)
    if kind == "b":
        return np.ascontiguousarray(planes, dtype=np.float32)
    if kind == "f":
        _check_unit(float(planes.min()), float(planes.max()))
        return np.ascontiguousarray(planes.clip(0, 1), dtype=np.float32)
    if planes.dtype.name not in ("uint8", "uint16"):
        raise FormatError(f"holds {planes.dtype} values, whose full range no camera uses; pass --intensity-range LO,HI")
    return np.ascontiguousarray(planes, dtype=np.float32) / np.float32(np.iinfo(planes.dtype).max)


def _check_unit(low: float, high: float) -> None:
    if low >= -FLOAT_SLACK and high <= 1 + FLOAT_SLACK:
        return
    if low < 0 and low >= -1 - FLOAT_SLACK and high <= 1 + FLOAT_SLACK:
        hint = "this looks like [-1, 1]: save (x + 1) / 2"
    elif low >= 0:
        hint = "these look like counts: pass --intensity-range LO,HI, or save integers"
    else:
        hint = "scale them to [0, 1], or pass --intensity-range LO,HI"
    raise FormatError(f"holds floats from {low:.6g} to {high:.6g}, outside [0, 1]; {hint}")


def resize(pixels: FloatImage, scale: float) -> FloatImage:
    """Resample (C, H, W) by `scale` (new size / old size) with a triangle filter, widened when shrinking."""
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    within_budget((len(pixels), height, width))
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in pixels]
    return np.stack([np.asarray(plane, dtype=np.float32) for plane in planes]).clip(0, 1)


def _size(planes: npt.NDArray[Any]) -> str:
    return f"{planes.shape[-2]} x {planes.shape[-1]} px"
