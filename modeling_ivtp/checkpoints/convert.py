"""Join an official LLaVA checkpoint with CLIP's text half into one that `IVTPLlavaForConditionalGeneration` loads.

The weights are streamed from shard to shard, one tensor in memory at a time, and LLaVA's keep the names they have: the
model's own conversions know them. Everything that can be wrong is looked at before the first byte is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files.console import quiet
from ..files.folder import byte_count, check_target, new_folder
from ..model.checkpoint_ivtp import check_clip_width
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.processing_ivtp import IVTPLlavaProcessor
from .clip_checkpoint import StoredClipText, load_clip_text
from .llava_source import check_loading_info, meta_model, read_config, warn_of_unlike_tower
from .recipes import Recipe, load_recipe
from .shards import Planned, Shards
from .sources import HubOptions, local_folder, open_checkpoint, reading
from .weights import Checkpoint, TensorInfo

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

RECIPE_FILE = "ivtp_recipe.json"
CLIP_NAMES = ("model.clip_text_model.", "model.visual_projection.")
# Terms that came with the weights go wherever the weights go.
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", *TERMS)
# Buffers that older libraries stored and newer ones compute.
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
# Config, tokenizers and code: far less than this.
SMALL_BYTES = 50_000_000


@dataclass(frozen=True)
class Conversion:
    """What a conversion writes, or has written.

    Attributes
    ----------
    out : Path
        The folder.
    weight_files : mapping of str to int
        The bytes of tensors in each weight file.
    dtype : torch.dtype
        The type the model is loaded in by default, and that CLIP's tensors are stored in.
    llava_tensors, clip_tensors : int
        How many tensors come from where.
    written : bool
        False after a dry run.
    """

    out: Path
    weight_files: Mapping[str, int]
    dtype: torch.dtype
    llava_tensors: int
    clip_tensors: int
    written: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.weight_files.values())


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
        Where CLIP's text half comes from, see `load_clip_text`. None: the recipe's, or that of an IVTP-LLaVA.
    out : str or path
        The folder to write. It appears whole or not at all.
    recipe : str or path, optional
        A published setting, by name or file, see `load_recipe`; what is given beside it goes before it.
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
    options = HubOptions(revision, token, cache_dir, local_files_only)
    known = None if recipe is None else load_recipe(recipe)
    if known is not None:
        llava, clip, dtype = llava or known.base_model, clip or known.clip, dtype or known.dtype
        pruning = known.pruning.to_dict() | dict(pruning or {})
    if llava is None:
        raise ValueError("name the LLaVA to start from, or a recipe that does")
    wanted, shard_bytes = _dtype(dtype), byte_count(max_shard_size, "max_shard_size")
    check_not_source(out, llava, clip)
    check_target(out, overwrite=overwrite)
    # The small files come first: a wrong model or option is not worth the download of its weights.
    folder = local_folder(llava) or options.snapshot(str(llava), SMALL_FILES)
    with quiet():
        config = read_config(folder, str(llava))
        if known is not None:
            known.check(config, str(llava))
        if pruning:
            config.pruning = config.pruning.changed(**pruning)
        config.pruning_plan()
    if clip is None and config.clip_text_config is None:
        raise ValueError(f"{llava} has no text tower of CLIP; name a CLIP to take it from")
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
        check_clip_width(text, llava, config.vision_config.hidden_size)
        config.clip_text_config = text.text_config
        if known is not None:
            known.check(config, str(clip))
    checkpoint, folder = open_checkpoint(llava, options, headers_only=dry_run, extra=SMALL_FILES)
    if text is not None:
        warn_of_unlike_tower(text, checkpoint, str(llava))

    main_dtype = wanted or checkpoint.main_dtype
    tensors = _tensors(checkpoint, text, wanted, main_dtype)
    with quiet(), reading(llava, folder):
        model = meta_model(config, {name: tensor.info for name, tensor in tensors.items()}, main_dtype, str(llava))
        if text is None:
            processor = IVTPLlavaProcessor.from_pretrained(folder)
        else:
            processor = IVTPLlavaProcessor.from_llava(folder, clip_tokenizer=text.tokenizer)
    if processor.clip_tokenizer is None:
        raise ValueError(f"{llava} has no clip_tokenizer/; name the CLIP to take it from")

    shards = Shards(tensors, shard_bytes)
    needed = sum(shards.sizes.values()) + SMALL_BYTES
    final = check_target(out, needed_bytes=needed, overwrite=overwrite)
    of_clip = sum(name.startswith(CLIP_NAMES) for name in tensors)
    result = Conversion(final, shards.sizes, main_dtype, len(tensors) - of_clip, of_clip, written=not dry_run)
    if dry_run:
        return result

    with new_folder(out, needed_bytes=needed, overwrite=overwrite) as temporary:
        with quiet():
            # The model's own way of saving, without weights: the config, its auto_map and the code.
            model.save_pretrained(temporary, state_dict={})
            processor.save_pretrained(temporary)
        copy_beside(folder, temporary)
        shards.write(temporary, progress=progress)
        if known is not None:
            _note_recipe(temporary, known, llava, clip)
        with quiet():
            _check_written(temporary)
    return result


def copy_beside(source: Path, target: Path) -> None:
    """Copy what goes with weights but is neither config nor processor: how to generate, and the terms of use."""
    for pattern in ("generation_config.json", *TERMS):
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def _note_recipe(folder: Path, recipe: Recipe, llava: object, clip: object) -> None:
    """Leave a note of what the checkpoint was built from; `ivtp push` chooses the model card by it."""
    # A path of this machine says nothing elsewhere; a name on the Hub does.
    stated = recipe.to_dict() | {
        name: str(given) if given is not None and not Path(str(given)).exists() else None
        for name, given in (("base_model", llava), ("clip", clip))
    }
    # Whoever trains on in this folder makes it another model, which the recipe's card says nothing about.
    stated |= {"weights": Checkpoint.from_folder(folder, str(folder)).digest()}
    (folder / RECIPE_FILE).write_text(json.dumps({"recipe": recipe.name} | stated, indent=1) + "\n")


def check_not_source(out: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    target = Path(os.path.realpath(Path(out).expanduser()))
    for source in sources:
        path = None if source is None else Path(os.path.realpath(Path(source).expanduser()))
        if path is not None and path.exists() and (path == target or target in path.parents):
            raise ValueError(f"{out} is, or holds, {source}, which is read from; choose another folder to write")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}, or None for the type of the source")
    return DTYPES[dtype]


def _tensors(
    checkpoint: Checkpoint, text: StoredClipText | None, wanted: torch.dtype | None, main_dtype: torch.dtype
) -> dict[str, Planned]:
    """Everything that is to be written: LLaVA's tensors in the order of their files, then CLIP's."""
    tensors: dict[str, Planned] = {}
    for name, info in checkpoint.tensors.items():
        replaced = text is not None and name.startswith(CLIP_NAMES)
        if replaced or name.endswith(_BUFFERS):
            continue
        dtype = wanted if wanted is not None and info.dtype.is_floating_point else info.dtype
        tensors[name] = Planned(TensorInfo("", dtype, info.shape), partial(checkpoint.read, name))
    for name, shape in text.shapes.items() if text is not None else ():
        tensors["model." + name] = Planned(TensorInfo("", main_dtype, shape), partial(text.read, name))  # type: ignore[union-attr]
    return tensors


def _check_written(folder: Path) -> None:
    """Read back what was written, as the model will load it."""
    loaded: Any = IVTPLlavaForConditionalGeneration.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading_info(loaded[1], str(folder))
