"""The way back: an IVTP-LLaVA folder without what is IVTP's is an official-format LLaVA, for software that knows those.

vLLM, SGLang, TGI and llama.cpp's converter read `model_type: llava`; none of them prunes.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ..files.console import quiet
from ..files.folder import check_target
from ..files.sizes import byte_count
from ..model.placeholders import check_placeholders, complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from .llava_source import is_stock, read_config
from .shards import PlannedTensor
from .sources import HubOptions, naming_damaged_file, open_checkpoint
from .writing import CLIP_NAMES, SMALL_FILES, Conversion, check_not_source, copy_beside, write_checkpoint


def export_stock(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Write LLaVA's weights, config and processor of an IVTP-LLaVA, and nothing else.

    Every tensor stays as it is and has its official name, that of the checkpoints of llava-hf.

    Parameters
    ----------
    source : str or path
        Folder or Hub id of an IVTP-LLaVA.
    out : str or path
        The folder to write. It appears whole or not at all.
    max_shard_size, overwrite, dry_run, progress, revision, token, cache_dir, local_files_only
        As for `convert`.

    Returns
    -------
    Conversion

    Raises
    ------
    ValueError
        If the source is no IVTP-LLaVA, or has a connector, or an option is out of range.
    OSError
        If a file is missing or damaged, the target exists or the disk is full.
    """
    max_shard_bytes = byte_count(max_shard_size, "max_shard_size")
    check_not_source(out, source)
    check_target(out, overwrite=overwrite)
    hub = HubOptions(revision, token, cache_dir, local_files_only)
    checkpoint, folder = open_checkpoint(source, hub, headers_only=dry_run, extra=SMALL_FILES)
    with quiet(), naming_damaged_file(source, folder):
        config = read_config(folder, str(source))
        if is_stock(folder):
            raise ValueError(f"{source} is a stock LLaVA already; copy it as it is")
        if config.connector is not None:
            raise ValueError(
                f"{source} has a connector ({config.connector.name}), for which a stock LLaVA has no place"
            )
        processor = _stock_processor(IVTPLlavaProcessor.from_pretrained(folder))
        complete_processor(processor, config)
    check_placeholders(processor, config, source)
    tensors = {
        official_name(name): PlannedTensor(info, partial(checkpoint.read, name))
        for name, info in checkpoint.tensors.items()
        if not name.startswith(CLIP_NAMES)
    }

    def write_small_files(target: Path) -> None:
        (target / "config.json").write_text(json.dumps(_stock_config(config), indent=2) + "\n")
        processor.save_pretrained(target)
        copy_beside(folder, target)

    return write_checkpoint(
        out,
        tensors,
        dtype=checkpoint.main_dtype,
        max_shard_bytes=max_shard_bytes,
        write_small_files=write_small_files,
        model_class=LlavaForConditionalGeneration,
        processor_class=LlavaProcessor,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )


def official_name(name: str) -> str:
    """Return a LLaVA tensor's name in the checkpoints of llava-hf, whatever library saved it under another.

    Newer versions of transformers, and libraries that save the state of the modules, leave out or insert prefixes;
    other software looks for the official names.
    """
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    for part, inner in (("language_model.", ("model.", "lm_head.")), ("vision_tower.", ("vision_model.",))):
        below = name.removeprefix(part)
        if below != name and not below.startswith(inner):
            return part + inner[0] + below
    return name


def _stock_config(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for name in ("pruning", "clip_text_config", "auto_map"):
        values.pop(name, None)
    values |= {"model_type": LlavaConfig.model_type, "architectures": [LlavaForConditionalGeneration.__name__]}
    return LlavaConfig.from_dict(values).to_diff_dict() | {"architectures": values["architectures"]}


def _stock_processor(processor: IVTPLlavaProcessor) -> LlavaProcessor:
    for part in (processor.image_processor, processor.tokenizer):
        # transformers hangs a processor's remote code on its parts.
        part.__dict__.pop("auto_map", None)
        getattr(part, "init_kwargs", {}).pop("auto_map", None)
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )
