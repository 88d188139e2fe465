"""The output's folder, here or on any file system that fsspec knows: answers, checkpoints and the run's settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocalFileSystem

_LOG = logging.getLogger(__name__)

SETTINGS_FILE = "_run.json"
CHECKPOINTS = "_checkpoint"


class OutFolder:
    """The folder that answers are written to.

    Ray Data writes `answers-*.parquet`, one file for each shard, and keeps in `_checkpoint/`, under the same name, the
    numbers of the shard's rows. Readers of Parquet skip names that begin with `_`, so the folder can be read as one
    table.

    Parameters
    ----------
    name : str
        A path, or an address such as `s3://bucket/answers`.

    Attributes
    ----------
    path : str
        The path on the file system.
    is_local : bool
    arrow : pyarrow.fs.FileSystem
        The file system as PyArrow and Ray Data take it.

    Raises
    ------
    OSError
        If the path is a file, or a folder that holds something else.
    ValueError
        If fsspec does not know the kind of address.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._files, self.path = fsspec.core.url_to_fs(name)
        self.path = self.path.rstrip("/")
        self.is_local = isinstance(self._files, LocalFileSystem)
        self.arrow: FileSystem = ArrowLocalFileSystem() if self.is_local else PyFileSystem(FSSpecHandler(self._files))
        self._settings, self.checkpoints = f"{self.path}/{SETTINGS_FILE}", f"{self.path}/{CHECKPOINTS}"
        self._made = False  # whether this object made the folder, and may remove it
        if self._files.isfile(self.path):
            raise FileExistsError(f"{name} is a file, not a folder to write into")
        names = self._names(self.path)
        if names - {CHECKPOINTS} and SETTINGS_FILE not in names:
            raise FileExistsError(f"{name} exists and holds no run of ivtp batch; choose another folder")

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that the run in this folder was begun with; None if there is no run.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        if not self._files.exists(self._settings):
            return None
        try:
            return dict(json.loads(self._files.cat_file(self._settings))["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.name}/{SETTINGS_FILE} is damaged ({error}); remove the folder or choose another"
            ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a second command out of a folder on this machine's disks.

        Raises
        ------
        FileExistsError
            If another command answers into the folder.
        """
        self._made = self._made or not self._files.exists(self.path)
        self._files.makedirs(self.checkpoints, exist_ok=True)
        lock = FileLock(f"{self.checkpoints}/lock", blocking=False) if self.is_local else nullcontext()
        try:
            with lock:
                yield
        except Timeout as error:
            raise FileExistsError(f"another ivtp batch answers into {self.name}; wait until it has ended") from error

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write `_run.json`, complete or not at all.

        Parameters
        ----------
        about : mapping
            What describes the run; `about["settings"]` are compared when a run continues.
        """
        partial = f"{self.checkpoints}/{SETTINGS_FILE}"
        self._files.pipe_file(partial, json.dumps(about, indent=2, ensure_ascii=False).encode() + b"\n")
        self._files.mv(partial, self._settings)

    def forget_if_empty(self) -> None:
        """Remove the run if no row is answered: what failed then was no run.

        Other files stay, and so does a folder that was here before. An error is logged, not raised: the failure of the
        run is what has to be told.
        """
        try:
            if self._answers():
                return
            self._files.rm_file(self._settings)
            self._files.rm(self.checkpoints, recursive=True)
            if self._made and not self._names(self.path):
                self._files.rmdir(self.path)
        except Exception as error:
            _LOG.warning("a run without answers could not be removed from %s: %s", self.name, error)

    def settle(self, rows: int) -> np.ndarray:
        """Return which rows are answered, after what a kill left behind is removed.

        A file counts if its checkpoint does, and the other way round. A file without a checkpoint was being written. A
        checkpoint without a file that can be read stands for a file that was lost. A file whose rows others have was
        written by a process that outlived its command.

        Parameters
        ----------
        rows : int
            Number of all rows.

        Returns
        -------
        array of bool
        """
        answered = np.zeros(rows, dtype=bool)
        committed = {name.removesuffix(".parquet") for name in self._names(self.checkpoints) if _is_committed(name)}
        kept = set()
        for name in self._answers():
            shard = _shard(name)
            numbers = self._numbers(name) if shard in committed else None
            if numbers is None or not len(numbers) or numbers.max() >= rows or answered[numbers].any():
                self._files.rm_file(f"{self.path}/{name}")
            else:
                answered[numbers] = True
                kept.add(shard)
        for name in self._names(self.checkpoints):
            if name.endswith(".parquet") and name.removesuffix(".parquet") not in kept:
                self._files.rm_file(f"{self.checkpoints}/{name}")
        return answered

    def count_errors(self) -> tuple[int, str | None]:
        """Count the rows with an error, and return the error of the first of these rows."""
        count, first = 0, (-1, None)
        for name in self._answers():
            table = self._read(name, ["row", "error"])
            table = table.filter(pa.compute.is_valid(table["error"]))
            count += len(table)
            for row, error in zip(table["row"].to_pylist(), table["error"].to_pylist(), strict=True):
                if first[0] == -1 or row < first[0]:
                    first = row, error
        return count, first[1]

    def _numbers(self, name: str) -> np.ndarray | None:
        """Return the rows of a file; None if it is damaged."""
        try:
            return self._read(name, ["row"])["row"].to_numpy()
        except (pa.ArrowException, OSError):
            return None

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        with self.arrow.open_input_file(f"{self.path}/{name}") as file:  # PyArrow would interpret a path
            return pq.read_table(file, columns=columns)

    def _answers(self) -> list[str]:
        return sorted(name for name in self._names(self.path) if name.startswith("answers-"))

    def _names(self, folder: str) -> set[str]:
        self._files.invalidate_cache()
        if not self._files.isdir(folder):
            return set()
        return {entry.rstrip("/").rpartition("/")[2] for entry in self._files.ls(folder, detail=False)}


def _is_committed(name: str) -> bool:
    return name.endswith(".parquet") and not name.endswith(".pending.parquet")


def _shard(name: str) -> str:
    """Return the name of a file's checkpoint: Ray Data adds a number to the names of the files that it writes."""
    return name.removesuffix(".parquet").rpartition("-")[0]
