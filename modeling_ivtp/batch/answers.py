"""Answered rows, and the Parquet files that hold them."""

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
    """A row's answer, or its error.

    Attributes
    ----------
    row : int
        The row's number in the data, from 0.
    id : str or None
    answer : str or None
        None if there is an error.
    error : str or None
        Beginning with the row's number.
    tokens : int
        Length of the answer, its end token included.
    prompt_tokens : int
        Length of the prompt with all tokens of its pictures; 0 if the row failed before the model saw it.
    images : int
        Number of pictures.
    """

    row: int
    id: str | None
    answer: str | None
    error: str | None
    tokens: int
    prompt_tokens: int
    images: int

    def values(self) -> list[Any]:
        """Return the fields as a JSON-ready list; `Answered(*values)` is the inverse."""
        return list(astuple(self))


def write(path: Path, rows: Iterable[Answered]) -> None:
    """Write answers to a Parquet file, in the order of the rows; the file appears only once it is complete.

    The same answers give the same bytes, whenever and by whichever process they are written.
    """
    ordered = sorted(rows, key=lambda answered: answered.row)
    table = pa.Table.from_pylist([asdict(answered) for answered in ordered], schema=SCHEMA)
    # Only one process holds the shard, so a file of this name was left by one that was killed.
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:  # pyarrow would interpret a path
        pq.write_table(table, file)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    if os.name != "posix":
        return  # Windows opens no folders, and writes files through as it closes them
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def count_errors(paths: Iterable[Path]) -> tuple[int, str | None]:
    """Count the rows with an error in finished files, and return the first of these errors."""
    count, first = 0, None
    for path in paths:
        errors = pq.read_table(path, columns=["error"])["error"].drop_null()
        if len(errors) and first is None:
            first = errors[0].as_py()
        count += len(errors)
    return count, first
