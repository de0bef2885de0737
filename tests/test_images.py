"""Image files to floats: one picture from every format, and an error that names the file for everything else."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pictures import WRITERS, broken, picture
from PIL import Image

from biorewards.io.images import ImageError, decode, read_image, resize


@pytest.mark.parametrize("name", WRITERS)
def test_one_picture_gives_the_same_floats_from_every_format(name: str, tmp_path: Path) -> None:
    pixels = picture()
    found = read_image(WRITERS[name](tmp_path, pixels), 3)
    assert found.dtype == np.float32 and found.shape == (3, 32, 32) and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, np.moveaxis(pixels, -1, 0) / 255, atol=1e-6)


def test_a_sixteen_bit_rgb_png_keeps_all_sixteen_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    found = decode(tmp_path / "a.png", 3)
    assert found.dtype == "uint16" and found.peak == values.max()
    np.testing.assert_array_equal(np.rint(found.pixels * 65535), np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
def test_intensity_range_maps_counts_of_any_type_and_clips(dtype: type, tmp_path: Path) -> None:
    values = np.array([[0, 100, 2100, 4100, 5000]] * 3, dtype=dtype)
    np.save(tmp_path / "a.npy", values)
    found = read_image(tmp_path / "a.npy", 1, intensity_range=(100, 4100))
    np.testing.assert_allclose(found[0, 0], [0, 0, 0.5, 1, 1], atol=1e-7)


@given(
    st.integers(1, 4),
    st.integers(17, 30),
    st.integers(17, 30),
    st.booleans(),
    st.sampled_from([".npy", ".tif"]),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_channels_come_first_whatever_the_order_in_the_file(
    channels: int, height: int, width: int, last: bool, suffix: str, data: st.DataObject
) -> None:
    values = data.draw(arrays.arrays(np.uint8, (channels, height, width)))
    stored = np.moveaxis(values, 0, -1) if last else values
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        if suffix == ".npy":
            np.save(path, stored)
        else:
            tifffile.imwrite(path, stored, photometric="minisblack")
        found = read_image(path, channels)
    np.testing.assert_array_equal(np.rint(found * 255), values)


def test_an_array_with_two_possible_channel_axes_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 20, 3), np.uint8))
    with pytest.raises(ImageError, match="first and the last axis could both be the channels"):
        read_image(tmp_path / "a.npy", 3)


def test_more_channels_than_wanted_need_a_choice(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((5, 20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", values, metadata={"axes": "CYX"}, photometric="minisblack")
    with pytest.raises(ImageError, match=r"has 5 channels, 3 are wanted.*--channels"):
        read_image(tmp_path / "a.ome.tif", 3)
    found = read_image(tmp_path / "a.ome.tif", 3, channels=[4, 0, 2])
    np.testing.assert_array_equal(found[:, 0, 0] * 255, [4, 0, 2])
    with pytest.raises(ImageError, match="has 5 channels; channel 7"):
        read_image(tmp_path / "a.ome.tif", channels=[7])


def test_one_file_a_channel(tmp_path: Path) -> None:
    files = []
    for k in range(3):
        files.append(tmp_path / f"ch{k}.tif")
        tifffile.imwrite(files[-1], np.full((20, 30), 10 * k, np.uint8))
    np.testing.assert_array_equal(read_image(files, 3)[:, 0, 0] * 255, [0, 10, 20])
    tifffile.imwrite(files[1], np.zeros((20, 31), np.uint8))
    with pytest.raises(ImageError, match=r"ch1.tif: is 20 x 31 px uint8, the first channel's file ch0.tif is 20 x 30"):
        read_image(files, 3)


def test_files_of_an_ome_set_beside_the_one_asked_for_are_not_opened(tmp_path: Path) -> None:
    """tifffile's default would follow the metadata into the second file."""
    names = {"a.ome.tif": "urn:uuid:00000000-0000-0000-0000-00000000000a"}
    names["b.ome.tif"] = names["a.ome.tif"][:-1] + "b"
    planes = "".join(
        f'<TiffData IFD="0" FirstC="{k}" PlaneCount="1"><UUID FileName="{name}">{uuid}</UUID></TiffData>'
        for k, (name, uuid) in enumerate(names.items())
    )
    for k, (name, uuid) in enumerate(names.items()):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0"><Pixels '
            'ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="30" SizeY="20" SizeC="2" SizeZ="1" SizeT="1">'
            '<Channel ID="C:0" SamplesPerPixel="1"/><Channel ID="C:1" SamplesPerPixel="1"/>'
            f"{planes}</Pixels></Image></OME>"
        )
        tifffile.imwrite(tmp_path / name, np.full((20, 30), k, np.uint8), description=xml, metadata=None)
    assert tifffile.imread(tmp_path / "a.ome.tif").shape == (2, 20, 30)
    with pytest.raises(ImageError, match="has 1 channel, 2 are wanted"):
        read_image(tmp_path / "a.ome.tif", 2)


BROKEN = broken(picture(), Path("trace"))
#: Read without error here; the size is wrong for an assay only.
SIZES = ("other_size.png", "one_pixel.png")


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in SIZES])
def test_a_broken_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write, words = broken(picture(), trace)[name]
    write(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / name, 3)
    assert caught.value.path == tmp_path / name and words in caught.value.message
    assert not trace.exists(), "something in the file was unpickled"


def test_what_is_no_readable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path / "folder.png")
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"'.jpg'; .npy, .png, .tif, .tiff are read"):
        read_image(tmp_path / "gone.jpg")
    Image.fromarray(picture()).save(tmp_path / "a.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"cannot be read .*Permission denied"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["png", "png 16 bit", "tiff lzw tiled", "ome-tiff", "npy hwc"])
@given(where=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_damaged_bytes_give_an_image_or_an_image_error(
    name: str, where: list[tuple[float, int]], tmp_path: Path
) -> None:
    path = WRITERS[name](tmp_path, picture(side=20))
    data = bytearray(path.read_bytes())
    for place, value in where:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    try:
        found = read_image(path, 3)
    except ImageError:
        return
    assert found.ndim == 3 and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("code", [34712, 50001, 34887, 99])  # JPEG 2000, WebP, LERC, none that exists
def test_only_plain_tiff_compressions_are_decoded(code: int, tmp_path: Path) -> None:
    """A damaged tag must not hand the bytes to just any decoder."""
    path = WRITERS["tiff lzw tiled"](tmp_path, picture(side=20))
    data = path.read_bytes()
    tag = struct.pack("<HHI", 259, 3, 1)
    at = data.index(tag) + len(tag)
    path.write_bytes(data[:at] + struct.pack("<H", code) + data[at + 2 :])
    with pytest.raises(ImageError, match=r"compress|cannot be decoded|unknown"):
        read_image(path)


def test_resampling_keeps_range_mean_and_position() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((2, 48, 60), dtype=np.float32)
    values[0, 10:20, 12:30] = 1
    for scale in (0.5, 2.0):
        found = resize(values, scale)
        assert found.shape == (2, 48 * scale, 60 * scale) and found.min() >= 0 and found.max() <= 1
        np.testing.assert_allclose(found.mean((1, 2)), values.mean((1, 2)), atol=0.01)
        assert (found[0, int(12 * scale) : int(18 * scale), int(14 * scale) : int(28 * scale)] > 0.999).all()
    np.testing.assert_array_equal(resize(np.full((1, 30, 30), 0.25, np.float32), 1.4), np.full((1, 42, 42), 0.25))


def test_the_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a.png"), "is empty")))
    assert str(error) == "a.png: is empty" and error.message == "is empty"
