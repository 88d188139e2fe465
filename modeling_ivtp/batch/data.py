"""Rows of a data set, read by column and without decoding a picture: one damaged file must not stop the others."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ..hub.sources import is_hub_id

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_READ_AT_ONCE = 10_000


class _Size(int):
    """Bytes of a file that is stored in the data."""


@dataclass(frozen=True)
class Stored:
    """A picture's file that is stored in the data, not read yet.

    Attributes
    ----------
    data : Data
    row : int
    place : int or None
        Among the row's pictures, if they are a list.
    """

    data: Data
    row: int
    place: int | None

    def read(self) -> bytes:
        """The file."""
        return self.data.stored(self.row, self.place)


@dataclass(frozen=True)
class Row:
    """One row, as it stands in the data.

    Attributes
    ----------
    number : int
        Its place in the data, from 0.
    id : str or None
    question : object
        Text, if the row is sound.
    images : tuple of (str or Stored)
        Where each picture lies.
    problem : str or None
        What is wrong with the row's images column, if anything is.
    """

    number: int
    id: str | None
    question: Any
    images: tuple[str | Stored, ...]
    problem: str | None = None


class Data:
    """The columns of a data set that answers are made from.

    Parameters
    ----------
    table : datasets.Dataset
    source : str
        What the person named.
    folder : Path
        Where paths of pictures start.
    image_column, prompt_column, id_column : str or None
        None: there is no such column.
    prompt : str or None
        The question of every row, if there is no column of questions.

    Raises
    ------
    ValueError
        For a column that the data lack, or data without rows.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        source: str,
        folder: Path,
        *,
        image_column: str | None,
        prompt_column: str | None,
        id_column: str | None = None,
        prompt: str | None = None,
    ) -> None:
        wanted = [name for name in (image_column, prompt_column, id_column) if name is not None]
        if unknown := [name for name in wanted if name not in table.column_names]:
            raise ValueError(
                f"{source} has no column {', '.join(map(repr, unknown))}; it has: {', '.join(table.column_names)}"
            )
        if not len(table):
            raise ValueError(f"{source} has no rows")
        columns = list(dict.fromkeys(wanted))
        # A column whose values are of several types is stored as JSON, each value by itself.
        self._as_json = {name for name in columns if type(table.features[name]).__name__ == "Json"}
        self._table = table.select_columns(columns).with_format("arrow") if columns else table.with_format("arrow")
        self._folder = folder
        self._columns = (image_column, prompt_column, id_column)
        self._prompt = prompt

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows from `start` up to `stop`; what they store of pictures stays where it is."""
        part = self._table[start:stop]
        images, questions, ids = (self._values(part, name) for name in self._columns)
        if self._columns[1] is None:
            questions = [self._prompt] * len(images)
        return [
            self._row(start + place, cell, question, name)
            for place, (cell, question, name) in enumerate(zip(images, questions, ids, strict=True))
        ]

    def stored(self, row: int, place: int | None) -> bytes:
        """The file of a picture that the data store."""
        cell = self._table[row : row + 1][self._columns[0]].to_pylist()[0]
        cell = cell if place is None else cell[place]
        return bytes(cell["bytes"] if isinstance(cell, dict) else cell)

    def _values(self, part: pa.Table, column: str | None) -> list[Any]:
        if column is None:
            return [None] * len(part)
        values = list(_sizes_for_bytes(part[column].combine_chunks()))
        return [None if one is None else json.loads(one) for one in values] if column in self._as_json else values

    def _row(self, number: int, cell: Any, question: Any, name: Any) -> Row:
        if isinstance(cell, list):
            found = [self._image(one, number, place) for place, one in enumerate(cell)]
        else:
            found = [] if _is_none(cell) else [self._image(cell, number, None)]
        problem = next(
            (
                f"image {count} is neither a path nor a file's bytes"
                for count, one in enumerate(found, 1)
                if one is None
            ),
            None,
        )
        sound = tuple(one for one in found if one is not None)
        return Row(number, None if name is None else str(name), question, sound, problem)

    def _image(self, cell: Any, row: int, place: int | None) -> str | Stored | None:
        if isinstance(cell, dict):
            # How the Image feature of `datasets` is stored: the file itself, or where it lies.
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, _Size):
            return Stored(self, row, place)
        if not isinstance(cell, str):
            return None
        if cell.startswith("data:") or "://" in cell:
            return cell
        return str(self._folder / Path(cell).expanduser())

    def fingerprint(self) -> str:
        """What tells these rows from others: questions, ids, and where pictures lie or how large they are.

        It is the same on every machine and in every process. Of pictures that are stored in the data it sees the
        size, not the content, and of those that lie beside them the place: reading them all would take as long as
        answering.

        Returns
        -------
        str
            64 hexadecimal digits.
        """
        found = hashlib.sha256(f"{len(self)}".encode())
        for start in range(0, len(self), _READ_AT_ONCE):
            part = self._table[start : start + _READ_AT_ONCE]
            for kind, column in zip(("image", "prompt", "id"), self._columns, strict=True):
                if column is not None:
                    for value in _sizes_for_bytes(part[column].combine_chunks()):
                        found.update(json.dumps([kind, self._relative(value)]).encode())
        return found.hexdigest()

    def _relative(self, value: Any) -> Any:
        """Paths within the data's folder, which may lie elsewhere on another machine."""
        if isinstance(value, list):
            return [self._relative(one) for one in value]
        if isinstance(value, dict):
            return {name: self._relative(one) for name, one in value.items()}
        return os.path.relpath(value, self._folder) if str(value).startswith(f"{self._folder}{os.sep}") else str(value)


