"""What was answered of a shard that is not finished: a line for every batch, on disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .answers import Answered


class Journal:
    """The batches of one shard, kept by whoever holds its lock.

    A process that is killed while it writes leaves half a line; it is cut off, and its batch is answered again.

    Parameters
    ----------
    path : Path
        The file; made if there is none.

    Attributes
    ----------
    batches : dict of int to list of Answered
        What is there, by the number of the batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: dict[int, list[Answered]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in _complete(content):
            told = _read(line)
            if told is None:
                break  # what stands after a damaged line was written before it was known to be whole
            self.batches[told[0]] = told[1]
            whole += len(line)
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115, closed by __exit__
        self._file.truncate(whole)
        self._file.seek(whole)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, batch: int, rows: Iterable[Answered]) -> None:
        """Write a batch down; it is on disk when this returns."""
        answered = list(rows)
        line = json.dumps({"batch": batch, "rows": [one.values() for one in answered]})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.batches[batch] = answered


def journaled_rows(path: Path) -> int:
    """How many rows a journal tells of, which another process may be writing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0  # its shard was finished a moment ago
    told = (_read(line) for line in _complete(content))
    return sum(len(one[1]) for one in told if one is not None)


def _complete(content: bytes) -> Iterator[bytes]:
    return (line for line in content.splitlines(keepends=True) if line.endswith(b"\n"))


def _read(line: bytes) -> tuple[int, list[Answered]] | None:
    try:
        told: Any = json.loads(line)
        return int(told["batch"]), [Answered(*values) for values in told["rows"]]
    except (ValueError, TypeError, KeyError):
        return None
