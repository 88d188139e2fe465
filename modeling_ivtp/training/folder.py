"""The folder of a run: its settings, checkpoints, log, and in the end the model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..files.folder import check_target

SETTINGS, LOG, MODEL, PRUNER = "run.json", "log.jsonl", "model", "pruner"
_HALF_SETTINGS = f".{SETTINGS}."


class RunFolder:
    """A folder with one run.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.path / MODEL

    @property
    def pruner(self) -> Path:
        """The folder of the finished modules of a trained method."""
        return self.path / PRUNER

    def check(self, settings: dict[str, Any], needed_bytes: int = 0) -> bool:
        """Check that a run may be begun here, or goes on; nothing is written.

        Returns
        -------
        bool
            Whether it was begun before.

        Raises
        ------
        ValueError
            If another run was begun here.
        OSError
            If the folder holds something else, cannot be written, or has no room.
        """
        file = self.path / SETTINGS
        if not file.is_file():
            check_target(self.path, needed_bytes=needed_bytes, overwrite=self._holds_half_settings_alone())
            return False
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        differ = sorted(name for name in {*begun, *settings} if begun.get(name) != settings.get(name))
        if differ:
            name = differ[0]
            raise ValueError(
                f"another run was begun in {self.path}: {name}={begun.get(name)!r} there, {settings.get(name)!r} here"
                f"{f' (and {len(differ) - 1} more)' if differ[1:] else ''}; choose another folder"
            )
        return True

    def _holds_half_settings_alone(self) -> bool:
        """Return whether a process that was killed while it began left nothing else here."""
        return self.path.is_dir() and all(path.name.startswith(_HALF_SETTINGS) for path in self.path.iterdir())

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the settings of a new run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for half in self.path.glob(f"{_HALF_SETTINGS}*"):
            half.unlink()
        write_whole(self.path / SETTINGS, json.dumps(settings, indent=1) + "\n")

    def checkpoint(self, clean: bool) -> str | None:
        """Return the last whole checkpoint; halves that an interruption left are removed if `clean`.

        `Trainer` writes its state last, so a checkpoint with the state of its step is whole.
        """
        whole = []
        for path in self.path.glob("checkpoint-*"):
            if _has_state(path):
                whole.append(path)
            elif clean:
                shutil.rmtree(path)
        return str(max(whole, key=_step)) if whole else None

    def log(self, history: list[dict[str, Any]]) -> None:
        """Write the log, one JSON object for each entry."""
        write_whole(self.path / LOG, "".join(json.dumps(entry) + "\n" for entry in history))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _has_state(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the state of its step; a full disk may leave an empty file."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return bool(state["global_step"] == _step(checkpoint))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def write_whole(file: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
