"""The cost of a run, counted before it begins: steps, tokens, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from ..files.console import steps_bar
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..trained.adapter import check_shape, describe_shape
from .batches import answer_tokens
from .conversation import Written, write
from .data import Conversations
from .options import Options
from .parts import prefixes

_AT_ONCE = 256
_ADAM_NUMBERS = 2
"""AdamW keeps two numbers of each that learns, in its type."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a data set in one epoch.

    Attributes
    ----------
    text, image, learned : int
        Text tokens, image tokens, and tokens of answers, cut at the longest length.
    longest : int
        Tokens of the longest row.
    cut : int
        Rows that are longer than allowed.
    """

    text: int
    image: int
    learned: int
    longest: int
    cut: int


@dataclass(frozen=True)
class Plan:
    """Cost of a run.

    Attributes
    ----------
    rows, held_out : int
        Rows to learn from, and held out.
    steps : int
    processes, device_batch_size, accumulation : int
        A step's conversations are their product.
    epochs : float
    tokens : Tokens or None
        Of one epoch; None if they were not counted.
    visual_tokens : int
        Of one image in the decoder's last layer.
    layer_averaged_tokens : float
        Of one image in a layer of the decoder, on average.
    weights, learning : int
        Numbers in all weights, and in those that learn.
    weight_bytes, gradient_bytes, optimizer_bytes : int
        Of one process that shares nothing with others, without activations.
    disk_bytes : int
        Of the folder at its largest: two checkpoints, while the older one goes, or one and what the run ends with.
    """

    rows: int
    held_out: int
    steps: int
    processes: int
    device_batch_size: int
    accumulation: int
    epochs: float
    tokens: Tokens | None
    visual_tokens: int
    layer_averaged_tokens: float
    weights: int
    learning: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients and optimizer together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self) | {"memory_bytes": self.memory_bytes}


def split_batch(batch: int, processes: int, device_batch: int | None) -> tuple[int, int]:
    """Divide a step's conversations: how many a device takes at a time, and how often.

    Raises
    ------
    ValueError
        If they cannot be divided.
    """
    if batch % processes:
        raise ValueError(f"batch_size={batch} on {processes} processes; allowed: multiples of {processes}.")
    each = batch // processes
    if device_batch is None:
        device_batch = next(size for size in range(min(16, each), 0, -1) if each % size == 0)
    if each % device_batch:
        raise ValueError(f"device_batch_size={device_batch} of {each} conversations; allowed: divisors of {each}.")
    return device_batch, each // device_batch


def count_tokens(processor: Any, rows: Conversations, places: int, max_length: int, progress: bool) -> Tokens:
    """Count the tokens of all rows, without their pictures, and check that each row has something to learn.

    Parameters
    ----------
    processor : LlavaProcessor
    rows : Conversations
    places : int
        Placeholders of an image.
    max_length : int

    Raises
    ------
    ValueError
        For a row whose answers, or pictures, are beyond the longest length.
    """
    text = image = learned = longest = cut = 0
    with steps_bar(len(rows), "reading rows", progress) as step:
        for row, marks, is_image in _tokenized(processor, rows):
            step()
            widths = torch.where(is_image, places, 1)
            ends = widths.cumsum(0)
            inside = ends <= max_length
            if bool((is_image & ~inside).any()):
                raise ValueError(f"{row.name}: its pictures do not fit into max_length={max_length} tokens")
            if not bool((marks & inside)[1:].any()):
                raise ValueError(f"{row.name}: no answer is left within max_length={max_length} tokens")
            length = int(ends[-1])
            text += int((inside & ~is_image).sum())
            image += int((inside & is_image).sum()) * places
            learned += int((marks & inside).sum())
            longest, cut = max(longest, length), cut + (length > max_length)
    return Tokens(text, image, learned, longest, cut)


def _tokenized(processor: Any, rows: Conversations) -> Iterator[tuple[Written, torch.Tensor, torch.Tensor]]:
    """Yield each row with the marks of its answers' tokens and of its image tokens, one for each picture: bool (S,)."""
    for chunk in _chunks(write(processor, rows[place]) for place in range(len(rows))):
        encoded = processor.tokenizer([row.text for row in chunk], return_offsets_mapping=True, verbose=False)
        for row, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            is_image = torch.tensor(ids) == processor.image_token_id
            yield row, answer_tokens(row, torch.tensor(offsets), []), is_image


