"""The answers of an unfinished evaluation: a line for each batch, on disk before the next batch begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..batch.answers import Answered


class Journal:
    """The answered batches of one benchmark.

    A process that is killed while it writes leaves half a line. That line is cut off, and its batch is answered again.

    Parameters
    ----------
    path : Path
        The file; created if it does not exist.

    Attributes
    ----------
    batches : dict of int to list of Answered
        The answers of each batch, by the batch's number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: dict[int, list[Answered]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in _complete(content):
            entry = _read(line)
            if entry is None:
                break  # lines after a damaged one cannot be trusted to be whole
            self.batches[entry[0]] = entry[1]
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
        """Write a batch; it is on disk when this returns."""
        answered = list(rows)
        line = json.dumps({"batch": batch, "rows": [row.values() for row in answered]})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.batches[batch] = answered


def _complete(content: bytes) -> Iterator[bytes]:
    return (line for line in content.splitlines(keepends=True) if line.endswith(b"\n"))


def _read(line: bytes) -> tuple[int, list[Answered]] | None:
    try:
        entry: Any = json.loads(line)
        return int(entry["batch"]), [Answered(*values) for values in entry["rows"]]
    except (ValueError, TypeError, KeyError):
        return None
