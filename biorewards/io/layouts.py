"""What the columns of an image table are called, and where its files lie.

Three layouts are read: a plain manifest (one column with the file), an IMPA/CellFlux index (SAMPLE_KEY), and a
CellProfiler `load_data.csv` (FileName_<channel>, PathName_<channel>, URL_<channel>: one file a channel).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

#: Our name of a column -> the names it goes by, lower case without "Metadata_", "Image_", blanks, "_" and "-".
#: The first that a table has is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "File": ("file", "filename", "filepath", "path", "image", "imagefile", "imagepath"),
    "Key": ("samplekey",),
    "Compound": ("compound", "cpdname", "compoundname", "perturbation", "treatment", "broadsample"),
    "MoA": ("moa", "annot", "mechanism", "mechanismofaction", "class"),
    "Plate": ("plate", "platename", "platedapi"),
    "Well": ("well", "wellposition", "welldapi"),
    "Site": ("site",),
    "Dose": ("dose", "concentration", "concentrationum"),
    "Batch": ("batch",),
    "Split": ("split",),
    "State": ("state",),
}
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
#: Columns of a load_data.csv that name files.
PATH_COLUMN = re.compile(r"(?:Image_)?(FileName|PathName|URL)_(.+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class ManifestError(ValueError):
    """A folder, manifest or index that cannot be used as a whole; says which, why, and what would do."""


def read_text_table(path: Path) -> pd.DataFrame:
    """All columns as text, missing values as "". Unnamed columns (a written row index) are left out.

    Raises ManifestError for what is no table, names a column twice, or has a line of another length.
    """
    try:
        if path.suffix.lower() == ".parquet":
            frame = pq.read_table(path).to_pandas()
            table = frame.map(lambda value: "" if pd.isna(value) else str(value)).astype(object)
            header = [str(name) for name in table.columns]
        else:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                rows = list(_csv_rows(stream, path))
            if not rows:
                raise ManifestError(f"{path}: is empty")
            header = [name.strip() for name in rows[0]]
            table = pd.DataFrame(rows[1:], columns=pd.Index(range(len(header))), dtype=object)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (csv.Error, pa.ArrowException) as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error})") from error
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ManifestError(f"{path}: column {twice[0]!r} occurs twice")
    table.columns = pd.Index(header)
    kept: pd.DataFrame = table.loc[:, [bool(name) and name != "__index_level_0__" for name in header]]
    return kept


def _csv_rows(stream: Iterator[str], path: Path) -> Iterator[list[str]]:
    reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    width = None
    for row in reader:
        if not row:
            continue
        width = len(row) if width is None else width
        if len(row) != width:
            raise ManifestError(f"{path}: line {reader.line_num} has {len(row)} fields, the header has {width}")
        yield row


def header_of(path: Path) -> list[str]:
    """Column names of a table; [] for a file that is none."""
    try:
        if path.suffix.lower() == ".parquet":
            return [str(name) for name in pq.read_schema(path).names]
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return next(_csv_rows(stream, path), [])
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException):
        return []


def roles_of(header: list[str]) -> dict[str, str]:
    """Our column name -> the table's, for those of `COLUMNS` that the table has."""
    plain = {re.sub(r"^(image_)?(metadata_)?", "", name.casefold()): name for name in reversed(header)}
    plain = {re.sub(r"[\s_-]", "", short): name for short, name in plain.items()}
    found = {role: next((plain[name] for name in names if name in plain), "") for role, names in COLUMNS.items()}
    return {role: name for role, name in found.items() if name}


def channel_columns(header: list[str]) -> dict[str, dict[str, str]]:
    """Channel -> {"FileName": column, "PathName": column, "URL": column} of a load_data.csv; {} for other tables."""
    channels: dict[str, dict[str, str]] = {}
    for name in header:
        match = PATH_COLUMN.fullmatch(name)
        if match and not match[2].startswith("Illum"):  # illumination functions, one a plate
            channels.setdefault(match[2], {})[match[1]] = name
    return {channel: kinds for channel, kinds in channels.items() if "FileName" in kinds or "URL" in kinds}


def names_images(header: list[str]) -> bool:
    """Whether a table with these columns is a manifest or index, and none of the tables that we write."""
    ours = any(name.startswith("Reward_") or name == "ObjectNumber" for name in header)
    return not ours and bool({"File", "Key"} & roles_of(header).keys() or channel_columns(header))


def sample_key_path(key: str) -> str:
    """Path, without suffix, of an IMPA/CellFlux sample key.

    Week1_22123_1_11_3.0 -> Week1/22123/1_11_3.0 (BBBC021: batch, plate, rest);
    BR00117010_M01_9_144 -> BR00117010/M01_9/M01_9_144 (cpg0000: plate, well, site, cell);
    U2OS-01_1_B02_s1_14 -> 01_1/B02/s1_14 (rxrx1: any key with "-").
    """
    parts = key.partition("-")[2].split("_") if "-" in key else key.split("_")
    if len(parts) < 3 or not all(parts) or "/" in key:
        raise ValueError(f"sample key {key!r} names no path: batch_plate_rest or plate_well_site_cell is wanted")
    if "-" in key:
        return f"{parts[0]}_{parts[1]}/{parts[2]}/{'_'.join(parts[3:])}"
    if len(parts) == 4 and re.fullmatch(r"[A-P]\d\d", parts[1]):
        return f"{parts[0]}/{parts[1]}_{parts[2]}/{'_'.join(parts[1:])}"
    return f"{parts[0]}/{parts[1]}/{'_'.join(parts[2:])}"


@lru_cache(maxsize=4096)
def resolved_folder(folder: Path) -> Path:
    """`folder.resolve()`, remembered; `read_manifest` starts by forgetting."""
    return folder.resolve()


def under_root(text: str, root: Path) -> Path:
    """Absolute path of `text` (relative to `root`, or absolute); it may not leave `root`, by ".." or by a link.

    Raises ValueError with what to do.
    """
    if not text.strip():
        raise ValueError("no file is named")
    if _URL.match(text):
        raise ValueError(f"{text!r} is a URL; nothing is downloaded: fetch the files and name the local ones")
    if "\0" in text:
        raise ValueError(f"{text!r} is no file name")
    path = root / text
    try:
        # Folders are resolved once for all their files; only a link needs a look of its own.
        whole = path.name == ".." or path.is_symlink()
        real = path.resolve() if whole else resolved_folder(path.parent) / path.name
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{text!r} cannot be resolved ({error})") from error
    if not real.is_relative_to(resolved_folder(root)):
        raise ValueError(f"{text!r} leaves the image root {root}; name a root that holds it with --images")
    return path


def load_data_path(row: dict[str, str], kinds: dict[str, str], root: Path) -> Path:
    """File of one channel in one row of a load_data.csv.

    A PathName of another machine (/home/ubuntu/bucket/projects/.../images/PLATE) is cut from the front until what is
    left, with one folder at least, exists under `root`.
    """
    name, folder = row.get(kinds.get("FileName", ""), ""), row.get(kinds.get("PathName", ""), "")
    if not name:
        url = row[kinds["URL"]] if "URL" in kinds else ""
        return under_root(unquote(urlsplit(url).path) if url.startswith("file:") else url, root)
    parts = Path(folder).parts
    for start in range(1, len(parts)) if Path(folder).is_absolute() and not Path(folder).is_relative_to(root) else ():
        if (root / Path(*parts[start:]) / name).exists():
            return under_root(str(Path(*parts[start:]) / name), root)
    return under_root(str(Path(folder) / name), root)
