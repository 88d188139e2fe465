"""Checks of a LLaVA: IVTP can prune its layout, and all of its weights are present."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..model.adapter import adapter_message
from ..model.checkpoint_ivtp import warn_of_another_clip
from ..model.configuration_ivtp import IVTPLlavaConfig
from ..model.language_ivtp import DECODERS
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from .clip_text import StoredClipText
from .shards import meta_tensor
from .sources import naming_damaged_file
from .weights import Checkpoint, TensorInfo

MODEL_TYPES = ("llava", "ivtp_llava")
# Types of checkpoints in the format of LLaVA's authors, which transformers does not load, with a twin in llava-hf.
_ORIGINAL_TYPES = ("llava_llama", "llava_mistral")


def read_config(folder: Path, llava: str, *, quantized: bool = False) -> Any:
    """Read the configuration in a folder as an `IVTPLlavaConfig`.

    Parameters
    ----------
    folder : Path
        The folder that holds config.json.
    llava : str
        The name or path that the user gave; every error names it.
    quantized : bool
        Accept quantized weights.

    Raises
    ------
    ValueError
        If IVTP cannot prune the layout: another model, a quantized one, a vision tower without CLS token or with it
        among the features, an unknown language model; or if config.json is damaged.
    OSError
        If there is no config.json.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
        model_type = values.get("model_type")
    except FileNotFoundError:
        adapter = folder / ADAPTER_CONFIG_NAME
        message = adapter_message(llava, adapter) if adapter.is_file() else f"{llava} has no config.json"
        raise FileNotFoundError(message) from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"config.json of {llava} is not a JSON object: {error}") from error
    if model_type not in MODEL_TYPES:
        hint = "; use the llava-hf repository of the same model" if model_type in _ORIGINAL_TYPES else ""
        raise ValueError(f"{llava} is of model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}{hint}")
    if values.get("quantization_config") and not quantized:
        raise ValueError(f"{llava} is quantized; start from the weights it was quantized from")
    with naming_damaged_file(llava, folder):
        config: Any = IVTPLlavaConfig.from_pretrained(folder)
    vision, decoder = config.vision_config.model_type, config.text_config.model_type
    if vision != "clip_vision_model":
        raise ValueError(
            f"the vision tower of {llava} is a {vision!r}; IVTP needs one with a CLS token: 'clip_vision_model'"
        )
    strategy = config.vision_feature_select_strategy
    if strategy != "default":
        raise ValueError(
            f"{llava} has vision_feature_select_strategy={strategy!r}, which keeps the CLS token among the features; "
            "supported is 'default'"
        )
    if decoder not in DECODERS:
        raise ValueError(f"the language model of {llava} is a {decoder!r}; supported are {', '.join(sorted(DECODERS))}")
    return config


def is_stock(folder: Path) -> bool:
    """Return whether config.json in a folder, which `read_config` has accepted, is that of a stock LLaVA."""
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == LlavaConfig.model_type)


def warn_of_unlike_tower(text: StoredClipText, checkpoint: Checkpoint, llava: str) -> None:
    """Warn if CLIP's class embedding is not that of LLaVA's vision tower; CLIPs of one size differ in nothing else."""
    names = [name for name in checkpoint.tensors if name.endswith("embeddings.class_embedding")]
    if len(names) == 1 and checkpoint.folder is not None:
        warn_of_another_clip(text.source, text.class_embedding(), llava, checkpoint.read(names[0]))


def meta_model(
    config: Any, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, source: str
) -> IVTPLlavaForConditionalGeneration:
    """Build the model without data, and check that every tensor has a place in it and none is missing.

    Raises
    ------
    ValueError
        If a tensor is missing, unknown or of another shape.
    """
    model, info = IVTPLlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict={name: meta_tensor(info) for name, info in tensors.items()},
        dtype=dtype,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loading_info(info, source)
    return model


def check_loading_info(info: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the loader found a tensor for every place and a place for every tensor."""
    for kind, fault in (
        ("missing_keys", "lacks {} tensors of the model"),
        ("unexpected_keys", "has {} tensors that the model does not know"),
    ):
        keys = sorted(map(str, info[kind]))
        if keys:
            raise ValueError(f"{source} {fault.format(len(keys))}, such as {keys[0]}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{source} has {len(mismatched)} tensors of other shapes than its config says, such as {name}: "
            f"{tuple(stored)} in the weights, {tuple(expected)} by config.json"
        )