def _chunks(rows: Iterable[Written]) -> Iterator[list[Written]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _AT_ONCE)):
        yield chunk


def make_plan(
    options: Options,
    config: Any,
    rows: Conversations,
    held_out: Conversations | None,
    tokens: Tokens | None,
    processes: int,
) -> Plan:
    """Count a run from shapes alone.

    Parameters
    ----------
    options : Options
    config : IVTPLlavaConfig
        Of the model as it will be trained.
    rows, held_out : Conversations
    tokens : Tokens, optional
        Of `rows`.
    processes : int

    Raises
    ------
    ValueError
        If the method or the sizes of batches do not fit.
    """
    preset = options.preset
    device_batch, accumulation = split_batch(preset.batch_size, processes, options.device_batch_size)
    per_epoch = max(1, -(-len(rows) // preset.batch_size))
    steps = options.max_steps or math.ceil(preset.epochs * per_epoch)
    pruned_by = options.pruned_by
    schedule = pruned_by.plan(config)
    whole, learning = _sizes(options, config)
    optimizer = _ADAM_NUMBERS * learning.bytes
    # Beside trained modules, checkpoints hold what learns alone; if parts of the model do, it is whole in the end.
    saved = learning if pruned_by.is_trained else whole
    result = saved if pruned_by.is_trained and not prefixes(preset.trains) else whole
    checkpoint = saved.bytes + optimizer
    return Plan(
        rows=len(rows),
        held_out=0 if held_out is None else len(held_out),
        steps=steps,
        processes=processes,
        device_batch_size=device_batch,
        accumulation=accumulation,
        epochs=steps / per_epoch,
        tokens=tokens,
        visual_tokens=schedule.final_tokens,
        layer_averaged_tokens=schedule.layer_average(config.text_config.num_hidden_layers),
        weights=whole.numbers,
        learning=learning.numbers,
        weight_bytes=whole.bytes,
        gradient_bytes=learning.bytes,
        optimizer_bytes=optimizer,
        disk_bytes=checkpoint + max(checkpoint, result.bytes),
    )


@dataclass(frozen=True)
class _Size:
    """Numbers in weights, and the bytes that they take."""

    numbers: int
    bytes: int

    @classmethod
    def of(cls, weights: Iterable[torch.Tensor], each: int | None = None) -> _Size:
        """Add weights up, which have `each` bytes a number; None: those of their own type."""
        sizes = [(weight.numel(), each or weight.itemsize) for weight in weights]
        return cls(sum(numbers for numbers, _ in sizes), sum(numbers * size for numbers, size in sizes))

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.numbers + other.numbers, self.bytes + other.bytes)


def _sizes(options: Options, config: Any) -> tuple[_Size, _Size]:
    """Return the sizes of all weights and of those that learn, modules of a trained method among both.

    Raises
    ------
    ValueError
        If nothing learns, or modules were made for a model of another shape.
    """
    pruned_by, learns = options.pruned_by, prefixes(options.preset.trains)
    with torch.device("meta"):
        model = IVTPLlavaForConditionalGeneration(config)
    value = torch.bfloat16.itemsize if options.dtype == "bfloat16" else torch.float32.itemsize
    whole = _Size.of(model.parameters(), value)
    learning = _Size.of((weight for name, weight in model.named_parameters() if name.startswith(learns)), value)
    if pruned_by.is_trained:
        with torch.device("meta"):
            method = pruned_by.with_modules(model)
        if pruned_by.is_folder:
            check_shape(method.name, method.base or {}, describe_shape(config))
        own = _Size.of(method.modules_or_raise().parameters())  # float32, whatever the model's type
        whole, learning = whole + own, learning + own
    if not learning.numbers:
        raise ValueError(f"nothing of the model learns: it has no {', '.join(options.preset.trains)}")
    return whole, learning
