"""Join an official LLaVA checkpoint with CLIP's text half into one that `IVTPLlavaForConditionalGeneration` loads.

The weights are streamed from shard to shard, one tensor in memory at a time, and LLaVA's keep the names they have: the
model's own conversions know them. Everything that can be wrong is checked before the first byte is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files.console import quiet
from ..files.folder import check_target
from ..files.sizes import byte_count
from ..model.checkpoint_ivtp import check_clip_width
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.placeholders import check_placeholders, complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from .clip_checkpoint import StoredClipText, load_clip_text
from .llava_source import meta_model, read_config, warn_of_unlike_tower
from .recipes import Recipe, load_recipe
from .shards import PlannedTensor
from .sources import HubOptions, local_folder, naming_damaged_file, open_checkpoint
from .weights import Checkpoint, TensorInfo
from .writing import (
    CLIP_NAMES,
    SMALL_FILES,
    Conversion,
    check_not_source,
    copy_beside,
    save_without_weights,
    write_checkpoint,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Buffers that older libraries stored and newer ones compute.
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")


def convert(
    llava: str | os.PathLike[str] | None,
    clip: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    overwrite: bool = False,
    pruning: Mapping[str, Any] | None = None,
    progress: bool = True,
    activation: str | None = None,
    revision: str | None = None,
    clip_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Write a folder with LLaVA, CLIP's text tower and both projections, the processor, the config and the code.

    Parameters
    ----------
    llava : str, path or None
        A folder or Hub repository with an official-format LLaVA (`model_type: llava`), or with an IVTP-LLaVA. None: the
        recipe's.
    clip : str, path or None
        The source of CLIP's text half, see `load_clip_text`. None: the recipe's, or that of an IVTP-LLaVA.
    out : str or path
        The folder to write. It appears whole or not at all.
    recipe : str or path, optional
        A published setting, by name or file, see `load_recipe`; other arguments take precedence over it.
    dtype : {"float32", "float16", "bfloat16"} or torch.dtype, optional
        Type of all weights. None: LLaVA's are stored as they are and CLIP's in the type most of LLaVA's have.
    max_shard_size : int or str
        Largest weight file, such as `"5GB"`.
    dry_run : bool
        Check everything and write nothing; of Hub repositories only headers and small files are downloaded.
    overwrite : bool
        Replace an existing folder.
    pruning : mapping, optional
        Fields of `IVTPPruningConfig`.
    progress : bool
        Show a progress bar on standard error if that is a terminal.
    activation : str, optional
        See `load_clip_text`; default: that of LLaVA's vision tower.
    revision, clip_revision : str, optional
        Revision of either Hub repository.
    token, cache_dir, local_files_only
        As for `from_pretrained`.

    Returns
    -------
    Conversion

    Raises
    ------
    ValueError
        If the two do not fit together, the layout is not supported or an option is out of range.
    OSError
        If a file is missing or damaged, the target exists or the disk is full.
    """
    published = None if recipe is None else load_recipe(recipe)
    if published is not None:
        llava, clip, dtype = llava or published.base_model, clip or published.clip, dtype or published.dtype
        pruning = published.pruning.to_dict() | dict(pruning or {})
    if llava is None:
        raise ValueError("name the LLaVA to start from, or a recipe that does")
    stored_dtype, max_shard_bytes = _dtype(dtype), byte_count(max_shard_size, "max_shard_size")
    check_not_source(out, llava, clip)
    check_target(out, overwrite=overwrite)

    hub = HubOptions(revision, token, cache_dir, local_files_only)
    config = _target_config(llava, clip, hub, published, pruning)
    text = None
    if clip is not None:
        text = load_clip_text(
            clip,
            activation=activation or config.vision_config.hidden_act,
            revision=clip_revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            headers_only=dry_run,
        )
        _set_clip(config, text, llava, published)
    checkpoint, folder = open_checkpoint(llava, hub, headers_only=dry_run, extra=SMALL_FILES)
    if text is not None:
        warn_of_unlike_tower(text, checkpoint, str(llava))

    main_dtype = stored_dtype or checkpoint.main_dtype
    tensors = _planned_tensors(checkpoint, text, stored_dtype, main_dtype)
    with quiet(), naming_damaged_file(llava, folder):
        model = meta_model(config, {name: tensor.info for name, tensor in tensors.items()}, main_dtype, str(llava))
        processor = _processor(folder, text)
        complete_processor(processor, config)
    if processor.clip_tokenizer is None:
        raise ValueError(f"{llava} has no clip_tokenizer/; name the CLIP to take it from")
    check_placeholders(processor, config, llava)

    def write_small_files(target: Path) -> None:
        save_without_weights(model, processor, target)
        copy_beside(folder, target)

    return write_checkpoint(
        out,
        tensors,
        dtype=main_dtype,
        max_shard_bytes=max_shard_bytes,
        write_small_files=write_small_files,
        model_class=IVTPLlavaForConditionalGeneration,
        processor_class=IVTPLlavaProcessor,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        note=None if published is None else _recipe_note(published, llava, clip),
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(_DTYPES)}, or None for the type of the source")
    return _DTYPES[dtype]


