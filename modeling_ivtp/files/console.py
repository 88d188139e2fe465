"""Progress bars for long work, and silence for what would disturb them."""

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
    """Silence the reports of transformers and of this package, and progress bars unless `bars`.

    Errors are raised all the same.
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
    """Show a bar over bytes on standard error; yields the function that moves it."""
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
    """Show a bar over steps on standard error; yields the function that moves it by one."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def shareable_command(program: str, arguments: Sequence[str]) -> str:
    """Return a command as results show it: without `--out`, which concerns this machine alone."""
    kept, skip = [], False
    for argument in arguments:
        joined = argument.startswith(("--out=", "-o")) and argument != "-o"
        if not skip and argument not in ("--out", "-o") and not joined:
            kept.append(argument)
        skip = not skip and argument in ("--out", "-o")
    return f"{program} {shlex.join(kept)}"
