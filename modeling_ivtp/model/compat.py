"""The name of the KV cache in transformers' arguments and outputs: `cache` since 5.24, `past_key_values` before.

Our models accept both names under every version; calls of transformers use the version's own name.
"""

import copy
import inspect
import warnings
from typing import Any

import torch
from torch.utils._pytree import SUPPORTED_NODES
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The installed version's name."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache of a call, whichever name it was passed under.

    Raises
    ------
    ValueError
        If both names were passed and differ, or for a tuple of tensors.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("You cannot specify both cache and past_key_values: they are two names of one argument.")
    cache = past_key_values if cache is None else cache
    if isinstance(cache, tuple | list):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__} of tensors, as versions before 5 had it; allowed: a Cache, such as "
            "DynamicCache(config=model.config.text_config)."
        )
    return cache


def copied(cache: Cache) -> Cache:
    """Return a copy of a cache, without gradients: torch copies no tensor that has a history."""
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None})


def cache_argument(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that a user's call passed, and warn of the old name where transformers does.

    Raises
    ------
    ValueError
        If it came under both names and they differ, or for a tuple of tensors.
    """
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated: pass `cache` instead.", FutureWarning, stacklevel=3)
    return one_cache(cache, past_key_values)


def is_exporting() -> bool:
    """Return whether `torch.export` traces the model; versions of PyTorch without a way to ask answer no."""
    return getattr(torch.compiler, "is_exporting", bool)()


def check_export(pruned: bool) -> None:
    """Check that `torch.export` can trace a call that returns a KV cache.

    Parameters
    ----------
    pruned : bool
        Whether the cache's layers differ in length. Without pruning it is stock's, which transformers can make known
        to PyTorch (`register_dynamic_cache_export_support`).

    Raises
    ------
    ValueError
        If it cannot.
    """
    if pruned or DynamicCache not in SUPPORTED_NODES:
        raise ValueError("use_cache: torch.export takes no cache as an output; export with use_cache=False.")


def cache_of(outputs: Any) -> Any:
    """Return the cache in a model's output; None if there is none."""
    return getattr(outputs, CACHE)
