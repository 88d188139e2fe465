"""The output's folder: which shards are finished, who works on which, and the settings all of them share."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .answers import sync

_POLL_SECONDS = 0.5
SETTINGS_FILE = "_run.json"


class OutFolder:
    """Where answers go.

    `answers-00003-of-00040.parquet` is a finished shard; `_unfinished/` holds the locks of shards and the journals of
    those that are worked on, and is gone in the end. Readers of Parquet skip names that begin with `_`, so the folder
    can be read as one table.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If it is a file, or a folder that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path / "_unfinished"
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file, not a folder to write into")
        if path.is_dir() and not (path / SETTINGS_FILE).exists():
            others = [one.name for one in path.iterdir() if one.name != self.unfinished.name]
            # Another process of this run may have written the settings since.
            if others and not (path / SETTINGS_FILE).exists():
                raise FileExistsError(f"{path} exists and holds no run of ivtp batch; choose another folder")

    def settings(self) -> dict[str, Any] | None:
        """What the run in this folder was begun with; None if there is none.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        file = self.path / SETTINGS_FILE
        if not file.exists():
            return None
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            return dict(told["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove the folder or choose another") from error

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write the settings, unless another process was quicker; `about["settings"]` are those that are compared."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        file = self.path / SETTINGS_FILE
        with FileLock(self.unfinished / "run.lock"):
            if file.exists():
                return
            temporary = self.unfinished / f"{SETTINGS_FILE}.partial"
            temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            sync(temporary)
            os.replace(temporary, file)
            sync(self.path)

    def answers(self, shard: int, shards: int) -> Path:
        """The file of a finished shard."""
        return self.path / f"answers-{shard:05d}-of-{shards:05d}.parquet"

    def journal(self, shard: int) -> Path:
        """The file of a shard that is worked on."""
        return self.unfinished / f"{shard:05d}.jsonl"

    def finished(self, shards: int) -> set[int]:
        """Numbers of the finished shards."""
        names = {entry.name for entry in os.scandir(self.path)} if self.path.is_dir() else set()
        return {shard for shard in range(shards) if self.answers(shard, shards).name in names}

    def claim(self, shards: int, start: int) -> Iterator[int | None]:
        """Shards to answer, one after the other, until all are finished, by whomever.

        A shard is locked while the caller works on it, by a lock of the system's that ends with the process, however
        that ends. None is yielded now and then while others work on all that is left.

        Parameters
        ----------
        shards : int
        start : int
            The shard to look at first; where processes start at different places they seldom meet.
        """
        while len(finished := self.finished(shards)) < shards:
            worked = False
            # Whoever saw the last shard finished first has removed the folder.
            self.unfinished.mkdir(parents=True, exist_ok=True)
            for shard in sorted(set(range(shards)) - finished, key=lambda number: (number - start) % shards):
                if self.answers(shard, shards).exists():
                    continue
                lock = FileLock(self.unfinished / f"{shard:05d}.lock")
                try:
                    lock.acquire(blocking=False)
                except (Timeout, FileNotFoundError):
                    continue
                try:
                    # Its owner may have finished it between the look and the lock.
                    if not self.answers(shard, shards).exists():
                        worked = True
                        yield shard
                finally:
                    lock.release()
            if not worked:
                yield None
                time.sleep(_POLL_SECONDS)

    def tidy(self) -> None:
        """Remove what only unfinished work needs; every process does so in the end, and none minds the others."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
