"""Memory: the bytes that a batch takes, and the bytes that are free."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from ..checkpoints.weights import Checkpoint
from ..files.sizes import human_bytes
from ..flops.formula import kv_cache_bytes
from ..model.prompt_graphs import layer_bytes
from ..speed.models import DTYPES

_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Share of the free memory that batches get by default. Other programs need main memory too."""


class Cost:
    """Bytes that a batch takes beside the weights: the exact unpruned KV cache, and an estimate of activations.

    Pruned rows take less. A row needs the unpruned cache where pruning is off or begins late.

    Parameters
    ----------
    config : IVTPLlavaConfig
    value_bytes : int
        Bytes of one number of the model's type.
    new_tokens : int
        Length of the longest answer.
    """

    def __init__(self, config: Any, value_bytes: int, new_tokens: int) -> None:
        self._config, self._bytes, self._new = config, value_bytes, new_tokens

    def __call__(self, rows: int, length: int, images: int) -> int:
        """Return the bytes of `rows` prompts, padded to `length` tokens, with `images` images in all."""
        text, vision = self._config.text_config, self._config.vision_config
        cache = sum(kv_cache_bytes(self._config, [length + self._new] * text.num_hidden_layers, self._bytes))
        # Two decoder layers, and a mask; the last token's scores in float32, twice while a token is chosen.
        activations = 2 * layer_bytes(text, length, self._bytes)
        row = cache + activations + length * length * self._bytes + 2 * text.vocab_size * 4
        places = self._config.num_patches + 1
        tower = 2 * layer_bytes(vision, places, self._bytes, matrices=2)
        # The picture, and the attention map that a group's rollout carries along, in float32.
        return int(rows * row + images * (tower + 4 * places * places + 3 * 4 * vision.image_size**2))


def value_type(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """Return the type that a model computes in: `dtype`, or the checkpoint's for `"auto"`.

    Raises
    ------
    ValueError
        For an unknown type.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: auto, float32, float16, bfloat16")
    return checkpoint.main_dtype if dtype == "auto" else DTYPES[dtype]


def free_bytes(device: str | None) -> int:
    """Return the free bytes of a device; None: of everything that `load_model` spreads a model over."""
    main = int(psutil.virtual_memory().available)
    if device is None and torch.cuda.is_available():
        return main + sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    if device is not None and torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return main


def check_room(weights: int, row: int, budget: int | None, device: str | None) -> None:
    """Refuse a run that memory cannot hold, before anything is loaded or written.

    Parameters
    ----------
    weights, row : int
        Bytes of the weights, and of the smallest row beside them.
    budget : int or None
        Bytes of a batch that the person allows.
    device : str or None
        As in `free_bytes`. Processes that share main memory share its bytes.

    Raises
    ------
    ValueError
        With the bytes that it would need.
    """
    if budget is not None and row > budget:
        raise ValueError(
            f"one row needs {human_bytes(row)} beside the weights, and --memory gives {human_bytes(budget)}"
        )
    processes = _sharing(device)
    needed, free = processes * (weights + row), free_bytes(device)
    if needed > free:
        subject = f"{processes} processes need" if processes > 1 else "weights and one row need"
        raise ValueError(
            f"{subject} at least {human_bytes(needed)}, and {human_bytes(free)} are free on {device or 'here'}"
        )


def default_budget(weights: int, row: int, device: str | None) -> int:
    """Return the default bytes of a batch: a share of what the weights leave free, and at least one row's."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    spare = free_bytes(device) // _sharing(device) - weights
    if device is None and cuda:
        # A spread model's cache is spread too, but its activations lie on one GPU at a time. Main memory is for
        # weights that do not fit.
        count = torch.cuda.device_count()
        spare = (sum(torch.cuda.mem_get_info(number)[0] for number in range(count)) - weights) // count
    return max(row, int(spare * _SHARE["cuda" if cuda else "cpu"]))


def _sharing(device: str | None) -> int:
    """Return how many processes of this run share a device's memory; on a CPU all of this machine do."""
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