def open_data(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    image_column: str | None = "image",
    prompt_column: str | None = "question",
    id_column: str | None = None,
    prompt: str | None = None,
) -> Data:
    """Open a data set by what it is called.

    Parameters
    ----------
    source : str
        A `.jsonl`, `.json` or `.parquet` file, or a pattern such as `part-*.parquet`; a folder of images, or any other
        that `datasets` reads, one of `save_to_disk` included; or a data set's name on the Hub, with `:CONFIG` behind
        it if it has several. Relative paths of pictures start at the file's folder (of several files, at the deepest
        folder that holds them all), or at the folder itself.
    split : str, default "train"
        As `datasets` takes it, `train[:100]` included.
    limit : int, optional
        Only so many rows, the first ones.
    image_column, prompt_column, id_column, prompt
        As in `Data`.

    Raises
    ------
    ValueError
        If the data cannot be read, have no rows, or lack a column.
    OSError
        If there is no such file, folder, or data set.
    """
    try:
        with _quiet():
            table, folder = _load(source, split)
    except (OSError, ValueError):
        raise
    except Exception as error:
        # `datasets` raises errors of its own for damaged files, and says why in their cause.
        why = error.__cause__ or error
        raise ValueError(f"{source} cannot be read as a data set ({type(why).__name__}: {why})") from error
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    return Data(
        table,
        source,
        folder,
        image_column=image_column,
        prompt_column=prompt_column,
        id_column=id_column,
        prompt=prompt,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars of `datasets` out of the way, and what it logs of errors that it raises as well."""
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _load(source: str, split: str) -> tuple[datasets.Dataset, Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split), path.resolve()
    pattern = any(sign in source for sign in "*?[")
    files = sorted(glob.glob(str(path), recursive=True)) if pattern else [str(path)] if path.is_file() else []
    if not files:
        name, _, config = source.partition(":")
        if pattern or not is_hub_id(name) or path.suffix in _BUILDERS:
            raise FileNotFoundError(f"there are no data {source!r}: no file, no folder, and no name on the Hub")
        return datasets.load_dataset(name, config or None, split=split), Path.cwd()
    endings = sorted({Path(file).suffix for file in files})
    if len(endings) > 1 or endings[0] not in _BUILDERS:
        raise ValueError(f"{source} ends in {', '.join(endings)}; allowed: one of {', '.join(_BUILDERS)}")
    if not any(os.path.getsize(file) for file in files):
        raise ValueError(f"{source} is empty")
    folder = os.path.commonpath([Path(file).resolve().parent for file in files])
    return datasets.load_dataset(_BUILDERS[endings[0]], data_files=files, split=split), Path(folder)


def _folder(path: Path, split: str) -> datasets.Dataset:
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return datasets.load_dataset(str(path), split=split)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(saved)}")
    return saved[split]


def _is_none(cell: Any) -> bool:
    return cell is None or (isinstance(cell, dict) and all(cell.get(name) is None for name in ("bytes", "path")))


def _sizes_for_bytes(column: pa.Array) -> Iterator[Any]:
    """The values of a column, the size of a file in place of its bytes, which are not read for that."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        yield from (None if size is None else _Size(size) for size in pc.binary_length(column).to_pylist())
    elif pa.types.is_struct(kind):
        fields = [list(_sizes_for_bytes(column.field(place))) for place in range(kind.num_fields)]
        yield from (
            dict(zip([field.name for field in kind], values, strict=True)) for values in zip(*fields, strict=True)
        )
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inside = _sizes_for_bytes(column.flatten())
        for length in pc.list_value_length(column).to_pylist():
            yield None if length is None else [next(inside) for _ in range(length)]
    else:
        yield from column.to_pylist()
