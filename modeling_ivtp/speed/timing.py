"""Timing of arms against each other: every repeat runs all arms, so that all see the same machine."""

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
"""The timed parts, in seconds: the vision tower alone; pixels to first token; one more token; pixels to last token."""


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes
    ----------
    name : str
    model : LlavaForConditionalGeneration or IVTPLlavaForConditionalGeneration
    applied : callable
        Makes the context in which the model prunes as this arm does.
    cache : StaticCache, optional
        The cache of every run; default: a new dynamic one each time.
    graphs : Graphs, optional
        The CUDA graphs that it replays.
    """

    name: str
    model: Any
    applied: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache: Any = None
    graphs: Any = None


class _TokenTimes(StoppingCriteria):
    """Notes the time of every token, and never stops a generation."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def run(arm: Arm, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, float]:
    """Run an arm once, and time its parts.

    Parameters
    ----------
    arm : Arm
    inputs : mapping
        Inputs of our model; a stock model gets those it knows.
    new_tokens : int
        Length of the answer, at least 2.

    Returns
    -------
    dict
        Seconds by `PARTS`, `kv_bytes` at the end, and on a GPU `peak_bytes`: the most memory beside the weights.
    """
    ours = hasattr(arm.model, "pruning")
    known = {name: value for name, value in inputs.items() if ours or not name.startswith("clip_")}
    device = arm.model.device
    wait = _wait_for(device)
    if arm.cache is not None:
        arm.cache.reset()
        known[CACHE] = arm.cache
    if ours:
        arm.model.model.instruction_cache.clear()  # every question is a new one
    with arm.applied():
        wait()
        start = time.perf_counter()
        arm.model.model.get_image_features(known["pixel_values"])
        wait()
        tower = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        tokens = _TokenTimes(wait)
        start = time.perf_counter()
        output = arm.model.generate(
            **known,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([tokens]),
            return_dict_in_generate=True,
        )
        wait()
    first, last = tokens.times[0], tokens.times[-1]
    found = {
        "tower": tower,
        "prefill": first - start,
        "decode": (last - first) / (len(tokens.times) - 1),
        "end_to_end": last - start,
        "kv_bytes": float(kv_bytes(cache_of(output))),
    }
    if device.type == "cuda":
        # Memory that was in use before, such as other arms' CUDA graphs, is not this run's.
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated(device) - before)
    return found


def _wait_for(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else _no_wait


def _no_wait() -> None:
    """Do nothing: a CPU has finished when a call returns."""


def interleaved(
    arms: Sequence[Arm],
    inputs: Mapping[str, Any],
    *,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, float]]]:
    """Run all arms by turns, after two runs of each to warm up; every other turn runs backwards.

    Returns
    -------
    dict of str to list of dict
        By arm: the results of `run`, one for each repeat, paired by place.
    """
    for arm in (*arms, *arms):
        run(arm, inputs, new_tokens)
        advance()
    runs: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for turn in range(repeats):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            runs[arm.name].append(run(arm, inputs, new_tokens))
            advance()
    return runs


@torch.inference_mode()
def selection_shares(arm: Arm, inputs: Mapping[str, Any], repeats: int = 5) -> tuple[float, float]:
    """Return the shares of the prefill that choosing and CLIP's text tower take: medians over repeats."""
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
"""The fewest pairs for a bootstrap interval; fewer make it too narrow."""


def ratio(baseline: Sequence[float], arm: Sequence[float], *, resamples: int = 2000) -> tuple[float, float, float]:
    """Return how many times faster an arm is: the median over pairs, and its 95% bootstrap interval.

    With fewer pairs than `FEWEST` the interval is the range of all pairs.

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
