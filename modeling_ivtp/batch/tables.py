"""Tables that rows are read from: those of `datasets`, and JSON files, whose values keep their types."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Size(int):
    """Size in bytes of a file that is stored in the data."""


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, and the reason."""

    why: str


class Table(Protocol):
    """Values by row and column."""

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> Table:
        """Return the table of the rows from `start` up to `stop`."""

    def cells(self, column: str, start: int, stop: int) -> Iterator[Any]:
        """Yield a column's values; stored files as their `Size`, and rows that cannot be read as `Broken`."""

    def stored(self, column: str, row: int) -> Any:
        """Return one value, with the bytes of stored files."""


class ArrowTable:
    """A `datasets.Dataset`."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table.with_format("arrow")
        # `datasets` stores a column of mixed types as JSON texts, one for each value.
        self._as_json = {name for name, kind in table.features.items() if type(kind).__name__ == "Json"}

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def part(self, start: int, stop: int) -> ArrowTable:
        """Return the table of the rows from `start` up to `stop`."""
        return ArrowTable(self._table.select(range(start, min(stop, len(self)))))

    def cells(self, column: str, start: int, stop: int) -> Iterator[Any]:
        """See `Table`."""
        part = self._table.select_columns([column])[start:stop][column]
        # Chunk by chunk: stored files of many rows exceed what one array can hold.
        values = (value for chunk in part.chunks for value in _sizes_for_bytes(chunk))
        if column in self._as_json:
            yield from (None if value is None else json.loads(value) for value in values)
        else:
            yield from values

    def stored(self, column: str, row: int) -> Any:
        """See `Table`."""
        return self._table.select_columns([column])[row : row + 1][column].to_pylist()[0]


class JsonTable:
    """Files of JSON lines, one row in each, or files with one array of rows. Lines are read when they are needed.

    Values keep their types: a question that is a number in one row does not change the others. Files are UTF-8, UTF-16
    or UTF-32, as JSON allows.

    Parameters
    ----------
    files : sequence of Path

    Raises
    ------
    ValueError
        For a file with a damaged array; the message names the file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [Path(file) for file in files]
        self._arrays: dict[int, list[Any]] = {}
        self._file, self._place = array("q"), array("q")
        for number, file in enumerate(self._files):
            for place in self._starts(number, file):
                self._file.append(number)
                self._place.append(place)
        self._names: list[str] | None = None

    @classmethod
    def of_rows(cls, rows: list[Any]) -> JsonTable:
        """Return a table of rows that are already read."""
        table = cls([])
        table._arrays[0] = rows
        table._file, table._place = array("q", bytes(8 * len(rows))), array("q", range(len(rows)))
        return table

    def _starts(self, number: int, file: Path) -> Iterator[int]:
        """Yield the rows' places: indices of an array, or offsets in the file."""
        encoding = encoding_of(file)
        with open(file, encoding=encoding, errors="replace") as lines:
            is_array = lines.read(4096).lstrip().startswith("[")
        if is_array or not encoding.startswith("utf-8"):
            try:
                text = file.read_bytes().decode(encoding, "surrogatepass")
                # Lines of other encodings are read at once: their ends are not single bytes.
                array = json.loads(text) if is_array else [_parsed(line) for line in text.split("\n") if line.strip()]
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}") from error
            self._arrays[number] = array
            yield from range(len(array))
            return
        with open(file, "rb") as lines:
            at = 0
            for line in lines:
                if line.strip():
                    yield at
                at += len(line)

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, in the order in which rows first have them."""
        if self._names is None:
            rows = self._rows(0, len(self))
            self._names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
        return self._names

    def __len__(self) -> int:
        return len(self._file)

    def part(self, start: int, stop: int) -> JsonTable:
        """Return the table of the rows from `start` up to `stop`."""
        table = JsonTable([])
        table._files, table._arrays, table._names = self._files, self._arrays, self.column_names
        table._file, table._place = self._file[start:stop], self._place[start:stop]
        return table

    def cells(self, column: str, start: int, stop: int) -> Iterator[Any]:
        """See `Table`."""
        for row in self._rows(start, min(stop, len(self))):
            yield row.get(column) if isinstance(row, dict) else row

    def stored(self, column: str, row: int) -> Any:
        """See `Table`."""
        return next(self.cells(column, row, row + 1))

    def _rows(self, start: int, stop: int) -> Iterator[dict[str, Any] | Broken]:
        opened: Any = None
        number = -1
        try:
            for row in range(start, stop):
                if self._file[row] in self._arrays:
                    value = self._arrays[self._file[row]][self._place[row]]
                else:
                    if self._file[row] != number:
                        if opened is not None:
                            opened.close()
                        number = self._file[row]
                        opened = open(self._files[number], "rb")  # noqa: SIM115, closed below
                    opened.seek(self._place[row])
                    value = _parsed(opened.readline())
                if not isinstance(value, (dict, Broken)):
                    value = Broken(f"its line is no object, but {type(value).__name__}")
                yield value
        finally:
            if opened is not None:
                opened.close()


def split_of(table: Table, split: str) -> Table:
    """Return a split of files that have none of their own: all rows are `train`, and `train[:9]` is a part of it.

    Raises
    ------
    ValueError
        For another split, or a sum of several.
    """
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(table)})
    if len(parts) != 1:
        raise ValueError(f"split={split!r}; allowed for files: train, or one part of it, such as train[:100]")
    (part,) = parts
    start, stop = part.from_ or 0, len(table) if part.to is None else part.to
    return table if (start, stop) == (0, len(table)) else table.part(start, stop)


def encoding_of(file: Path) -> str:
    """Return the encoding of a JSON file, by its first bytes."""
    with open(file, "rb") as content:
        encoding = json.detect_encoding(content.read(4))
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _parsed(line: bytes | str) -> Any:
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf") if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        return Broken(f"its line is not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file in UTF-8")
    except json.JSONDecodeError as error:
        # Its own text would count lines, and this is one of many.
        return Broken(f"its line is no JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return Broken(f"its line is no JSON ({error})")


def _sizes_for_bytes(column: pa.Array) -> Iterator[Any]:
    """Yield a column's values, with the `Size` of each stored file instead of its bytes, which stay unread."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        yield from _sizes_for_bytes(column.dictionary_decode())
    elif _is_any(kind, "binary", "large_binary", "fixed_size_binary", "binary_view"):
        yield from (None if size is None else Size(size) for size in _lengths(column))
    elif pa.types.is_struct(kind):
        fields = [list(_sizes_for_bytes(column.field(place))) for place in range(kind.num_fields)]
        yield from (
            dict(zip([field.name for field in kind], values, strict=True)) for values in zip(*fields, strict=True)
        )
    elif _is_any(kind, "list", "large_list", "fixed_size_list"):
        values, lengths = _list_values(column)
        sizes = _sizes_for_bytes(values)
        for length, valid in zip(lengths, column.is_valid().to_pylist(), strict=True):
            items = [next(sizes) for _ in range(length)]
            yield items if valid else None
    else:
        yield from column.to_pylist()


def _is_any(kind: pa.DataType, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _lengths(column: pa.Array) -> list[int | None]:
    """Return the bytes of each value."""
    if not pa.types.is_binary_view(column.type):
        return pc.binary_length(column).to_pylist()
    # PyArrow cannot count views. Each is 16 bytes, of which the first four are the length.
    views = np.frombuffer(column.buffers()[1], dtype=np.int32).reshape(-1, 4)
    sizes = views[column.offset :, 0].tolist()
    return [size if valid else None for size, valid in zip(sizes, column.is_valid().to_pylist(), strict=False)]


def _list_values(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """Return the items of a column of lists, and how many each row has; unlike `flatten`, also where a row is null."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return column.values.slice(column.offset * size, len(column) * size), [size] * len(column)
    offsets = column.offsets.to_pylist()
    lengths = [stop - start for start, stop in pairwise(offsets)]
    return column.values.slice(offsets[0], offsets[-1] - offsets[0]), lengths


def is_text(value: str) -> bool:
    """Return whether a text can be encoded: JSON may hold half of a character, which no file can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
