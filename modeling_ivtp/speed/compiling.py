"""Compiled arms: prompts and decoding steps as graphs, with a static cache that stays at its addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from transformers import StaticCache

from ..model.pruned_cache import key_value_shape
from .timing import Arm


def static_cache(model: Any, batch: int, room: int) -> Any:
    """Make a static cache for `room` tokens a row; only a stock model's gets its memory before the prompt."""
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=room)
    if not hasattr(model, "pruning"):
        cache.early_initialization(batch, *key_value_shape(config), model.dtype, model.device)
    return cache


@contextmanager
def compiled(arms: Sequence[Arm]) -> Iterator[Sequence[Arm]]:
    """Compile the models of some arms inside the context."""
    mode = "reduce-overhead" if arms[0].model.device.type == "cuda" else None
    models = list({id(arm.model): arm.model for arm in arms}.values())
    # Arms that share a model, and cases, are variants of one graph.
    with torch._dynamo.config.patch(recompile_limit=64):
        for model in models:
            model.forward = torch.compile(model.forward, mode=mode)
        try:
            yield arms
        finally:
            for model in models:
                del model.forward
            torch._dynamo.reset()
