"""One picture in every format that is read, and files that are broken in every way that was thought of."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def picture(seed: int = 0, side: int = 32) -> Pixels:
    """(side, side, 3) uint8, HWC: three different smooth channels with a full range and few colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    phase = rng.random((3, 2))
    planes = [np.sin(7 * x + 6 * a) * np.cos(5 * y + 6 * b) for a, b in phase]
    coarse = np.round((np.stack(planes, -1) + 1) * 2) / 4  # five levels a channel: at most 125 colours
    return (coarse * 255).astype(np.uint8)


def _save(path: Path, pixels: npt.NDArray[np.generic], **options: object) -> Path:
    tifffile.imwrite(path, pixels, **options)  # type: ignore[arg-type]
    return path


def _numpy(path: Path, pixels: npt.NDArray[np.generic]) -> Path:
    np.save(path, pixels)
    return path


def _png(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _wide(pixels: Pixels) -> npt.NDArray[np.uint16]:
    return pixels.astype(np.uint16) * np.uint16(257)


def _first(pixels: Pixels) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


#: Format -> writer of an HWC uint8 picture; all must read as the same floats.
WRITERS: dict[str, Callable[[Path, Pixels], Path]] = {
    "png": lambda d, p: _png(d / "a.png", Image.fromarray(p)),
    "png palette": lambda d, p: _png(d / "a.png", Image.fromarray(p).quantize(256, dither=Image.Dither.NONE)),
    "png rgba": lambda d, p: _png(d / "a.png", Image.fromarray(np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]))),
    "png 16 bit": lambda d, p: _bytes(d / "a.png", imagecodecs.png_encode(_wide(p))),
    "png 16 bit rgba": lambda d, p: _bytes(
        d / "a.png", imagecodecs.png_encode(np.dstack([_wide(p), np.full(p.shape[:2], 65535, np.uint16)]))
    ),
    "tiff rgb": lambda d, p: _save(d / "a.tif", p, photometric="rgb"),
    "tiff rgb 16 bit": lambda d, p: _save(d / "a.tiff", _wide(p), photometric="rgb"),
    "tiff lzw tiled": lambda d, p: _save(d / "a.tif", p, photometric="rgb", compression="lzw", tile=(16, 16)),
    "tiff planar": lambda d, p: _save(d / "a.tif", _first(p), photometric="rgb", planarconfig="separate"),
    "tiff pages": lambda d, p: _save(d / "a.tif", _first(p), photometric="minisblack", metadata=None),
    "tiff unnamed axes": lambda d, p: _save(d / "a.tif", _first(p), photometric="minisblack"),
    "tiff big-endian": lambda d, p: _save(d / "a.tif", _wide(p), photometric="rgb", byteorder=">"),
    "tiff imagej": lambda d, p: _save(d / "a.tif", _wide(_first(p)), imagej=True, metadata={"axes": "CYX"}),
    "ome-tiff": lambda d, p: _save(
        d / "a.ome.tif", _wide(_first(p)), photometric="minisblack", metadata={"axes": "CYX"}
    ),
    "ome-tiff bigtiff": lambda d, p: _save(
        d / "a.ome.tif", _first(p), photometric="minisblack", metadata={"axes": "CYX"}, bigtiff=True
    ),
    "npy hwc": lambda d, p: _numpy(d / "a.npy", p),
    "npy chw": lambda d, p: _numpy(d / "a.npy", _first(p)),
    "npy fortran": lambda d, p: _numpy(d / "a.npy", np.asfortranarray(p)),
    "npy 16 bit": lambda d, p: _numpy(d / "a.npy", _wide(p)),
    "npy big-endian": lambda d, p: _numpy(d / "a.npy", _wide(p).astype(">u2")),
    "npy float32": lambda d, p: _numpy(d / "a.npy", (p / 255).astype(np.float32)),
    "npy float64 chw": lambda d, p: _numpy(d / "a.npy", _first(p) / 255),
}


def _header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB that declares width x height pixels."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + _chunk(b"IEND", b"")


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def _broken_tiff(path: Path, pixels: Pixels, keep: float) -> Path:
    _save(path, _first(pixels), photometric="minisblack", metadata={"axes": "CYX"})
    return _bytes(path, path.read_bytes()[: int(path.stat().st_size * keep)])


def _missing_page(path: Path, pixels: Pixels) -> Path:
    """An OME-TIFF whose metadata speaks of three channels and whose file holds two pages."""
    description = tifffile.OmeXml()
    description.addimage("uint8", (3, *pixels.shape[:2]), (3, 1, 1, *pixels.shape[:2], 1), axes="CYX")
    with tifffile.TiffWriter(path, ome=False) as writer:
        for number, plane in enumerate(_first(pixels)[:2]):
            text = description.tostring() if number == 0 else None
            writer.write(plane, photometric="minisblack", description=text, metadata=None, contiguous=False)
    return path


