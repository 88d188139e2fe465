"""Memory: the bytes that a batch takes, the bytes that are free, and batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..checkpoints.weights import Checkpoint
from ..files.sizes import human_bytes
from ..flops.formula import kv_cache_bytes
from ..model.prompt_graphs import layer_bytes
from ..speed.models import DTYPES
from .data import Row

_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Share of the free memory that batches get by default. Other programs need main memory too."""


@dataclass(frozen=True)
class Task:
    """A row that can be answered.

    Attributes
    ----------
    row : Row
    prompt : str
        The prompt in the form that the model was trained on, with a placeholder for every picture.
    tokens : int
        Length of the prompt with all tokens of its pictures.
    """

    row: Row
    prompt: str
    tokens: int


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


def check_room(weights: int, row: int, budget: int | None, device: str | None, actors: int) -> None:
    """Refuse a run that memory cannot hold, before anything is loaded or written.

    Parameters
    ----------
    weights, row : int
        Bytes of the weights, and of the smallest row beside them.
    budget : int or None
        Bytes of a batch that the person allows.
    device : str or None
        As in `free_bytes`.
    actors : int
        Processes that share the device's memory.

    Raises
    ------
    ValueError
        With the bytes that it would need.
    """
    if budget is not None and row > budget:
        raise ValueError(
            f"one row needs {human_bytes(row)} beside the weights, and --memory gives {human_bytes(budget)}"
        )
    needed, free = actors * (weights + row), free_bytes(device)
    if needed > free:
        subject = f"{actors} actors need" if actors > 1 else "weights and one row need"
        raise ValueError(
            f"{subject} at least {human_bytes(needed)}, and {human_bytes(free)} are free on {device or 'here'}"
        )


def default_budget(weights: int, row: int, device: str | None, actors: int) -> int:
    """Return the default bytes of a batch: a share of what the weights leave free, and at least one row's."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    spare = free_bytes(device) // actors - weights
    if device is None and cuda:
        # A spread model's cache is spread too, but its activations lie on one GPU at a time. Main memory is for
        # weights that do not fit.
        count = torch.cuda.device_count()
        spare = (sum(torch.cuda.mem_get_info(number)[0] for number in range(count)) - weights) // count
    return max(row, int(spare * _SHARE["cuda" if cuda else "cpu"]))


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs on each device.

    Attributes
    ----------
    weights, row : int
        Of the weights, and of the smallest row beside them.
    """

    weights: int
    row: int

    def batch(self, memory: int | None, device: str | None, actors: int) -> int:
        """Return the bytes that a batch may take on this machine, where so many actors share the device.

        Raises
        ------
        ValueError
            If the device cannot hold weights and a row, or `memory` no row.
        """
        check_room(self.weights, self.row, memory, device, actors)
        return memory or default_budget(self.weights, self.row, device, actors)


def plan_batches(
    tasks: Sequence[Task], cost: Callable[[int, int, int], int], budget: int, largest: int
) -> tuple[list[list[Task]], dict[int, str]]:
    """Group tasks into batches, from the longest to the shortest.

    Little is padded then, and the first batch is the largest.

    Parameters
    ----------
    tasks : sequence of Task
    cost : callable
        Returns the bytes of a number of rows, padded to a length in tokens, with a number of images in all.
    budget : int
        Bytes that a batch may take.
    largest : int
        Most rows in a batch.

    Returns
    -------
    batches : list of list of Task
    too_large : dict of int to str
        Errors of the rows that exceed the budget alone, by their number in the data.
    """
    batches: list[list[Task]] = []
    too_large: dict[int, str] = {}
    images = 0
    for task in sorted(tasks, key=lambda task: (-task.tokens, task.row.number)):
        alone = cost(1, task.tokens, len(task.row.images))
        if alone > budget:
            too_large[task.row.number] = (
                f"{task.tokens} tokens need {human_bytes(alone)}, and a batch may take {human_bytes(budget)}"
            )
            continue
        more = images + len(task.row.images)
        last = batches[-1] if batches else []
        if last and len(last) < largest and cost(len(last) + 1, last[0].tokens, more) <= budget:
            last.append(task)
            images = more
        else:
            batches.append([task])
            images = len(task.row.images)
    return batches, too_large
