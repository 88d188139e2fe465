"""A log of answers on disk, from which an interrupted evaluation continues."""

import hashlib
import json
from collections import defaultdict
from dataclasses import astuple
from pathlib import Path
from typing import Any

from modeling_ivtp.speed.stopwatch import Taken


class AnswerLog:
    """A file of lines, one for each row and batch; a line that an interruption cut off is asked again.

    Parameters
    ----------
    folder : Path
    settings : dict
        Everything that the answers depend on; an evaluation with other settings has another file.
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
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self._answers[entry["row"]][entry["batch"]] = (entry["said"], Taken(*entry["taken"]))
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def has(self, row: str, batch: int) -> bool:
        """Return whether a row has answered a batch."""
        return batch in self._answers[row]

    def add(self, row: str, batch: int, answers: list[str], taken: Taken) -> None:
        """Log a row's answers to a batch, and the seconds that they took."""
        entry = {"row": row, "batch": batch, "taken": astuple(taken), "said": answers}
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        self._answers[row][batch] = (answers, taken)

    def answers(self, row: str) -> tuple[list[str], Taken]:
        """Return all answers of a row in order, and the seconds that they took."""
        batches = [batch for _, batch in sorted(self._answers[row].items())]
        return [answer for answers, _ in batches for answer in answers], sum((taken for _, taken in batches), Taken())

    def finished(self) -> None:
        """Delete the file, once the results are written."""
        self.path.unlink(missing_ok=True)