def _empty_tile(path: Path, pixels: Pixels) -> Path:
    """A tiled TIFF with one tile that was never written."""
    with tifffile.TiffWriter(path) as writer:
        tiles = [np.ascontiguousarray(pixels[:16, :16]), None, None, np.ascontiguousarray(pixels[16:32, 16:32])]
        writer.write(iter(tiles), shape=(32, 32, 3), dtype=np.uint8, tile=(16, 16), photometric="rgb")
    return path


def _float(pixels: Pixels, **at: float) -> npt.NDArray[np.float32]:
    values = (pixels / 255).astype(np.float32)
    values[3, 4, 1] = at["value"]
    return values


def _rgba(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)]))


def broken(pixels: Pixels, trace: Path) -> dict[str, tuple[Callable[[Path], object], str]]:
    """File name -> (writer of the broken file, words of the message). `pixels`: a good picture, 32 px a side."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    whole = png.getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    float32 = (pixels / 255).astype(np.float32)
    return {
        "truncated.png": (lambda f: f.write_bytes(whole[: len(whole) // 2]), "truncated"),
        "header_only.png": (lambda f: f.write_bytes(whole[:20]), "truncated"),
        "damaged.png": (lambda f: f.write_bytes(flipped), "cannot be read"),
        "zero.png": (lambda f: f.write_bytes(b""), "is empty (0 bytes)"),
        "zero.npy": (lambda f: f.write_bytes(b""), "is empty (0 bytes)"),
        "text.png": (lambda f: f.write_text("file,compound\n"), "is not a PNG file"),
        "text.tif": (lambda f: f.write_text("no picture at all\n"), "not a TIFF file"),
        "text.npy": (lambda f: f.write_text("no picture at all\n"), "is not an NPY file"),
        "tiff_inside.png": (lambda f: tifffile.imwrite(f, pixels), "is not a PNG file"),
        "bomb.png": (lambda f: f.write_bytes(_bomb(60_000, 60_000)), "declares 10,800,000,000 samples"),
        "half_opaque.png": (lambda f: _rgba(pixels).save(f), "alpha channel that is not fully opaque"),
        "animated.png": (lambda f: _animated(f, pixels), "animated"),
        "grey.png": (lambda f: Image.fromarray(pixels[..., 0]).save(f), "has 1 channel, 3 are wanted"),
        "other_size.png": (lambda f: Image.fromarray(pixels[:24]).save(f), "24 x 32 px"),
        "one_pixel.png": (lambda f: Image.fromarray(pixels[:1, :1]).save(f), "1 x 1 px"),
        "nan.npy": (lambda f: np.save(f, _float(pixels, value=np.nan)), "1 pixels that are NaN"),
        "inf.npy": (lambda f: np.save(f, _float(pixels, value=np.inf)), "1 pixels that are NaN or infinite"),
        "minus_one_to_one.npy": (lambda f: np.save(f, float32 * 2 - 1), "looks like [-1, 1]"),
        "counts_as_float.npy": (lambda f: np.save(f, pixels.astype(np.float32)), "holds floats from 0 to 255"),
        "five_channels.npy": (lambda f: np.save(f, np.zeros((5, 32, 32), np.uint8)), "has 3 channels"),
        "four_axes.npy": (lambda f: np.save(f, float32[None]), "an image has 2 or 3 axes"),
        "no_pixels.npy": (lambda f: np.save(f, np.zeros((0, 32, 3), np.uint8)), "holds no pixels"),
        "complex.npy": (lambda f: np.save(f, pixels.astype(np.complex64)), "complex64 values"),
        "labels.npy": (lambda f: np.save(f, pixels.astype(np.int32)), "int32 values"),
        "hostile.npy": (lambda f: np.save(f, np.array([Hostile(trace)], object), allow_pickle=True), "Python objects"),
        "pickle.npy": (lambda f: f.write_bytes(pickle.dumps(Hostile(trace))), "is not an NPY file"),
        "huge_shape.npy": (lambda f: f.write_bytes(_header((10**6, 10**6, 3)) + bytes(64)), "declares 3,000,000,000"),
        "short_data.npy": (lambda f: f.write_bytes(_header((32, 32, 3)) + bytes(64)), "is truncated"),
        "negative.npy": (lambda f: f.write_bytes(_header((-32, -32, 3)) + bytes(3072)), "no pixels"),
        "truncated.tif": (lambda f: _broken_tiff(f, pixels, 0.5), "truncated or damaged"),
        "missing_page.ome.tif": (lambda f: _missing_page(f, pixels), "lacks pages"),
        "missing_tile.tif": (lambda f: _empty_tile(f, pixels), "lacks pixel data"),
        "two_images.tif": (lambda f: _two_images(f, pixels), "holds 2 images"),
        "stack.tif": (lambda f: _save(f, np.stack([_first(pixels)] * 4), metadata={"axes": "ZCYX"}, ome=True), "ZCYX"),
    }


def _animated(path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(path, save_all=True, append_images=[Image.fromarray(255 - pixels)])


def _two_images(path: Path, pixels: Pixels) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, photometric="rgb")
        writer.write(pixels[:16, :16], photometric="rgb")
