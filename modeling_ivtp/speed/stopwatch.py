"""Timing of one answer: all of it, up to its first token, and what choosing visual tokens takes of that."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..model.labels import TEXT_TOWER, timed_by


@dataclass(frozen=True)
class Taken:
    """Seconds that a batch took.

    Attributes
    ----------
    answer : float
        From pixels to the last token.
    prefill : float
        From pixels to the first token.
    selection : float
        What the method needs of the prefill to choose: scores, and the question's words where they guide it.
    """

    answer: float = 0.0
    prefill: float = 0.0
    selection: float = 0.0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.answer + other.answer, self.prefill + other.prefill, self.selection + other.selection)


class Stopwatch:
    """Times the labelled work of a model (`modeling_ivtp.model.labels`).

    It is a timer of its own, because `torch.profiler` records every operation: on a CPU that adds a tenth to a prompt
    and a fifth to decoding, and reading the profile takes longer than the work. On a GPU it records events in the
    stream, so that nothing waits, and reads them when asked.
    """

    def __init__(self) -> None:
        self._running: list[str] = []
        self._gpu = False
        self.restart()

    def restart(self) -> None:
        """Forget what was timed so far."""
        self.first_token: float | None = None
        self._selection: list[tuple[Any, Any]] = []
        self._words: list[tuple[Any, Any]] = []

    @property
    def selection(self) -> float:
        """Seconds that choosing took, CLIP's text tower included."""
        return self._total(self._selection)

    @property
    def words(self) -> float:
        """Seconds of that in CLIP's text tower."""
        return self._total(self._words)

    def _total(self, spans: list[tuple[Any, Any]]) -> float:
        if not self._gpu:
            return sum(end - start for start, end in spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _moment(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def _time(self, name: str) -> Iterator[None]:
        """Time labelled work; work inside other work of its kind is not counted twice."""
        kinds = [] if self._running else [self._selection]
        if name == TEXT_TOWER and name not in self._running:
            kinds.append(self._words)
        self._running.append(name)
        start = self._moment() if kinds else None
        try:
            yield
        finally:
            self._running.pop()
            if kinds:
                span = start, self._moment()
                for spans in kinds:
                    spans.append(span)

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Time a model's labelled work, and note when it has read the prompt.

        All labels count as choosing. The pseudo-CLS tokens' row in the layers' other products has no label. No prompt
        is replayed as a CUDA graph meanwhile, since nothing inside a graph can be timed.
        """
        self._gpu = model.device.type == "cuda"

        def note_first_token(*_: Any) -> None:
            self.first_token = self.first_token or time.perf_counter()

        # A model with a hook replays nothing.
        hook = model.model.register_forward_hook(note_first_token)
        try:
            with timed_by(self._time):
                yield
        finally:
            hook.remove()
