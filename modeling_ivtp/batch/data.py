"""Rows of a data set, read by column and without decoding pictures, so that a damaged one stops no other row."""

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
from pyarrow.parquet import read_metadata

from ..checkpoints.sources import HubOptions, is_hub_id
from ..files.images import is_base64, shortened
from .image_folder import ImageFolder
from .remote import Remote, RemoteFolder, fetch, is_address
from .tables import ArrowTable, Broken, JsonTable, Size, Table, is_text, split_of

_JSON, _PARQUET = (".jsonl", ".json"), ".parquet"
_READ_AT_ONCE = 10_000
ID_COLUMN = "id"
_KINDS = ("image", "prompt", "id")


@dataclass(frozen=True)
class Stored:
    """A picture's file that is stored in the data and not read yet.

    Attributes
    ----------
    data : Data
    row : int
    place : int or None
        The picture's place in the row's list of pictures; None if the row has no list.
    """

    data: Data
    row: int
    place: int | None

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self.data.stored(self.row, self.place)


@dataclass(frozen=True)
class Row:
    """One row of the data, unchecked.

    Attributes
    ----------
    number : int
        The row's place in the data, from 0.
    id : str or None
    question : object
        A text, if the row is valid.
    images : tuple of (str, Stored or Remote)
        The path or address of each picture, or its file, which is stored in the data or elsewhere.
    problem : str or None
        What is wrong with the row, if anything is.
    """

    number: int
    id: str | None
    question: Any
    images: tuple[str | Stored | Remote, ...]
    problem: str | None = None


class Data:
    """The columns of a data set that are needed for answers.

    Parameters
    ----------
    table : Table
    source : str
        The name that the person gave; it stands in every error.
    folder : Path or RemoteFolder
        The folder that relative paths of pictures start from.
    image_column, prompt_column : str or None
        Names of the columns; None: there is no such column.
    id_column : str or None
        Name of the column of ids; None: `id`, if there is one. An empty name: there are none.
    prompt : str or None
        The question of every row, if there is no column of questions.
    left_out : str or None
        What of the source is not among the rows, in one sentence.

    Raises
    ------
    ValueError
        For a column that the data lack, or data without rows.
    """

    def __init__(
        self,
        table: Table,
        source: str,
        folder: Path | RemoteFolder,
        *,
        image_column: str | None,
        prompt_column: str | None,
        id_column: str | None = None,
        prompt: str | None = None,
        left_out: str | None = None,
    ) -> None:
        if not len(table):
            raise ValueError(f"{source} has no rows")
        wanted = [name for name in (image_column, prompt_column, id_column or None) if name is not None]
        if wanted and not table.column_names:
            why = next(iter(table.cells(wanted[0], 0, 1)))
            raise ValueError(f"{source} has no row that can be read; of the first, {getattr(why, 'why', why)}")
        if unknown := [name for name in wanted if name not in table.column_names]:
            raise ValueError(
                f"{source} has no column {', '.join(map(repr, unknown))}; it has: {', '.join(table.column_names)}"
            )
        self._table = table
        self._folder = folder
        if id_column is None and ID_COLUMN in table.column_names:
            id_column = ID_COLUMN
        self.id_column = id_column or None
        self._columns = (image_column, prompt_column, self.id_column)
        self._prompt = prompt
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, start: int, stop: int) -> list[Row]:
        """Return the rows from `start` up to `stop`, without reading the pictures that they store."""
        stop = min(stop, len(self))
        images, questions, ids = (
            [None] * (stop - start) if name is None else list(self._cells(kind, name, start, stop))
            for kind, name in zip(_KINDS, self._columns, strict=True)
        )
        if self._columns[1] is None:
            questions = [self._prompt] * len(images)
        return [
            self._row(start + place, cell, question, name)
            for place, (cell, question, name) in enumerate(zip(images, questions, ids, strict=True))
        ]

    def _cells(self, kind: str, column: str, start: int, stop: int) -> Iterator[Any]:
        """Yield a column's values; bytes stay unread in the column of images, and elsewhere are taken for text."""
        for row, value in enumerate(self._table.cells(column, start, stop), start):
            if kind == "image" or not isinstance(value, Size):
                yield value
            else:
                content = self._table.stored(column, row)
                text = content.decode("utf-8", "replace")
                yield content.hex() if kind == "id" and not text.isprintable() else text

    def stored(self, row: int, place: int | None) -> bytes:
        """Return the file of a picture that is stored in the data."""
        assert self._columns[0] is not None
        cell = self._table.stored(self._columns[0], row)
        cell = cell if place is None else cell[place]
        return bytes(cell["bytes"] if isinstance(cell, dict) else cell)

    def _row(self, number: int, cell: Any, question: Any, name: Any) -> Row:
        for value in (cell, question, name):
            if isinstance(value, Broken):
                return Row(number, None, None, (), value.why)
        if name is not None and not is_text(str(name)):
            return Row(number, None, None, (), f"the id holds half of a character: {shortened(repr(name))}")
        if isinstance(cell, list):
            images = [self._image(item, number, place) for place, item in enumerate(cell)]
        else:
            images = [] if _is_none(cell) else [self._image(cell, number, None)]
        problem = None
        if None in images:
            problem = f"image {images.index(None) + 1} is neither a path nor a file's bytes"
        valid = tuple(image for image in images if image is not None)
        return Row(number, None if name is None else str(name), question, valid, problem)

    def _image(self, cell: Any, row: int, place: int | None) -> str | Stored | Remote | None:
        if isinstance(cell, dict):
            # The Image feature of `datasets` stores the file itself, or its path.
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, Size):
            return Stored(self, row, place)
        if not isinstance(cell, str):
            return None
        if cell.startswith("data:") or is_base64(cell):
            return cell
        if "://" in cell:
            return Remote.picture(cell)
        if isinstance(self._folder, RemoteFolder):
            return self._folder.joined(cell)
        try:
            return str(self._folder / Path(cell).expanduser())
        except RuntimeError:  # the path names a user who does not exist
            return str(self._folder / cell)

    def fingerprint(self) -> str:
        """Return a fingerprint of the rows: of questions, ids, and the pictures' paths or sizes.

        It is the same on every machine and in every process. Pictures that are stored in the data count with their
        size, others with their path: reading them all would take as long as answering.

        Returns
        -------
        str
            64 hexadecimal digits.
        """
        digest = hashlib.sha256(f"{len(self)}".encode())
        for start in range(0, len(self), _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, len(self))
            for kind, column in zip(_KINDS, self._columns, strict=True):
                if column is not None:
                    for value in self._cells(kind, column, start, stop):
                        digest.update(json.dumps([kind, self._relative(value)]).encode())
        return digest.hexdigest()

    def _relative(self, value: Any) -> Any:
        """Return a cell with paths relative to the data's folder, which may lie elsewhere on another machine."""
        if isinstance(value, list):
            return [self._relative(item) for item in value]
        if isinstance(value, dict):
            return {name: self._relative(item) for name, item in value.items()}
        if isinstance(self._folder, Path) and str(value).startswith(f"{self._folder}{os.sep}"):
            return os.path.relpath(value, self._folder)
        return str(value)


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
    """Open a data set by its path or name.

    Parameters
    ----------
    source : str
        A `.jsonl`, `.json` or `.parquet` file, or a pattern such as `part-*.parquet`, here or at an address that fsspec
        reads, such as `s3://bucket/rows.jsonl`; a folder of images, or any other
        that `datasets` reads, one of `save_to_disk` included; or a data set's name on the Hub, with `:CONFIG` after
        it if it has several. If a folder holds pictures and tables, the tables with the image column are read, and
        without one the pictures. Relative paths of pictures start at the file's folder (of several files, at the
        deepest folder that holds them all), or at the folder itself.
    split : str, default "train"
        As `datasets` takes it, `train[:100]` included.
    limit : int, optional
        Number of rows to read, from the first.
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
            table, folder, left_out = _load(source, split, image_column)
    except Exception as error:
        # `datasets` raises errors of its own for damaged files, and says why in their cause.
        why = error.__cause__ or error
        if isinstance(error, (OSError, ValueError)) and "datasets dtype" not in str(error):
            raise
        raise ValueError(f"{source} cannot be read as a data set ({type(why).__name__}: {why})") from error
    if limit is not None:
        table = table.part(0, limit)
    return Data(
        table,
        source,
        folder,
        image_column=image_column,
        prompt_column=prompt_column,
        id_column=id_column,
        prompt=prompt,
        left_out=left_out,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars of `datasets`, and its log of errors, which it raises as well."""
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _load(source: str, split: str, image_column: str | None) -> tuple[Table, Path | RemoteFolder, str | None]:
    """Return a source's table, the folder that its relative paths start from, and what the table leaves out."""
    if is_address(source):
        copies, folder = fetch(source, (*_JSON, _PARQUET))
        return _load_tables(source, copies, split)[0], folder, None
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split, image_column)
    # A file's name may look like a pattern.
    pattern = not path.is_file() and any(sign in source for sign in "*?[")
    files = sorted(glob.glob(str(path), recursive=True)) if pattern else [str(path)] if path.is_file() else []
    if not files:
        name, _, config = source.partition(":")
        if pattern or not is_hub_id(name) or path.suffix.lower() in (*_JSON, _PARQUET):
            raise FileNotFoundError(f"there are no data {source!r}: no file, no folder, and no name on the Hub")
        _check_on_hub(name)
        return ArrowTable(datasets.load_dataset(name, config or None, split=split)), Path.cwd(), None
    return *_load_tables(source, [Path(file) for file in files], split), None


def _check_on_hub(name: str) -> None:
    """Raise OSError for a data set that is neither on the Hub nor cached; `datasets` would ask for it five times."""
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not (datasets.config.HF_HUB_OFFLINE or cached.is_dir()):
        HubOptions().check(name, "dataset")


def _load_tables(source: str, files: list[Path], split: str) -> tuple[Table, Path]:
    """Return the table of files of one kind that `--data` may name, and the deepest folder that holds them all."""
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) > 1 or endings[0] not in (*_JSON, _PARQUET):
        raise ValueError(f"{source} ends in {', '.join(endings)}; allowed: one of {', '.join((*_JSON, _PARQUET))}")
    return _load_files(source, files, split)


def _load_files(source: str, files: list[Path], split: str) -> tuple[Table, Path]:
    """Return the table of files of one kind, and the deepest folder that holds them all."""
    if not any(os.path.getsize(file) for file in files):
        raise ValueError(f"{source} is empty")
    folder = Path(os.path.commonpath([file.resolve().parent for file in files]))
    ending = files[0].suffix.lower()
    if ending in _JSON:
        return split_of(JsonTable(files), split), folder
    if ending == _PARQUET and not any(_parquet_rows(file) for file in files):
        raise ValueError(f"{source} has no rows")
    # `datasets` takes names for patterns.
    escaped = [glob.escape(str(file)) for file in files]
    kind, more = ("parquet", {}) if ending == _PARQUET else ("csv", {"sep": "\t"} if ending == ".tsv" else {})
    return ArrowTable(datasets.load_dataset(kind, data_files=escaped, split=split, **more)), folder


def _parquet_rows(file: Path) -> int:
    try:
        return int(read_metadata(file).num_rows)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file: {error}") from error


def _load_folder(path: Path, split: str, image_column: str | None) -> tuple[Table, Path, str | None]:
    """Return the table of a folder: one of `save_to_disk`, of pictures, or any other that `datasets` reads."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return ArrowTable(_saved(path, split)), path.resolve(), None
    folder = ImageFolder.read(path)
    if folder.is_for_datasets():
        # Left to itself, `datasets` would read whatever kind of file there is more of, and say nothing of the pictures.
        source = {"path": "imagefolder", "data_dir": str(path)} if folder.pictures else {"path": str(path)}
        table = ArrowTable(datasets.load_dataset(**source, split=split))
        chosen = datasets.load_dataset_builder(**source).config.data_files or {}
        files = {Path(file) for of_split in chosen.values() for file in of_split}
        if folder.pictures:
            files -= {path / other for other in folder.others if not folder.joins_pictures(other)}
        # Pictures of another split have their rows there.
        elsewhere = files - {Path(file) for file in chosen.get(split, [])}
        return table, path.resolve(), folder.left_out(_read_of(table, image_column, folder, files) | elsewhere)
    tables = [] if image_column is None else folder.tables(image_column)
    if not tables:
        # `datasets` would take names such as test.png for names of splits, and would follow no links.
        rows = JsonTable.of_rows([{"image": picture.as_posix()} for picture in folder.pictures])
        return split_of(rows, split), path.resolve(), folder.left_out({path / picture for picture in folder.pictures})
    if len({table.suffix.lower() for table in tables}) > 1:
        names = ", ".join(str(table.relative_to(path)) for table in tables)
        raise ValueError(f"{path} has several tables with a column {image_column!r}; give one of them: {names}")
    beside, _ = _load_files(str(path), tables, split)
    # Of a part of the rows the person chose what stays away.
    every = {path / picture for picture in folder.pictures} if "[" in split else set()
    return beside, path.resolve(), folder.left_out(_read_of(beside, image_column, folder, set(tables)) | every)


def _read_of(table: Table, column: str | None, folder: ImageFolder, files: set[Path]) -> set[Path]:
    """Return those of a folder's files that are read: pictures that a row names, and of `files` what is no picture."""
    read = files - {folder.path / picture for picture in folder.pictures}
    if column is None or column not in table.column_names:
        return read
    for cell in table.cells(column, 0, len(table)):
        for item in cell if isinstance(cell, list) else [cell]:
            name = item.get("path") if isinstance(item, dict) else item
            if isinstance(name, str) and not name.startswith("data:") and "://" not in name:
                read.add(Path(os.path.normpath(folder.path / name)))
    return read


def _saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(saved)}")
    return saved[split]


def _is_none(cell: Any) -> bool:
    if not isinstance(cell, dict):
        return cell is None
    return set(cell) <= {"bytes", "path"} and all(value is None for value in cell.values())
