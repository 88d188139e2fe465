"""Answered rows, and the columns in which they are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import pyarrow as pa

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


def table(answered: Iterable[Answered]) -> pa.Table:
    """Return answers as they are written, in the order of the rows."""
    ordered = sorted(answered, key=lambda row: row.row)
    return pa.Table.from_pylist([asdict(row) for row in ordered], schema=SCHEMA)