def _target_config(
    llava: str | os.PathLike[str],
    clip: str | os.PathLike[str] | None,
    hub: HubOptions,
    published: Recipe | None,
    pruning: Mapping[str, Any] | None,
) -> Any:
    """Return the configuration to write but for CLIP; of a Hub repository only small files are downloaded for it."""
    folder = local_folder(llava) or hub.snapshot(str(llava), SMALL_FILES)
    with quiet():
        config = read_config(folder, str(llava))
        # Before the pruning options: a stock LLaVA has the default ones, which need not fit it.
        if clip is None and config.clip_text_config is None:
            raise ValueError(f"{llava} has no text tower of CLIP; name a CLIP to take it from")
        if published is not None:
            published.check(config, str(llava))
        if pruning:
            config.pruning = config.pruning.changed(**pruning)
        config.pruning_plan()
    return config


def _set_clip(config: Any, text: StoredClipText, llava: object, published: Recipe | None) -> None:
    """Enter CLIP's text tower into a configuration, after checking that it fits LLaVA's vision tower and the recipe."""
    check_clip_width(text, llava, config.vision_config.hidden_size)
    config.clip_text_config = text.text_config
    if published is not None:
        published.check(config, text.source)


def _planned_tensors(
    checkpoint: Checkpoint, text: StoredClipText | None, stored_dtype: torch.dtype | None, main_dtype: torch.dtype
) -> dict[str, PlannedTensor]:
    """Plan all tensors to write: LLaVA's in the order of their files, then CLIP's."""
    tensors: dict[str, PlannedTensor] = {}
    for name, info in checkpoint.tensors.items():
        replaced = text is not None and name.startswith(CLIP_NAMES)
        if replaced or name.endswith(_BUFFERS):
            continue
        dtype = stored_dtype if stored_dtype is not None and info.dtype.is_floating_point else info.dtype
        tensors[name] = PlannedTensor(TensorInfo("", dtype, info.shape), partial(checkpoint.read, name))
    if text is not None:
        for name, shape in text.shapes.items():
            info = TensorInfo("", main_dtype, shape)
            tensors["model." + name] = PlannedTensor(info, partial(text.read, name))
    return tensors


def _processor(folder: Path, text: StoredClipText | None) -> IVTPLlavaProcessor:
    if text is None:
        return IVTPLlavaProcessor.from_pretrained(folder)
    return IVTPLlavaProcessor.from_llava(folder, clip_tokenizer=text.tokenizer)


def _recipe_note(recipe: Recipe, llava: object, clip: object) -> dict[str, Any]:
    # A path of this machine says nothing elsewhere; a name on the Hub does.
    sources = {
        name: str(source) if source is not None and not Path(str(source)).exists() else None
        for name, source in (("base_model", llava), ("clip", clip))
    }
    return {"recipe": recipe.name} | recipe.to_dict() | sources
