"""What the commands of the benchmark share: a mistake of the person's, or a stop, is one line and no traceback."""

from collections.abc import Callable
from typing import Any

import typer

from benchmarks.quality.loop import Stopped


def run(main: Callable[..., Any]) -> None:
    """Run a command with the arguments it was called with."""
    try:
        typer.run(main)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
