"""How many bytes a batch takes, and how many there are."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from ..checkpoints.weights import Checkpoint
from ..files.folder import human_bytes
from ..flops.formula import kv_cache_bytes
from ..model.prompt_graphs import layer_bytes
from ..speed.models import DTYPES

_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of what is free, the part that batches get by default. Main memory belongs to others too."""


class Cost:
    """Bytes a batch takes beside the weights: the unpruned KV cache, exactly, and an estimate of what passes through.

    Pruning takes less. The unpruned cache is what a row needs whose pruning is off or begins late.

    Parameters
    ----------
    config : IVTPLlavaConfig
    value_bytes : int
        Of one number of the model's type.
    new_tokens : int
        Longest answer.
    """

    def __init__(self, config: Any, value_bytes: int, new_tokens: int) -> None:
        self._config, self._bytes, self._new = config, value_bytes, new_tokens

    def __call__(self, rows: int, length: int, images: int) -> int:
        """Bytes of `rows` prompts that are padded to `length` tokens and have `images` images in all."""
        text, vision = self._config.text_config, self._config.vision_config
        cache = sum(kv_cache_bytes(self._config, [length + self._new] * text.num_hidden_layers, self._bytes))
        # Two decoder layers, and a mask; the last token's scores in float32, and once more while one is chosen.
        passing = 2 * layer_bytes(text, length, self._bytes)
        row = cache + passing + length * length * self._bytes + 2 * text.vocab_size * 4
        places = self._config.num_patches + 1
        tower = 2 * layer_bytes(vision, places, self._bytes, matrices=2)
        # The picture itself, and the map of attention that a group's rolling out carries along, in float32.
        return int(rows * row + images * (tower + 4 * places * places + 3 * 4 * vision.image_size**2))


def value_type(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The type a model computes in: `dtype`, or the checkpoint's for `"auto"`.

    Raises
    ------
    ValueError
        For an unknown type.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: auto, float32, float16, bfloat16")
    return checkpoint.main_dtype if dtype == "auto" else DTYPES[dtype]


def free_bytes(device: str | None) -> int:
    """Bytes that are free on a device; None: where `load_model` would spread a model, GPUs and then main memory."""
    main = int(psutil.virtual_memory().available)
    if device is None and torch.cuda.is_available():
        return main + sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    if device is not None and torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return main


def check_room(weights: int, row: int, budget: int | None, device: str | None) -> None:
    """Refuse what cannot be held, before anything is loaded or written.

    Parameters
    ----------
    weights, row : int
        Bytes of the weights, and of the smallest row beside them.
    budget : int or None
        Bytes that the person gave to a batch.
    device : str or None
        As in `free_bytes`. Processes that share main memory share its bytes.

    Raises
    ------
    ValueError
        With the bytes it would need.
    """
    if budget is not None and row > budget:
        raise ValueError(
            f"one row needs {human_bytes(row)} beside the weights, and --memory gives {human_bytes(budget)}"
        )
    processes = _sharing(device)
    needed, there = processes * (weights + row), free_bytes(device)
    if needed > there:
        of = f"{processes} processes need" if processes > 1 else "weights and one row need"
        raise ValueError(
            f"{of} at least {human_bytes(needed)}, and {human_bytes(there)} are free on {device or 'here'}"
        )


def default_budget(weights: int, row: int, device: str | None) -> int:
    """Bytes of a batch if the person names none: a share of what the weights leave, and at least one row's."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    spare = free_bytes(device) // _sharing(device) - weights
    if device is None and cuda:
        # A spread model's cache is spread too, but what passes through its layers lies on one GPU at a time. Main
        # memory is for weights that do not fit.
        count = torch.cuda.device_count()
        spare = (sum(torch.cuda.mem_get_info(number)[0] for number in range(count)) - weights) // count
    return max(row, int(spare * _SHARE["cuda" if cuda else "cpu"]))


def _sharing(device: str | None) -> int:
    """How many processes of this run share a device's memory: on a CPU all of this machine."""
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
