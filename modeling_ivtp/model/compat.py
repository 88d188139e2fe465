"""The name of the KV cache in transformers' arguments and outputs: `cache` since 5.24, `past_key_values` before.

Our models accept both names under every version; calls of transformers use the version's own name.
"""

import inspect
import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The installed version's name."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache of a call, whichever name it was passed under.

    Raises
    ------
    ValueError
        If both names were passed and differ.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("You cannot specify both cache and past_key_values: they are two names of one argument.")
    return past_key_values if cache is None else cache


def cache_argument(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that a user's call passed, and warn of the old name where transformers does.

    Raises
    ------
    ValueError
        If it came under both names and they differ.
    """
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated: pass `cache` instead.", FutureWarning, stacklevel=3)
    return one_cache(cache, past_key_values)


def is_exporting() -> bool:
    """Return whether `torch.export` traces the model; versions of PyTorch without a way to ask answer no."""
    return getattr(torch.compiler, "is_exporting", bool)()


def cache_of(outputs: Any) -> Any:
    """Return the cache in a model's output; None if there is none."""
    return getattr(outputs, CACHE)
