"""What an answer takes: all of it, up to its first token, and for choosing what stays."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..model import attention_maps
from ..model.pruner import PrunerWrapper
from ..model.pseudo_cls_attention import PseudoCLSAttention
from ..model.rollout import DecoderAttentionRecord


@dataclass(frozen=True)
class Taken:
    """Seconds of a batch.

    Attributes
    ----------
    answer : float
        From pixels to the last token.
    prefill : float
        From pixels to the first.
    selection : float
        Of that, what the method takes to choose: scores, and the question's words where they guide it.
    """

    answer: float = 0.0
    prefill: float = 0.0
    selection: float = 0.0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.answer + other.answer, self.prefill + other.prefill, self.selection + other.selection)


class Stopwatch:
    """Times what a model does while it is watched.

    On a GPU it notes moments in the stream of work, so that nothing is held up, and reads them when asked.
    """

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._gpu = False
        self.restart()

    def restart(self) -> None:
        """Forget what was timed so far."""
        self.first_token: float | None = None
        self._spans: dict[str, list[tuple[Any, Any]]] = {"selection": [], "words": []}

    @property
    def selection(self) -> float:
        """Seconds that choosing took, the question's words among them."""
        return self._total("selection")

    @property
    def words(self) -> float:
        """Seconds of that in CLIP's text tower."""
        return self._total("words")

    def _total(self, what: str) -> float:
        if not self._gpu:
            return sum(end - start for start, end in self._spans[what])
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans[what]) / 1000

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment

    def timing(self, work: Callable[..., Any], what: str = "selection") -> Callable[..., Any]:
        """`work`, whose time counts; what runs inside of it is not counted twice."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if what in self._running:
                return work(*args, **kwargs)
            self._running.add(what)
            start = self._now()
            try:
                return work(*args, **kwargs)
            finally:
                self._spans[what].append((start, self._now()))
                self._running.discard(what)

        return timed

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Time a model's choices, and note when its language model has read the prompt; undone when left.

        Counted are scores and selection, the question's words, and what layers do for scoring alone: heads of maps that
        are added up, and the observers' own attention. The observers' row in the other products is not.
        """
        inner = model.model
        self._gpu = model.device.type == "cuda"
        changed = [
            (inner, "applied_pruner", _Timed(inner.pruner, self)),
            # What guides the choice by the question is part of choosing.
            (inner, "_reference", self.timing(inner._reference)),
            (inner, "_in_prompt", self.timing(inner._in_prompt)),
            (inner, "text_features", self.timing(inner.text_features, "words")),
            # So is what layers do for it alone.
            (attention_maps, "add_heads", self.timing(attention_maps.add_heads)),
            (PseudoCLSAttention, "attend", self.timing(PseudoCLSAttention.attend)),
            (DecoderAttentionRecord, "attend", self.timing(DecoderAttentionRecord.attend)),
        ]

        def read(*_: Any) -> None:
            self.first_token = self.first_token or time.perf_counter()

        hook = inner.language_model.register_forward_hook(read)
        try:
            with ExitStack() as stack:
                for owner, name, value in changed:
                    stack.enter_context(_replaced(owner, name, value))
                yield
        finally:
            hook.remove()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute for a while; an object whose class has it gets rid of its own afterwards."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


class _Timed(PrunerWrapper):
    """A pruner whose choices are timed."""

    def __init__(self, pruner: Any, watch: Stopwatch) -> None:
        super().__init__(pruner)
        for moment in ("in_tower", "in_features", "in_prompt", "prepare", "in_decoder"):
            setattr(self, moment, watch.timing(getattr(pruner, moment)))
