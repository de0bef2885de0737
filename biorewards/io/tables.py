"""Tables on disk: whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

#: Suffixes that tables are written with; parquet keeps types, and carries `info` (fingerprints, settings).
WRITTEN = (".parquet", ".csv", ".tsv")
_INFO_KEY = b"biorewards"


@contextmanager
def atomic(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names beside `paths` to write to; all are put in place together when the block ends without error.

    Each is flushed to disk before the first is renamed, so a reader finds the old files or the new ones. Folders
    are made. On an error the temporary files are removed and `paths` stay as they were.
    """
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        for written in temporary:
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
        for written, path in zip(temporary, paths, strict=True):
            written.replace(path)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def check_suffix(path: Path) -> None:
    """Raise ValueError for a table name that is not one of `WRITTEN`."""
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f"{path}: tables are written as {', '.join(WRITTEN)}; name the file so")


def write_table(path: Path, table: pd.DataFrame, info: Mapping[str, Any] | None = None) -> None:
    """Write one table atomically. `info` goes into the parquet file's metadata (JSON); text tables have no room."""
    write_tables({path: table}, info)


def write_tables(tables: Mapping[Path, pd.DataFrame], info: Mapping[str, Any] | None = None) -> None:
    """Write tables that belong together: all of them appear, or none. Raises ValueError for an unknown suffix."""
    for path in tables:
        check_suffix(path)
    with atomic(*tables) as temporary:
        for written, (path, table) in zip(temporary, tables.items(), strict=True):
            if path.suffix.lower() == ".parquet":
                _write_parquet(written, table, info or {})
            else:
                _write_text(written, table, "\t" if path.suffix.lower() == ".tsv" else ",")


def _write_parquet(path: Path, table: pd.DataFrame, info: Mapping[str, Any]) -> None:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    described = {**(arrow.schema.metadata or {}), _INFO_KEY: json.dumps(info, sort_keys=True).encode()}
    pq.write_table(arrow.replace_schema_metadata(described), path, compression="zstd")


def _write_text(path: Path, table: pd.DataFrame, separator: str) -> None:
    # The shortest text that reads back as the same float32; missing values are empty fields.
    text = {name: _shortest(table[name]) if table[name].dtype == np.float32 else table[name] for name in table}
    pd.DataFrame(text, index=table.index).to_csv(
        path, sep=separator, index=False, lineterminator="\n", encoding="utf-8"
    )


def _shortest(column: pd.Series[Any]) -> pd.Series[Any]:
    values = column.to_numpy(dtype=np.float32)
    return pd.Series(["" if np.isnan(value) else str(value) for value in values], index=column.index, dtype=object)


def read_table(path: Path) -> pd.DataFrame:
    """A table that `write_table` wrote. Text columns of a CSV come back as text, "" where empty."""
    if path.suffix.lower() == ".parquet":
        frame: pd.DataFrame = pq.read_table(path).to_pandas()
        return frame
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    header = pd.read_csv(path, sep=separator, nrows=0).columns
    text = {name: str for name in header if name.startswith(("Metadata_", "Reason_"))}
    table = pd.read_csv(path, sep=separator, dtype=text, keep_default_na=False, na_values={
        name: [""] for name in header if name not in text
    })  # fmt: skip
    numbers = [name for name in header if name not in text and name not in ("ImageNumber", "ObjectNumber")]
    return table.astype(dict.fromkeys(numbers, np.float32))


def read_info(path: Path) -> dict[str, Any]:
    """`info` of a parquet table; {} where there is none."""
    if path.suffix.lower() != ".parquet":
        return {}
    metadata = pq.read_schema(path).metadata or {}
    info: dict[str, Any] = json.loads(metadata.get(_INFO_KEY, b"{}"))
    return info


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
