"""What the person at the terminal sees, and does not see, of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers.utils import logging


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers' reports out of the way, and its progress bars unless `bars`; errors still are raised."""
    verbosity, enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


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
