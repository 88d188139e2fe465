"""Timing arms against each other: every repeat runs all of them, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..model.compat import CACHE, cache_of
from ..serving.answering import kv_bytes
from .stopwatch import Stopwatch

PARTS = ("tower", "prefill", "decode", "end_to_end")
"""Seconds: the vision tower alone; pixels to first token; one further token; pixels to last token."""


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes
    ----------
    name : str
    model : LlavaForConditionalGeneration or IVTPLlavaForConditionalGeneration
    applied : callable
        Makes the context in which it prunes as it is to.
    cache : StaticCache, optional
        To answer with, over and over; default: a dynamic one that grows.
    graphs : Graphs, optional
        What it replays.
    """

    name: str
    model: Any
    applied: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache: Any = None
    graphs: Any = None


class _Moments(StoppingCriteria):
    """Notes when tokens come, and never stops anything."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.wait()
        self.moments.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def run(arm: Arm, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, float]:
    """One run of one arm.

    Parameters
    ----------
    arm : Arm
    inputs : mapping
        Of ours; a stock model gets what it knows.
    new_tokens : int
        Length of the answer, at least 2.

    Returns
    -------
    dict
        `PARTS`, `kv_bytes` at the end, and on a GPU `peak_bytes`, the most that was taken beside weights.
    """
    ours = hasattr(arm.model, "pruning")
    given = {name: value for name, value in inputs.items() if ours or not name.startswith("clip_")}
    device = arm.model.device
    wait = _wait_for(device)
    if arm.cache is not None:
        arm.cache.reset()
        given[CACHE] = arm.cache
    if ours:
        arm.model.model.instruction_cache.clear()  # every question is a new one
    with arm.applied():
        wait()
        start = time.perf_counter()
        arm.model.model.get_image_features(given["pixel_values"])
        wait()
        tower = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        moments = _Moments(wait)
        start = time.perf_counter()
        output = arm.model.generate(
            **given,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([moments]),
            return_dict_in_generate=True,
        )
        wait()
    first, last = moments.moments[0], moments.moments[-1]
    told = {
        "tower": tower,
        "prefill": first - start,
        "decode": (last - first) / (len(moments.moments) - 1),
        "end_to_end": last - start,
        "kv_bytes": float(kv_bytes(cache_of(output))),
    }
    if device.type == "cuda":
        # What lies there already, other arms' recordings among it, is not this run's.
        told["peak_bytes"] = float(torch.cuda.max_memory_allocated(device) - before)
    return told


def _wait_for(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else _no_wait


def _no_wait() -> None:
    """A CPU is done when it returns."""


def interleaved(
    arms: Sequence[Arm],
    inputs: Mapping[str, Any],
    *,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, float]]]:
    """Run all arms by turns, after two runs of each to warm up; every other turn goes backwards.

    Returns
    -------
    dict of str to list of dict
        By arm: what `run` tells, one entry per repeat, paired by place.
    """
    for arm in (*arms, *arms):
        run(arm, inputs, new_tokens)
        advance()
    told: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for turn in range(repeats):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            told[arm.name].append(run(arm, inputs, new_tokens))
            advance()
    return told


@torch.inference_mode()
def selection_shares(arm: Arm, inputs: Mapping[str, Any], repeats: int = 5) -> tuple[float, float]:
    """Shares of the prefill that choosing takes, and that CLIP's text tower takes for it: medians of some runs."""
    wait = _wait_for(arm.model.device)
    shares = []
    for _ in range(repeats):
        watch = Stopwatch()
        arm.model.model.instruction_cache.clear()
        with arm.applied(), watch.watching(arm.model):
            wait()
            start = time.perf_counter()
            arm.model(**inputs, use_cache=True, logits_to_keep=1)
            wait()
            whole = time.perf_counter() - start
            shares.append(((watch.selection - watch.words) / whole, watch.words / whole))
    choosing, words = np.median(shares, axis=0)
    return float(choosing), float(words)


FEWEST = 6
"""Pairs from which a bootstrap interval covers what it says."""


def ratio(baseline: Sequence[float], arm: Sequence[float], *, resamples: int = 2000) -> tuple[float, float, float]:
    """How many times faster an arm is: the median over pairs, and a 95% bootstrap interval of it.

    Of fewer pairs than `FEWEST`, their range: a bootstrap of so few is too narrow.

    Parameters
    ----------
    baseline, arm : sequence of float
        Seconds, paired by place.
    """
    pairs = np.asarray(baseline) / np.asarray(arm)
    if len(pairs) < FEWEST:
        return float(np.median(pairs)), float(pairs.min()), float(pairs.max())
    draws = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.quantile(np.median(pairs[draws], axis=1), [0.025, 0.975])
    return float(np.median(pairs)), float(low), float(high)
