"""The model and the processor of a run; its configuration without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from ..checkpoints.clip_checkpoint import load_clip_text
from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, local_folder, naming_damaged_file
from ..files.console import quiet
from ..model.configuration_ivtp import IVTPLlavaConfig
from ..model.connector_options import ConnectorConfig
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.placeholders import check_placeholders, complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from .options import Options


def planned_config(options: Options) -> Any:
    """Read the configuration of the model as it will be trained; no weight is read.

    Raises
    ------
    ValueError
        If the model is no LLaVA, or CLIP or connector do not fit it.
    OSError
        If a source is missing.
    """
    folder = local_folder(options.model)
    with quiet():
        if folder is None:
            HubOptions().check(options.model)
            config = IVTPLlavaConfig.from_pretrained(options.model)
        else:
            config = read_config(folder, options.model)
        if options.clip is not None:
            activation = config.vision_config.hidden_act
            config.clip_text_config = load_clip_text(options.clip, activation=activation, headers_only=True).text_config
    wanted = ConnectorConfig.create(options.connector)
    if wanted is not None and config.connector not in (None, wanted):
        raise ValueError(f"{options.model} has {config.connector} already; leave the connector out")
    if wanted is not None and config.connector is None:
        config.pruning, config.connector = config.pruning.changed(enabled=False), wanted
    config.check_connector()
    config.pruning_plan()
    return config


def load_processor(options: Options, config: Any) -> IVTPLlavaProcessor:
    """Load the processor that belongs to a run's model.

    Raises
    ------
    ValueError
        If it writes another number of placeholders than the model reads.
    """
    folder = local_folder(options.model)
    with quiet(), naming_damaged_file(options.model, folder):
        processor = IVTPLlavaProcessor.from_llava(folder or options.model, clip_tokenizer=_tokenizer(options))
        complete_processor(processor, config)
        check_placeholders(processor, config, options.model)
    return processor


def _tokenizer(options: Options) -> Any:
    return None if options.clip is None else load_clip_text(options.clip, headers_only=True).tokenizer


def load_model(options: Options, config: Any) -> Any:
    """Load the model of a run, with a new connector where one is wanted; the seed draws it.

    Raises
    ------
    ValueError
        If a part does not fit, or weights are missing.
    OSError
        If a source is missing or damaged.
    """
    folder = local_folder(options.model)
    set_seed(options.seed)
    with quiet(), naming_damaged_file(options.model, folder):
        model = IVTPLlavaForConditionalGeneration.from_llava(
            folder or options.model,
            clip=options.clip,
            connector=options.connector,
            dtype=getattr(torch, options.dtype),
        )
    model.config.text_config.use_cache = False
    return model
