"""A log of answers on disk, from which an interrupted evaluation continues."""

import hashlib
import json
from collections import defaultdict
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.kept_counts import Kept, joined
from modeling_ivtp.speed.stopwatch import Taken


class Answers(NamedTuple):
    """Answers of a row, the seconds they took, and tokens kept of each picture where the number adapts."""

    said: list[str]
    taken: Taken
    kept: Kept


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
        self._answers: dict[str, dict[int, Answers]] = defaultdict(dict)

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
            self._answers[entry["row"]][entry["batch"]] = Answers(entry["said"], Taken(*entry["taken"]), entry["kept"])
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def has(self, row: str, batch: int) -> bool:
        """Return whether a row has answered a batch."""
        return batch in self._answers[row]

    def add(self, row: str, batch: int, answers: Answers) -> None:
        """Log a row's answers to a batch."""
        entry = {
            "row": row,
            "batch": batch,
            "taken": astuple(answers.taken),
            "said": answers.said,
            "kept": answers.kept,
        }
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        self._answers[row][batch] = answers

    def answers(self, row: str) -> Answers:
        """Return all answers of a row in order."""
        batches = [batch for _, batch in sorted(self._answers[row].items())]
        return Answers(
            [answer for batch in batches for answer in batch.said],
            sum((batch.taken for batch in batches), Taken()),
            joined([batch.kept for batch in batches]),
        )

    def finished(self) -> None:
        """Delete the file, once the results are written."""
        self.path.unlink(missing_ok=True)
