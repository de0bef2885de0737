"""Pixels of one PNG, TIFF or NPY file, as stored, with the axes that the file states.

Files are foreign input. Sizes are taken from the header and held to a budget before anything is allocated, nothing
is unpickled, no second file is opened, and data that the file lacks is an error instead of a plane of zeros.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

npy: Any = np.lib.format  # its functions carry no types

#: Most samples (pixels x channels) that a file may declare: 2^27, which is five channels of 5,100 x 5,100 pixels.
MAX_SAMPLES = 1 << 27

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples a pixel
_ALPHA_MODES = ("LA", "RGBA")

# tifffile reports what it repairs through logging. Nothing is repaired silently here: what matters becomes an error.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class FormatError(ValueError):
    """The file is not what its name says, is damaged, or holds something that is no image of this kind."""


class Raw(NamedTuple):
    """Pixels as stored.

    pixels: 2-D or 3-D, the file's own dtype.
    axes: "YX", "YXC", "CYX", or "" for a 3-D array whose file does not say which axis is the channel.
    """

    pixels: npt.NDArray[Any]
    axes: str


def within_budget(shape: tuple[int, ...]) -> None:
    """Raise FormatError for an empty shape or one above `MAX_SAMPLES`."""
    if any(side < 1 for side in shape):
        raise FormatError(f"holds no pixels (shape {shape})")
    if (samples := math.prod(shape)) > MAX_SAMPLES:
        raise FormatError(f"declares {samples:,} samples (shape {shape}); at most {MAX_SAMPLES:,} are read")


def read_png(path: Path) -> Raw:
    """8- or 16-bit grey, RGB, palette PNG; an alpha channel is dropped when it is fully opaque, else FormatError."""
    with path.open("rb") as stream:
        head = stream.read(33)
        if head[:8] != _PNG_SIGNATURE:
            raise FormatError(f"is not a PNG file (it starts with {head[:8]!r})")
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise FormatError("is a truncated PNG file (no complete header)")
        width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
        if colour not in _PNG_SAMPLES:
            raise FormatError(f"is a damaged PNG file (colour type {colour})")
        within_budget((height, width, _PNG_SAMPLES[colour]))
        stream.seek(0)
        if depth == 16 and colour != 0:
            # Pillow keeps 8 of 16 bits in every mode but grey.
            pixels = np.asarray(imagecodecs.png_decode(stream.read()))
            alpha = colour in (4, 6)
        else:
            pixels, alpha = _pillow_png(stream)
    if alpha:
        pixels = _drop_alpha(pixels)
    return Raw(pixels, "YX" if pixels.ndim == 2 else "YXC")


def _pillow_png(stream: BinaryIO) -> tuple[npt.NDArray[Any], bool]:
    with Image.open(stream, formats=["PNG"]) as opened:
        if getattr(opened, "n_frames", 1) > 1:  # only set for files that can hold frames
            raise FormatError("is an animated PNG; save one frame a file")
        opened.load()
        image: Image.Image = opened
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        elif image.mode == "1":
            image = image.convert("L")
        return np.asarray(image), image.mode in _ALPHA_MODES


def _drop_alpha(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    alpha, colour = pixels[..., -1], pixels[..., :-1]
    opaque = np.iinfo(pixels.dtype).max
    if (alpha != opaque).any():
        raise FormatError(
            f"has an alpha channel that is not fully opaque (smallest value {alpha.min()} of {opaque}); save the "
            "image without alpha, or as TIFF or NPY when the fourth channel is data"
        )
    return colour[..., 0] if colour.shape[-1] == 1 else colour


def read_npy(path: Path) -> Raw:
    """One 2-D or 3-D array of numbers. The header is read first; objects and records are refused."""
    with path.open("rb") as stream:
        try:
            version = npy.read_magic(stream)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read_header(stream)
        except KeyError:
            raise FormatError(f"is NPY version {version}; versions 1.0 and 2.0 are read") from None
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise FormatError(f"is not an NPY file that can be read ({error})") from error
        if dtype.hasobject:
            raise FormatError("is an NPY file of Python objects; only plain numbers are read")
        if dtype.kind not in "biuf":
            raise FormatError(f"holds {dtype} values; save integers or floats")
        if len(shape) not in (2, 3):
            raise FormatError(f"has shape {shape}; an image has 2 or 3 axes")
        within_budget(shape)
        wanted, there = math.prod(shape) * dtype.itemsize, os.fstat(stream.fileno()).st_size - stream.tell()
        if there < wanted:
            raise FormatError(f"is truncated: shape {shape} of {dtype} needs {wanted:,} bytes, the file has {there:,}")
        flat = np.frombuffer(stream.read(wanted), dtype=dtype)
    pixels = flat.reshape(shape, order="F" if fortran else "C")
    return Raw(pixels, "YX" if pixels.ndim == 2 else "")


#: TIFF compressions that are read: lossless ones with small decoders, and JPEG. One damaged byte can name any of the
#: other thirty, and some of their C decoders end the process on data that is not theirs.
COMPRESSIONS = ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD", "ZSTD_DEPRECATED", "JPEG")


def read_tiff(path: Path) -> Raw:
    """One image of a TIFF, OME-TIFF or ImageJ file; channels may be samples (RGB) or pages.

    Files of an OME set beside this one are not opened. Missing pages, strips and tiles are a FormatError: tifffile
    would fill them with zeros (cgohlke/tifffile 187, 227).
    """
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        if len(tiff.series) != 1:
            shapes = [one.shape for one in tiff.series]
            raise FormatError(f"holds {len(shapes)} images (shapes {shapes}); save one image a file")
        series = tiff.series[0]
        within_budget(series.shape)
        _nothing_missing(series, path.stat().st_size)
        page = series.keyframe
        if page.photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
            kind = getattr(page.photometric, "name", page.photometric)
            raise FormatError(f"is stored as {kind}; save grey planes or RGB")
        compression = getattr(page.compression, "name", str(page.compression))
        if compression not in COMPRESSIONS:
            raise FormatError(f"is compressed as {compression}; save it without, or with one of {COMPRESSIONS[1:]}")
        axes = "".join(axis for axis, side in zip(series.axes, series.shape, strict=True) if side > 1 or axis in "YX")
        pixels = series.asarray().reshape([s for a, s in zip(series.axes, series.shape, strict=True) if a in axes])
        has_alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
    match axes:
        case "YX":
            return Raw(pixels, "YX")
        case "YXS":
            pixels = _drop_alpha(pixels) if has_alpha else pixels
            return Raw(pixels, "YX" if pixels.ndim == 2 else "YXC")
        case "CYX" | "IYX" | "SYX":
            return Raw(pixels, "CYX")
        case "YXC":
            return Raw(pixels, "YXC")
        case "QYX":  # tifffile wrote a 3-D array without naming its axes
            return Raw(pixels, "")
        case _:
            raise FormatError(
                f"has axes {axes} with sizes {pixels.shape}; one image with Y, X and channels is wanted "
                "(pick or project planes and time points first)"
            )


def _nothing_missing(series: tifffile.TiffPageSeries, file_size: int) -> None:
    pages = list(series.pages)
    expected = math.prod(series.shape) // max(1, math.prod(series.keyframe.shape))
    if series.dataoffset is not None and len(pages) < expected:
        # One page describes a run of planes that lie behind each other in the file.
        if series.dataoffset + math.prod(series.shape) * series.dtype.itemsize > file_size:
            raise FormatError(f"is truncated: {expected} planes of shape {series.keyframe.shape} do not fit the file")
        return
    if (there := sum(page is not None for page in pages)) < expected:
        raise FormatError(f"lacks pages: its metadata speaks of {expected} planes, the file holds {there}")
    for number, page in enumerate(pages):
        assert page is not None  # counted above
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        if len(segments) < math.prod(page.chunked) or any(offset < 1 or size < 1 for offset, size in segments):
            raise FormatError(f"lacks pixel data in page {number}")
        if any(offset + size > file_size for offset, size in segments):
            raise FormatError(f"is truncated: the pixel data of page {number} lies beyond its end")


READERS = {".png": read_png, ".npy": read_npy, ".tif": read_tiff, ".tiff": read_tiff}


def read_raw(path: Path) -> Raw:
    """Decode one file by its suffix. Raises FormatError or OSError."""
    try:
        reader = READERS[path.suffix.lower()]
    except KeyError:
        raise FormatError(f"has the suffix {path.suffix!r}; {', '.join(sorted(READERS))} are read") from None
    if path.is_dir():
        raise FormatError("is a folder, not an image file")
    if path.exists() and not path.is_file():
        raise FormatError("is not a regular file")
    if path.stat().st_size == 0:
        raise FormatError("is empty (0 bytes)")
    try:
        return reader(path)
    except (FormatError, OSError):
        raise
    except Exception as error:
        # Decoders raise anything on damaged files: struct.error, IndexError, zlib.error, TiffFileError, MemoryError ...
        raise FormatError(f"is truncated or damaged ({type(error).__name__}: {error})") from error
