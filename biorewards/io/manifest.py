"""Which images are scored, in which order, and what is known about each: a folder or a table of images."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from biorewards.io.images import SUFFIXES
from biorewards.io.layouts import (
    COLUMNS,
    PATH_COLUMN,
    TABLE_SUFFIXES,
    ManifestError,
    channel_columns,
    header_of,
    load_data_path,
    names_images,
    read_text_table,
    resolved_folder,
    roles_of,
    sample_key_path,
    under_root,
)

#: Written beside an index by our own writers: {"assay": name, "channels": {role: index}, "pixel_size_um": number}.
HINTS_FILE = "biorewards.json"
#: First columns of a manifest, always there.
LEADING = ("Metadata_File", "Metadata_Compound", "Metadata_MoA", "Metadata_Plate", "Metadata_Well")
_OUTPUTS = re.compile(r"(.+)_(nuclei\.tif|cells\.tif|overlay\.png)")
_STATES = {"1": "treated", "trt": "treated", "treated": "treated", "0": "control", "control": "control"}

__all__ = ["Manifest", "ManifestError", "read_manifest"]


class Hints(NamedTuple):
    """What the folder says about its images (`HINTS_FILE`)."""

    assay: str | None = None
    channels: dict[str, int] | None = None
    pixel_size: float | None = None


@dataclass(frozen=True)
class Manifest:
    """One row an image, in input order.

    table: text columns `Metadata_*`, "" where nothing is known; `LEADING` first.
    files: absolute paths a row: one file with all channels, or one a name in `channel_names`.
    problems: row -> why its file may not or cannot be read; found before any image is opened.
    notes: what was left out and why, one sentence each.
    """

    table: pd.DataFrame
    files: list[tuple[Path, ...]]
    root: Path
    channel_names: tuple[str, ...] = ()
    problems: dict[int, str] = field(default_factory=dict)
    hints: Hints = field(default_factory=Hints)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)


def read_manifest(path: Path | str, *, manifest: Path | None = None, images: Path | None = None) -> Manifest:
    """Rows of a folder (sub-folder = compound or MoA), a table (CSV, TSV, parquet), or one image file.

    manifest: the table, where `path` is the folder of its images.
    images: root that the table's paths are relative to and may not leave; default: `path`, or the table's folder.

    A folder with one table of images in it is read by that table. Raises ManifestError.
    """
    resolved_folder.cache_clear()
    path = Path(path).absolute()
    if not path.exists():
        raise ManifestError(f"{path}: does not exist")
    if manifest is not None:
        return _from_table(manifest.absolute(), images or path)
    if path.is_dir():
        tables = [one for one in sorted(path.iterdir()) if one.suffix.lower() in TABLE_SUFFIXES and one.name[0] != "."]
        tables = [one for one in tables if one.is_file() and names_images(header_of(one))]
        if len(tables) > 1:
            names = ", ".join(one.name for one in tables)
            raise ManifestError(f"{path}: holds {len(tables)} tables of images ({names}); name one with --manifest")
        return _from_table(tables[0], images or path) if tables else _from_folder(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _from_table(path, images or path.parent)
    if path.suffix.lower() in SUFFIXES:
        return Manifest(_text_frame([{"File": path.name}]), [(path,)], path.parent, hints=_hints(path.parent))
    raise ManifestError(
        f"{path}: is no folder, no table ({', '.join(TABLE_SUFFIXES)}) and no image ({', '.join(sorted(SUFFIXES))})"
    )


def _from_folder(root: Path) -> Manifest:
    found: list[Path] = []
    notes: list[str] = []
    skipped: Counter[str] = Counter()
    _walk(root, found, skipped, notes)
    found.sort(key=lambda one: [_natural(part) for part in one.relative_to(root).parts])
    if not found:
        raise ManifestError(f"{root}: holds no image ({', '.join(sorted(SUFFIXES))})")
    rows, problems = [], {}
    for row, file in enumerate(found):
        inside = file.relative_to(root)
        rows.append({"File": inside.as_posix(), "Compound": inside.parts[0] if len(inside.parts) > 1 else ""})
        try:
            under_root(str(inside), root)
        except ValueError as error:
            problems[row] = str(error)
    notes += [f"left out: {number} {kind}" for kind, number in sorted(skipped.items())]
    return Manifest(_text_frame(rows), [(one,) for one in found], root, (), problems, _hints(root), notes)


def _walk(folder: Path, found: list[Path], skipped: Counter[str], notes: list[str]) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ManifestError(f"{folder}: cannot be listed ({error.strerror})") from error
    stems = {Path(entry.name).stem for entry in entries}
    for entry in entries:
        path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.is_symlink():
                notes.append(f"linked folder {path} was not followed")
            elif suffix != ".partial":
                _walk(path, found, skipped, notes)
        elif (ours := _OUTPUTS.fullmatch(entry.name)) and ours[1] in stems:
            skipped["masks and overlays beside their image"] += 1
        elif suffix in SUFFIXES:
            found.append(path)
        elif suffix not in (*TABLE_SUFFIXES, ".json", ".txt", ".md", ".html"):
            skipped[f"with suffix {suffix or 'none'}"] += 1


def _from_table(table_path: Path, root: Path) -> Manifest:
    root = root.absolute()
    if not table_path.is_file():
        raise ManifestError(f"{table_path}: is no file")
    given = read_text_table(table_path)
    header = [str(name) for name in given.columns]
    if not len(given):
        raise ManifestError(f"{table_path}: has no rows")
    roles, channels = roles_of(header), channel_columns(header)
    by_channel = bool(channels) and not {"File", "Key"} & roles.keys()
    if not by_channel and not {"File", "Key"} & roles.keys():
        raise ManifestError(
            f"{table_path}: no column names the images: file (or path), SAMPLE_KEY, or FileName_<channel> is wanted; "
            f"the columns are {', '.join(header)}"
        )
    records: list[dict[str, str]] = [dict(zip(header, row, strict=True)) for row in given.to_numpy()]
    files: list[tuple[Path, ...]] = []
    problems: dict[int, str] = {}
    for row, record in enumerate(records):
        try:
            if by_channel:
                files.append(tuple(load_data_path(record, kinds, root) for kinds in channels.values()))
            elif "File" in roles:
                files.append((under_root(record[roles["File"]], root),))
            else:
                files.append((_key_file(record[roles["Key"]], root),))
        except (ValueError, OSError) as error:
            files.append(())
            problems[row] = str(error)
    frame = _text_frame(_columns(records, roles))
    if "File" not in roles:
        frame["Metadata_File"] = [
            _relative(names[0], root) if names else record.get(roles.get("Key", ""), "")
            for names, record in zip(files, records, strict=True)
        ]
    notes = []
    if not {"Compound", "MoA"} & roles.keys():
        notes.append(f"{table_path.name} has no column with compound or moa: rows are scored without a label")
    names = tuple(channels) if by_channel else ()
    return Manifest(frame, files, root, names, problems, _hints(table_path.parent, root), notes)


def _key_file(key: str, root: Path) -> Path:
    stem = sample_key_path(key)
    candidates = [under_root(stem + suffix, root) for suffix in (".npy", ".png", ".tif", ".tiff")]
    return next((one for one in candidates if one.exists()), candidates[0])


def _columns(records: list[dict[str, str]], roles: dict[str, str]) -> list[dict[str, str]]:
    """Our names for the known columns, the table's own (without Metadata_) for the rest; path columns left out."""
    ours = {name: role for role, name in roles.items() if role != "Key"}
    reserved = {"error", "assay", "suite", *(role.casefold() for role in COLUMNS)}
    names = dict(ours)
    for name in records[0]:
        plain = re.sub(r"^(Image_)?(Metadata_)?", "", name)
        if name not in ours and not PATH_COLUMN.fullmatch(name):
            names[name] = plain if plain.casefold() not in reserved else f"{plain}_given"
    return [{names[name]: value for name, value in record.items() if name in names} for record in records]


