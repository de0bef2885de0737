"""How the files of a manifest become the images that an assay wants: channels by role, intensity, pixel size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from biorewards.io.images import Decoded, ImageError, decode
from biorewards.io.manifest import Manifest

if TYPE_CHECKING:
    from biorewards.assay import Assay

#: Smaller images cannot hold a nucleus at any magnification, and vanish in a network that halves them four times.
MIN_SIDE = 16
#: A pixel size this close to the assay's is the same: 2 % in length is 4 % in area, below the spread of real areas.
SAME_PIXEL = 0.02
#: Names of a channel in a load_data.csv that mean a role, besides the role's own (lower case, without "orig").
CHANNEL_NAMES = {
    "dna": ("dapi", "hoechst", "nucleus", "nuclei"),
    "actin": ("phalloidin", "factin"),
    "tubulin": ("btubulin",),
}


@dataclass(frozen=True)
class Reader:
    """row -> image (C, H, W) float32 in [0, 1] with the assay's channels, at the assay's pixel size.

    channels: file channel (or, with one file a channel, place in `manifest.channel_names`) of each channel of the
        image; None takes the file as it is. scale: pixels of the assay a file pixel.
    """

    manifest: Manifest
    assay_name: str
    n_channels: int
    crop_size: int | None
    channels: tuple[int, ...] | None = None
    intensity_range: tuple[float, float] | None = None
    scale: float = 1.0

    def __call__(self, row: int) -> Decoded:
        """Read one row. Raises ImageError."""
        name = str(self.manifest.table["Metadata_File"].iat[row])
        if problem := self.manifest.problems.get(row):
            raise ImageError(name, problem)
        files, channels = self.manifest.files[row], self.channels
        if self.manifest.channel_names and channels is not None:
            files, channels = tuple(files[index] for index in channels), None
        found = decode(
            files, self.n_channels, channels=channels, intensity_range=self.intensity_range, scale=self.scale
        )
        height, width = found.pixels.shape[1:]
        resampled = "" if self.scale == 1 else " (resampled to its pixel size)"
        if self.crop_size is not None and (height, width) != (self.crop_size, self.crop_size):
            raise ImageError(
                files[0],
                f"is {height} x {width} px{resampled}; assay {self.assay_name} wants {self.crop_size} x "
                f"{self.crop_size}",
            )
        if min(height, width) < MIN_SIDE:
            raise ImageError(files[0], f"is {height} x {width} px{resampled}; {MIN_SIDE} x {MIN_SIDE} is the smallest")
        return found

    def settings(self) -> dict[str, object]:
        """What moves a pixel value, for a run's record."""
        return {
            "channels": list(self.channels or ()),
            "intensity_range": list(self.intensity_range or ()),
            "scale": round(self.scale, 6),
        }


def plan_reading(
    manifest: Manifest,
    assay: Assay,
    *,
    channels: Mapping[str, int | str] | None = None,
    pixel_size: float | None = None,
    intensity_range: tuple[float, float] | None = None,
) -> Reader:
    """Settle how the rows of `manifest` are read for `assay`.

    channels: role -> file channel, counted from 0, or its name where every channel has a file of its own. Default:
        the folder's own word (`biorewards.json`), else the assay's order, or for named files the role's name.
    pixel_size: um per file pixel. Images are resampled when it differs from the assay's by more than 2 %. Default:
        the folder's own word, else the assay's.

    Raises ValueError for roles that do not fit the assay, and for a size or range that is none.
    """
    if intensity_range is not None and not intensity_range[0] < intensity_range[1]:
        raise ValueError(f"intensity range {intensity_range} is empty; give LO,HI with LO < HI")
    size = pixel_size if pixel_size is not None else manifest.hints.pixel_size
    scale = 1.0
    if size is not None:
        if not (np.isfinite(size) and size > 0):
            raise ValueError(f"pixel size {size} is no length; give um per pixel, e.g. 0.32")
        if assay.pixel_size is None:
            if pixel_size is not None:
                raise ValueError(f"assay {assay.name!r} does not know its pixel size; leave --pixel-size out")
        elif abs(size / assay.pixel_size - 1) > SAME_PIXEL:
            scale = size / assay.pixel_size
    said = None if manifest.hints.channels == assay.channels else manifest.hints.channels
    chosen = said if channels is None else channels
    picked = _by_name(manifest, assay, chosen) if manifest.channel_names else _by_index(assay, chosen)
    return Reader(manifest, assay.name, assay.n_channels, assay.crop_size, picked, intensity_range, scale)


def _by_index(assay: Assay, channels: Mapping[str, int | str] | None) -> tuple[int, ...] | None:
    if channels is None:
        return None
    _check_roles(assay, channels)
    picked = [-1] * assay.n_channels
    for role, index in channels.items():
        if not str(index).isdecimal():
            raise ValueError(f"channel {role}={index}: give the channel's number, counted from 0")
        picked[assay.channels[role]] = int(index)
    return tuple(picked)


def _by_name(manifest: Manifest, assay: Assay, channels: Mapping[str, int | str] | None) -> tuple[int, ...]:
    names = {name.casefold(): place for place, name in enumerate(manifest.channel_names)}
    short = {name.removeprefix("orig"): place for name, place in names.items()}
    listed = ", ".join(manifest.channel_names)
    if channels is not None:
        _check_roles(assay, channels)
    picked = [-1] * assay.n_channels
    for role, place in assay.channels.items():
        if channels is not None:
            given = str(channels[role]).casefold()
            found = [names[given]] if given in names else []
            if given.isdecimal() and not found and int(given) < len(names):
                found = [int(given)]
            if not found:
                raise ValueError(f"channel {role}={channels[role]}: the table's channels are {listed}")
        else:
            found = [short[name] for name in (role, *CHANNEL_NAMES.get(role, ())) if name in short][:1]
            if not found:
                raise ValueError(f"no channel of the table is called {role}; its channels are {listed}: say which with "
                                 f"--channels {','.join(f'{one}=NAME' for one in assay.channels)}")  # fmt: skip
        picked[place] = found[0]
    return tuple(picked)


def _check_roles(assay: Assay, channels: Mapping[str, int | str]) -> None:
    if len(assay.channels) < assay.n_channels:
        raise ValueError(f"assay {assay.name!r} has channels without a role; its files are read in its own order only")
    if set(channels) != set(assay.channels):
        wanted = ",".join(f"{role}={index}" for role, index in assay.channels.items())
        raise ValueError(
            f"channels {', '.join(sorted(channels))} do not fit assay {assay.name!r}; name each of its roles once, "
            f"e.g. --channels {wanted}"
        )
