"""Answer requests that wait at the same time as one batch, and pass their text on token by token."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

GATHERING = 0.005
"""Seconds for which the first request of a batch waits for others."""
MAX_GATHERED = 32
"""Most requests that are taken from the queue at once; the handler divides them into batches."""


class Listener:
    """The text of one answer as it grows, up to the first of the `stops`.

    Text that may still change is held back: white space at its end, and what may be the beginning of a stop.

    Parameters
    ----------
    stops : sequence of str
        Texts before which the answer ends.
    send : callable
        Takes each new piece of text, in the thread that answers.
    """

    def __init__(self, stops: Sequence[str], send: Callable[[str], object]) -> None:
        self.stops, self.sent, self.finished = [stop for stop in stops if stop], "", False
        self._send, self._text = send, ""
        self._decoder: DecodeStream | None = None

    def begin(self) -> None:
        """Expect the first token; raises RuntimeError if the answer began before, since text cannot be taken back."""
        if self.sent:
            raise RuntimeError("the answer broke off")
        self._text, self._decoder = "", DecodeStream(skip_special_tokens=True)

    def put(self, token: int, tokenizer: Any) -> None:
        """Take one token of the answer."""
        if self.finished or self._decoder is None:
            return
        try:
            piece = self._decoder.step(tokenizer.backend_tokenizer, token)
        except Exception:  # bytes that are no text; the whole answer is decoded in the end
            self._decoder = None
            return
        self._text = (self._text + (piece or "")).lstrip()
        text, self.finished = cut_at(self._text, self.stops)
        self._pass_on(text if self.finished else text[: len(text) - self._unsure(text)].rstrip())

    def end(self, text: str) -> None:
        """Pass on the rest of the whole answer."""
        self._pass_on(cut_at(text, self.stops)[0])

    def _unsure(self, text: str) -> int:
        """Return how many characters at the end may begin a stop."""
        beginnings = (stop[:length] for stop in self.stops for length in range(1, min(len(stop), len(text) + 1)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.sent) and text.startswith(self.sent):
            piece, self.sent = text[len(self.sent) :], text
            self._send(piece)


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first of the stops, and whether there is one."""
    cuts = [text.find(stop) for stop in stops if stop and stop in text]
    return (text[: min(cuts)], True) if cuts else (text, False)


class _Streamer(BaseStreamer, StoppingCriteria):
    """Hands each token of a batch to its row's listener, and ends rows whose listener has finished."""

    def __init__(self, listeners: Sequence[Listener | None], tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer, self._ends, self._rows = tokenizer, ends, len(listeners)
        self._listeners = {row: listener for row, listener in enumerate(listeners) if listener is not None}
        self._ended: set[int] = set()
        self._prompt = True
        for listener in self._listeners.values():
            listener.begin()

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # `generate` passes the prompt first
            self._prompt = False
            return
        tokens = value.tolist()
        for row, listener in self._listeners.items():
            if tokens[row] in self._ends:
                self._ended.add(row)
            if row not in self._ended:
                listener.put(tokens[row], self._tokenizer)

    def end(self) -> None:
        """Do nothing: listeners get the rest of their text with the whole answer."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        finished = {row for row, listener in self._listeners.items() if listener.finished}
        return torch.tensor([row in finished for row in range(self._rows)], device=input_ids.device)


@dataclass(frozen=True)
class _Entry:
    job: Any
    listener: Listener | None
    future: Future[dict[str, Any]] = field(default_factory=Future)

    def finish(self, answer: dict[str, Any] | Exception) -> None:
        if isinstance(answer, Exception):
            self.future.set_exception(answer)
            return
        if self.listener is not None:
            self.listener.end(answer["generated_text"])
        self.future.set_result(answer)


class Batcher:
    """A thread that answers what waits, together.

    Parameters
    ----------
    handler : EndpointHandler
    """

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._waiting: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="answers").start()

    def submit(self, job: Any, listener: Listener | None = None) -> Future[dict[str, Any]]:
        """Queue a job of `handler.read`; the future holds the handler's answer or error."""
        entry = _Entry(job, listener)
        self._waiting.put(entry)
        return entry.future

    def _work(self) -> None:
        while True:
            gathered = [self._waiting.get()]
            time.sleep(GATHERING)
            with contextlib.suppress(queue.Empty):
                while len(gathered) < MAX_GATHERED:
                    gathered.append(self._waiting.get_nowait())
            self._answer([entry for entry in gathered if entry.future.set_running_or_notify_cancel()])

    def _answer(self, entries: Sequence[_Entry]) -> None:
        tokenizer, ends = self._handler.processor.tokenizer, self._handler.ends

        def extras(places: Sequence[int]) -> dict[str, Any]:
            listeners = [entries[place].listener for place in places]
            if not any(listeners):
                return {}
            streamer = _Streamer(listeners, tokenizer, ends)
            return {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([streamer])}

        try:
            for place, answer in self._handler.answers([entry.job for entry in entries], extras):
                entries[place].finish(answer)
        except Exception as error:
            for entry in entries:
                if not entry.future.done():
                    entry.finish(error)
