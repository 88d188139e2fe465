"""Models and prompts for timing: random weights of a named shape, and a stock LLaVA on the same weights."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ..files.sizes import human_bytes
from ..flops.formula import kv_cache_bytes
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.prompt_graphs import layer_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OURS = ("pruning", "clip_text_config", "auto_map", "model_type", "architectures")


def random_model(config: Any, *, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """Build an IVTPLlavaForConditionalGeneration with random weights."""
    with torch.device(device):
        model = IVTPLlavaForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=dtype)
    # Random weights would end an answer at random; every run needs the same length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def stock_twin(model: Any, attention: str | None = None) -> Any:
    """Build a stock LlavaForConditionalGeneration that shares the weights of one of ours.

    `attention` is its attention implementation; default: that of our model.
    """
    options = {name: value for name, value in model.config.to_dict().items() if name not in _OURS}
    config = LlavaConfig(**options)
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=attention or model.config._attn_implementation, dtype=model.dtype
        )
    weights = model.state_dict()
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()}, assign=True)
    for name, _ in list(stock.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        stock.get_submodule(owner)._buffers[leaf] = model.get_buffer(name)
    stock.generation_config = model.generation_config
    return stock.eval().requires_grad_(False)


def prompt(model: Any, *, batch: int, text_tokens: int, instruction_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Draw a batch of prompts with one image each, one text token before it and the others after.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    batch, text_tokens : int
    instruction_tokens : int
        How many of the text tokens, up to the last but one, are the user's; CLIP reads as many.
    seed : int
    """
    config: Any = model.config
    draws = torch.Generator().manual_seed(seed)
    patches, side = config.num_patches, config.vision_config.image_size
    ids = torch.randint(3, min(1000, config.image_token_id), (batch, text_tokens + patches), generator=draws)
    ids[:, 1 : 1 + patches] = config.image_token_id
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, side, side, generator=draws),
    }
    clip = config.clip_text_config
    if clip is not None and instruction_tokens:
        body = clip.max_position_embeddings - 2
        windows = -(-instruction_tokens // body)
        words = torch.randint(1, clip.bos_token_id, (batch, windows, clip.max_position_embeddings), generator=draws)
        words[..., 0], words[..., -1] = clip.bos_token_id, clip.eos_token_id
        # CLIP's own padding is the token that ends a text.
        words[:, -1, 1 + instruction_tokens - (windows - 1) * body :] = clip.eos_token_id
        spans = torch.zeros(batch, ids.shape[1], 2, dtype=torch.long)
        total = windows * clip.max_position_embeddings
        for number in range(instruction_tokens):
            first = number // body * clip.max_position_embeddings + 1 + number % body - total
            spans[:, ids.shape[1] - 1 - instruction_tokens + number] = torch.tensor([first, first + 1])
        inputs |= {"clip_input_ids": words, "clip_spans": spans}
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    return moved


def bytes_needed(
    config: Any, *, dtype: torch.dtype, batch: int, text_tokens: int, new_tokens: int, weights: int | None = None
) -> int:
    """Return the least bytes that a run takes: weights, the unpruned cache, and two decoder layers' activations.

    `weights` is the number of bytes still to be loaded; default: all weights of the shape.
    """
    if weights is None:
        with torch.device("meta"):
            model = IVTPLlavaForConditionalGeneration._from_config(config)
        weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    text, length = config.text_config, config.num_patches + text_tokens
    cache = sum(kv_cache_bytes(config, [length + new_tokens] * text.num_hidden_layers, dtype.itemsize))
    activations = 2 * layer_bytes(text, length, dtype.itemsize)
    return weights + batch * (cache + activations)


def check_room(needed: int, device: torch.device, what: str) -> None:
    """Check that the machine can hold `needed` bytes.

    Raises
    ------
    ValueError
        If it cannot, with both numbers.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(f"{what} needs at least {human_bytes(needed)}, and {human_bytes(free)} are free on {device}")
