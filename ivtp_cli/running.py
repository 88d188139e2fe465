"""Run a command: an error is one line on standard error and exit status 1."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from .app import app
from .options import Invocation

# Errors whose message says what the person can do; any other error is a mistake of this program, and says so.
_EXPECTED = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Everything after `ivtp`; default: the process's own.

    Returns
    -------
    int
        The exit status. 0: done. 1: an error, in one line on standard error. 130: stopped by Ctrl-C.
    """
    invocation = Invocation(sys.argv[1:] if arguments is None else arguments)
    try:
        with _warnings_as_lines():
            status = app(invocation.arguments, prog_name="ivtp", standalone_mode=False, obj=invocation)
    except KeyboardInterrupt:
        status = 130
    except typer.Abort:  # Ctrl-C or an end of input at a question
        print(file=sys.stderr)
        status = 130
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        else:
            print(f"ivtp: {_one_line(error)}", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0


def _one_line(error: BaseException) -> str:
    """Return an error's message without line breaks and error numbers."""
    text = str(error)
    if hasattr(error, "format_message"):  # how typer and click word a wrong option
        text = _usage(error, error.format_message())
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, _EXPECTED) or hasattr(error, "format_message"):
        return text
    return f"{type(error).__name__}: {text} (this should not happen; --debug shows where)"


def _usage(error: BaseException, text: str) -> str:
    """Name the value in typer's words for a wrong option: newer versions have pydantic's, which leave it out."""
    errors = getattr(error.__cause__, "errors", None)
    if errors is None:
        return text
    named = text.replace("Input should be ", f"{errors()[0]['input']!r}; allowed: ", 1)
    return named.partition(", unable to parse")[0]


def _warn(message: object) -> None:
    print(f"ivtp: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        _warn(message)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show each warning of this package or a library as one line, be it a Python warning or one in the log."""
    log, handler = logging.getLogger("modeling_ivtp"), _LogHandler(logging.WARNING)
    propagated = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated
