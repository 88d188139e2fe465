"""A runner for the benchmark's commands that reports a user's mistake, or a stop, in one line without traceback."""

from collections.abc import Callable
from typing import Any

import typer

from benchmarks.quality.loop import Stopped


def run(main: Callable[..., Any]) -> None:
    """Run a command with the arguments of the command line."""
    try:
        typer.run(main)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
