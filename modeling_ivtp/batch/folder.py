"""The output's folder: finished shards, locks of those in work, and the settings that all of them share."""

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
    """The folder that answers are written to.

    `answers-00003-of-00040.parquet` is a finished shard. `_unfinished/` holds locks and journals of the shards in work,
    and is removed in the end. Readers of Parquet skip names that begin with `_`, so the folder can be read as one
    table.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If the path is a file, or a folder that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path / "_unfinished"
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file, not a folder to write into")
        if path.is_dir() and not (path / SETTINGS_FILE).exists():
            others = [entry for entry in path.iterdir() if entry.name != self.unfinished.name]
            # Meanwhile another process of this run may have written the settings.
            if others and not (path / SETTINGS_FILE).exists():
                raise FileExistsError(f"{path} exists and holds no run of ivtp batch; choose another folder")

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that the run in this folder was begun with; None if there is no run.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        file = self.path / SETTINGS_FILE
        if not file.exists():
            return None
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            return dict(about["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove the folder or choose another") from error

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write `_run.json`, unless another process was quicker.

        Parameters
        ----------
        about : mapping
            What describes the run; `about["settings"]` are compared when a run continues.
        """
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
        """Return the path of a finished shard's file."""
        return self.path / f"answers-{shard:05d}-of-{shards:05d}.parquet"

    def journal(self, shard: int) -> Path:
        """Return the path of the journal of a shard in work."""
        return self.unfinished / f"{shard:05d}.jsonl"

    def finished(self, shards: int) -> set[int]:
        """Return the numbers of the finished shards."""
        names = {entry.name for entry in os.scandir(self.path)} if self.path.is_dir() else set()
        return {shard for shard in range(shards) if self.answers(shard, shards).name in names}

    def claim(self, shards: int, start: int) -> Iterator[int | None]:
        """Yield shards to answer, until all shards are finished by this process or others.

        A shard is locked while the caller works on it. The lock is the operating system's and ends with the process,
        even if that is killed. While other processes work on all remaining shards, None is yielded now and then.

        Parameters
        ----------
        shards : int
        start : int
            The shard to look at first; processes that start at different shards seldom compete.
        """
        while len(finished := self.finished(shards)) < shards:
            claimed = False
            # The process that first saw all shards finished has removed the folder.
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
                    # Its owner may have finished it just before the lock was free.
                    if not self.answers(shard, shards).exists():
                        claimed = True
                        yield shard
                finally:
                    lock.release()
            if not claimed:
                yield None
                time.sleep(_POLL_SECONDS)

    def tidy(self) -> None:
        """Remove the files of unfinished work; every process may do so in the end."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
