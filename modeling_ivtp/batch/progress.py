"""Progress of all processes, as one of them reads it from the output's folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .folder import OutFolder
from .journal import journaled_rows

_BAR_SECONDS, _LINE_SECONDS = 1.0, 30.0


@dataclass
class Counter:
    """Counts the answered rows in finished shards and in journals.

    Parameters
    ----------
    folder : OutFolder
    rows, shard_rows, shards : int
    """

    folder: OutFolder
    rows: int
    shard_rows: int
    shards: int
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def done(self) -> int:
        """Return the number of rows that all processes have answered."""
        finished = self.folder.finished(self.shards)
        total = sum(min(self.shard_rows, self.rows - shard * self.shard_rows) for shard in finished)
        if not self.folder.unfinished.is_dir():
            return total
        for path in self.folder.unfinished.glob("*.jsonl"):
            shard = int(path.stem)
            if shard not in finished:
                total += self._journaled(shard)
        return total

    def _journaled(self, shard: int) -> int:
        path = self.folder.journal(shard)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return 0  # its shard has just been finished
        if self._seen.get(shard, (-1, 0))[0] != size:
            self._seen[shard] = size, journaled_rows(path)
        return self._seen[shard][1]


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} rows/s")


@contextmanager
def shown(counter: Counter, wanted: bool) -> Iterator[Callable[[], None]]:
    """Show the run's progress on standard error: a bar on a terminal, a line every half minute elsewhere.

    Yields
    ------
    callable
        Updates what is shown; cheap enough to be called after every batch.
    """
    if not wanted:
        yield lambda: None
        return
    console, before = Console(stderr=True), counter.done()
    if not console.is_terminal:
        yield _lines(counter, before)
        return
    columns = (
        TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("rows,"), _RowsPerSecond(),
        TimeRemainingColumn(),
    )  # fmt: skip
    # The estimate counts only rows that are answered from here on, not those of a run before.
    with Progress(*columns, console=console, speed_estimate_period=24 * 3600) as bar:
        task = bar.add_task("answering", total=counter.rows, completed=before)
        last = time.monotonic()

        def update() -> None:
            nonlocal last
            if time.monotonic() - last >= _BAR_SECONDS:
                last = time.monotonic()
                bar.update(task, completed=counter.done())

        yield update
        bar.update(task, completed=counter.done())


def _lines(counter: Counter, before: int) -> Callable[[], None]:
    began = last = time.monotonic()

    def update() -> None:
        nonlocal last
        seconds = time.monotonic()
        if seconds - last < _LINE_SECONDS:
            return
        last, done = seconds, counter.done()
        rate = (done - before) / (seconds - began)
        left = f"{rate:.3g} rows/s, about {_duration((counter.rows - done) / rate)} left" if rate else "no rate yet"
        print(f"ivtp: {done:,} of {counter.rows:,} rows, {left}", file=sys.stderr, flush=True)

    return update


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
