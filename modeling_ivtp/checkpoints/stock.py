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
from ..files.folder import byte_count, check_target, new_folder
from ..model.processing_ivtp import IVTPLlavaProcessor
from .convert import CLIP_NAMES, SMALL_BYTES, SMALL_FILES, Conversion, check_not_source, copy_beside
from .llava_source import check_loading_info, read_config
from .shards import Planned, Shards
from .sources import HubOptions, open_checkpoint, reading


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
    """Write LLaVA's weights, config and processor of an IVTP-LLaVA, and nothing else; every tensor stays as it is.

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
        If the source is no IVTP-LLaVA, or an option is out of range.
    OSError
        If a file is missing or damaged, the target exists or the disk is full.
    """
    shard_bytes = byte_count(max_shard_size, "max_shard_size")
    check_not_source(out, source)
    check_target(out, overwrite=overwrite)
    options = HubOptions(revision, token, cache_dir, local_files_only)
    checkpoint, folder = open_checkpoint(source, options, headers_only=dry_run, extra=SMALL_FILES)
    with quiet():
        config = read_config(folder, str(source))
    if json.loads((folder / "config.json").read_text())["model_type"] != config.model_type:
        raise ValueError(f"{source} is a stock LLaVA already; copy it as it is")
    tensors = {
        name: Planned(info, partial(checkpoint.read, name))
        for name, info in checkpoint.tensors.items()
        if not name.startswith(CLIP_NAMES)
    }
    shards = Shards(tensors, shard_bytes)
    needed = sum(shards.sizes.values()) + SMALL_BYTES
    final = check_target(out, needed_bytes=needed, overwrite=overwrite)
    result = Conversion(final, shards.sizes, checkpoint.main_dtype, len(tensors), 0, written=not dry_run)
    if dry_run:
        return result
    with new_folder(out, needed_bytes=needed, overwrite=overwrite) as temporary:
        with quiet(), reading(source, folder):
            (temporary / "config.json").write_text(json.dumps(_stock_config(config), indent=2) + "\n")
            _stock_processor(IVTPLlavaProcessor.from_pretrained(folder)).save_pretrained(temporary)
        copy_beside(folder, temporary)
        shards.write(temporary, progress=progress)
        with quiet():
            _check(temporary)
    return result


def _stock_config(config: Any) -> dict[str, Any]:
    stated = config.to_dict()
    for name in ("pruning", "clip_text_config", "auto_map"):
        stated.pop(name, None)
    stated |= {"model_type": LlavaConfig.model_type, "architectures": [LlavaForConditionalGeneration.__name__]}
    return LlavaConfig.from_dict(stated).to_diff_dict() | {"architectures": stated["architectures"]}


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


def _check(folder: Path) -> None:
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading_info(loaded[1], str(folder))
