"""A folder of pictures: all pictures in it and below, and an account of the files that are none."""

from __future__ import annotations

import csv
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow.parquet import read_schema

from .tables import encoding_of

# Pictures by their ending that Pillow may not read; each gets a row, and the row an error if it cannot be read.
_OTHER_PICTURES = {
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".hif", ".jxl", ".nef", ".orf", ".psd", ".raf", ".raw",
    ".rw2", ".svg",
}  # fmt: skip
_TABLES = {".csv", ".json", ".jsonl", ".parquet", ".tsv"}
_ARCHIVES = {".arrow", ".gz", ".tar", ".zip"}
# `datasets` joins these with the pictures beside them.
_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
_HEAD = 1 << 20


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder and its sub-folders, hidden ones left out.

    Attributes
    ----------
    path : Path
    pictures : list of Path
        Files that are pictures by their ending or their content, relative to the folder, in order.
    others : list of Path
        All other files.
    unreadable : list of Path
        Sub-folders that could not be listed.
    """

    path: Path
    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> ImageFolder:
        """List a folder. Links to folders are followed, and each folder is read once, whatever links lead to it."""
        folder = cls(path)
        for file in sorted(_files(path, folder.unreadable)):
            (folder.pictures if _is_picture(path, file) else folder.others).append(file)
        return folder

    def tables(self, column: str) -> list[Path]:
        """Return the tables among the files that have a column, as paths on this machine."""
        tables = (self.path / file for file in self.others if file.suffix.lower() in _TABLES)
        return [table for table in tables if column in _column_names(table)]

    def is_for_datasets(self) -> bool:
        """Return whether `datasets` is to read the folder: it has archives, or metadata to join with pictures."""
        return not self.pictures or any(
            file.name in _METADATA or file.suffix.lower() in _ARCHIVES for file in self.others
        )

    def joins_pictures(self, other: Path) -> bool:
        """Return whether `datasets` reads one of the other files with the pictures: metadata, or an archive of more."""
        file = self.path / other
        return file.name in _METADATA or zipfile.is_zipfile(file) or tarfile.is_tarfile(file)

    def left_out(self, read: Collection[Path]) -> str | None:
        """Return a sentence that counts what is not read; None if there is nothing to count.

        Parameters
        ----------
        read : collection of Path
            The files that are read, as paths on this machine: pictures that have a row, tables, archives.
        """
        parts = []
        if pictures := [file for file in self.pictures if self.path / file not in read]:
            parts.append(f"{_number(len(pictures), 'picture')} without a row, such as {pictures[0]}")
        if others := [file for file in self.others if self.path / file not in read]:
            endings = Counter(file.suffix.lower() or "no ending" for file in others)
            counted = ", ".join(f"{count} with {ending}" for ending, count in sorted(endings.items()))
            are = "is not a picture" if len(others) == 1 else "are not pictures"
            parts.append(f"{_number(len(others), 'file')} that {are} ({counted})")
        if self.unreadable:
            parts.append(f"{_number(len(self.unreadable), 'folder')} that cannot be read, such as {self.unreadable[0]}")
        return f"{self.path}: left out {' and '.join(parts)}" if parts else None


def _files(root: Path, unreadable: list[Path]) -> Iterator[Path]:
    """Yield the files below a folder, relative to it; linked folders come last, so that a real path wins."""
    seen: set[tuple[int, int]] = set()
    folders, linked = [Path()], list[Path]()
    while folders or linked:
        relative = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(root / relative)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / relative) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError:
            unreadable.append(relative)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # False for links in a circle, for which entries raise
                (linked if entry.is_symlink() else folders).append(relative / entry.name)
            # A link that leads nowhere is a file that cannot be read.
            elif entry.is_symlink() or entry.is_file():
                yield relative / entry.name


def _is_picture(root: Path, file: Path) -> bool:
    ending = file.suffix.lower()
    if ending in Image.registered_extensions() or ending in _OTHER_PICTURES:
        return True
    if ending:
        return False
    try:
        with Image.open(root / file):
            return True
    except Exception:  # decoders raise errors of any type
        return False


def _column_names(table: Path) -> Iterable[str]:
    """Return a table's column names from its beginning; none if they cannot be read."""
    try:
        if table.suffix.lower() == ".parquet":
            return list(read_schema(table).names)
        if table.suffix.lower() in (".csv", ".tsv"):
            with open(table, encoding="utf-8-sig", newline="") as lines:
                return next(csv.reader(lines, delimiter="\t" if table.suffix.lower() == ".tsv" else ","), [])
        row = _first_row(table)
        return row if isinstance(row, dict) else []
    except (OSError, ValueError, csv.Error):
        return []


def _first_row(table: Path) -> Any:
    """Return the first row of JSON lines or of an array of rows."""
    with open(table, encoding=encoding_of(table), errors="replace") as file:
        text = file.read(_HEAD).lstrip()
    if text.startswith("["):
        return json.JSONDecoder().raw_decode(text[1:].lstrip())[0]
    return json.loads(text.partition("\n")[0])


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")
