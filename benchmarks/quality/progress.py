"""Progress of an evaluation, with the time left."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Asking:
    """A progress bar with the time left; without a terminal, a line every half minute."""

    def __init__(self, total: int, every: float = 30.0) -> None:
        self.total, self.every, self.done, self.fresh = total, every, 0, 0
        console = Console(stderr=True)
        columns = (
            TextColumn("asking"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[row]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Asking":
        self.start = self.last = time.monotonic()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("asking", total=self.total, row="")
        return self

    def advance(self, answers: int, new: bool, row: str) -> None:
        """Count answers; those from an earlier run are left out of the estimate of the time left."""
        self.done += answers
        self.fresh += answers * new
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, row=row)
        elif now - self.last > self.every and self.fresh:
            self.last = now
            left = (now - self.start) / self.fresh * (self.total - self.done)
            print(f"{self.done / self.total:.0%} asked, {left / 60:.0f} min left", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
