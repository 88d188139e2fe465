"""What the person at the terminal sees, and does not see, of long work."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers.utils import logging as transformers_logging

_OURS = logging.getLogger(__name__.partition(".")[0])


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers' reports and this package's own out of the way, and progress bars unless `bars`.

    Errors still are raised.
    """
    verbosity, enabled = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    level = _OURS.level
    transformers_logging.set_verbosity_error()
    _OURS.setLevel(logging.ERROR)
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        _OURS.setLevel(level)
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on standard error; yields the function that moves it."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda nbytes: None
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("writing", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def steps_bar(total: int, what: str, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar over steps on standard error; yields the function that moves it by one."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def told_command(program: str, arguments: Sequence[str]) -> str:
    """A command as results tell it to others: where they went is this machine's business."""
    kept, skip = [], False
    for argument in arguments:
        joined = argument.startswith(("--out=", "-o")) and argument != "-o"
        if not skip and argument not in ("--out", "-o") and not joined:
            kept.append(argument)
        skip = not skip and argument in ("--out", "-o")
    return f"{program} {shlex.join(kept)}"
