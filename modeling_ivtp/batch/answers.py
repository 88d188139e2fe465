"""One answered row, and the Parquet files that answers end in."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("error", pa.string()),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("images", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Answered:
    """What became of a row.

    Attributes
    ----------
    row : int
        Its number in the data, from 0.
    id : str or None
    answer : str or None
        None if there is an error.
    error : str or None
        Beginning with the row's number.
    tokens : int
        Of the answer, its end included.
    prompt_tokens : int
        Of the prompt, all tokens of its pictures included; 0 if the row never got that far.
    images : int
    """

    row: int
    id: str | None
    answer: str | None
    error: str | None
    tokens: int
    prompt_tokens: int
    images: int

    def values(self) -> list[Any]:
        """JSON-ready; `Answered(*values)` is the way back."""
        return list(astuple(self))


def write(path: Path, rows: Iterable[Answered]) -> None:
    """Write a file that is either whole or not there, in the order of the rows.

    Nothing in it depends on when or by whom it was written: the same answers make the same bytes.
    """
    ordered = sorted(rows, key=lambda one: one.row)
    table = pa.Table.from_pylist([asdict(one) for one in ordered], schema=SCHEMA)
    # Only one process holds the shard, so a file of this name is what a killed one left.
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:  # of a path pyarrow would make something of its own
        pq.write_table(table, file)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, reach the disk."""
    if os.name != "posix":
        return  # Windows opens no folders, and writes files through as it closes them
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def count_errors(paths: Iterable[Path]) -> int:
    """Rows with an error in finished files."""
    columns = (pq.read_table(path, columns=["error"])["error"] for path in paths)
    return sum(len(column) - column.null_count for column in columns)
