"""Answers on disk as they come, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
from collections import defaultdict
from dataclasses import astuple
from pathlib import Path
from typing import Any

from modeling_ivtp.speed.stopwatch import Taken


class AnswerLog:
    """A file of lines, one for each row and batch; a line that was cut off by an interruption is asked again.

    Parameters
    ----------
    folder : Path
    settings : dict
        What the answers depend on; another evaluation has another file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"answers-{name}.partial.jsonl"
        self._answers: dict[str, dict[int, tuple[list[str], Taken]]] = defaultdict(dict)

    def __enter__(self) -> "AnswerLog":
        self._file = self.path.open("a+b")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                told = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self._answers[told["row"]][told["batch"]] = (told["said"], Taken(*told["taken"]))
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def has(self, row: str, batch: int) -> bool:
        """Whether a row has answered a batch."""
        return batch in self._answers[row]

    def add(self, row: str, batch: int, said: list[str], taken: Taken) -> None:
        """Note what a row said to a batch."""
        line = {"row": row, "batch": batch, "taken": astuple(taken), "said": said}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._answers[row][batch] = (said, taken)

    def answers(self, row: str) -> tuple[list[str], Taken]:
        """All answers of a row in order, and what they took."""
        parts = [part for _, part in sorted(self._answers[row].items())]
        return [one for said, _ in parts for one in said], sum((taken for _, taken in parts), Taken())

    def finished(self) -> None:
        """The results are written: the file goes."""
        self.path.unlink(missing_ok=True)
