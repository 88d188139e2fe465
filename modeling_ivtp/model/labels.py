"""Labels for the work that pruning adds to a prompt, so that a profiler or a stopwatch can tell it apart."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch.profiler import record_function

CHOOSE = "ivtp::choose"
"""A pruner chooses, or its guide is made: the pseudo CLS, or what compares patches with the question."""
SCORE = "ivtp::score"
"""A layer computes what only scoring needs: head averages of its map, and the attention of pseudo-CLS tokens."""
TEXT_TOWER = "ivtp::text_tower"
"""CLIP's text tower reads the question."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Timer = Callable[[str], AbstractContextManager[Any]]

# A context variable, so that a stopwatch sees the work of its own thread only.
_timer: ContextVar[Timer | None] = ContextVar("ivtp_timer", default=None)


def label(name: str) -> AbstractContextManager[Any]:
    """Return a context that labels the work inside for `torch.profiler` and for the timer in force.

    Without either it does nothing. `record_function` alone would cost some microseconds each time, and in compiled code
    labels are left out.

    Parameters
    ----------
    name : str
        `CHOOSE`, `SCORE` or `TEXT_TOWER`. Labelled work may contain other labelled work.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    timer = _timer.get()
    if timer is not None:
        return timer(name)
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def labelled(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that labels all the work of a function; see `label`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with label(name):
                return function(*args, **kwargs)

        return wrapper

    return decorate


@contextmanager
def timed_by(timer: Timer) -> Iterator[None]:
    """Let a timer hear of all labelled work of this thread inside the context.

    Parameters
    ----------
    timer : callable
        Gets a label's name and returns the context in which the work runs.
    """
    token = _timer.set(timer)
    try:
        yield
    finally:
        _timer.reset(token)