def _text_frame(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, dtype=object).add_prefix("Metadata_")
    for name in LEADING:
        if name not in frame:
            frame[name] = ""
    if "Metadata_State" in frame:
        frame["Metadata_State"] = [_STATES.get(value.strip().casefold(), value) for value in frame["Metadata_State"]]
    frame = frame[[*LEADING, *(name for name in frame if name not in LEADING)]]
    # A file name with bytes that are no UTF-8 cannot be written to a table: show the bytes.
    return frame.map(lambda text: text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _natural(name: str) -> tuple[list[str | int], str]:
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [int(piece) if number % 2 else piece for number, piece in enumerate(pieces)], name


def _hints(*folders: Path) -> Hints:
    path = next((folder / HINTS_FILE for folder in folders if (folder / HINTS_FILE).is_file()), None)
    if path is None:
        return Hints()
    try:
        given: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("it is no JSON object")
        assay, channels, size = given.get("assay"), given.get("channels"), given.get("pixel_size_um")
        if assay is not None and not re.fullmatch(r"[\w.-]+", str(assay)):
            # A data folder may choose among installed assays; it may not point at files or addresses.
            raise ValueError(f"assay {assay!r} is no plain name; pass it with --assay")
        roles = None if channels is None else {str(role): int(index) for role, index in dict(channels).items()}
        return Hints(None if assay is None else str(assay), roles, None if size is None else float(size))
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be used ({error})") from error
