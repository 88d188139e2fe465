"""Join an official LLaVA checkpoint with CLIP's text half into one that `IVTPLlavaForConditionalGeneration` loads.

The weights are streamed from shard to shard, one tensor in memory at a time, and LLaVA's keep the names they have: the
model's own conversions know them. Everything that can be wrong is looked at before the first byte is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..processing_ivtp import IVTPLlavaProcessor
from .clip_checkpoint import ClipText, load_clip_text
from .console import progress_bar, quiet
from .folder import byte_count, check_target, new_folder
from .llava_source import check_loading_info, empty, meta_model, read_config, warn_of_another_clip
from .sources import HubOptions, local_folder, open_checkpoint, reading
from .weights import INDEX_FILE, Checkpoint, TensorInfo, write_safetensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_CLIP_NAMES = ("model.clip_text_model.", "model.visual_projection.")
# Buffers that older libraries stored and newer ones compute.
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
# Config, tokenizers and code: far less than this.
_SMALL_BYTES = 50_000_000


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


@dataclass(frozen=True)
class _Tensor:
    info: TensorInfo
    read: Callable[[], Tensor]


def convert(
    llava: str | os.PathLike[str],
    clip: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
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
    llava : str or path
        A folder or Hub repository with an official-format LLaVA (`model_type: llava`), or with an IVTP-LLaVA.
    clip : str, path or None
        Where CLIP's text half comes from, see `load_clip_text`. None keeps that of an IVTP-LLaVA.
    out : str or path
        The folder to write. It appears whole or not at all.
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
    wanted, shard_bytes = _dtype(dtype), byte_count(max_shard_size, "max_shard_size")
    _check_not_source(out, llava, clip)
    check_target(out, overwrite=overwrite)
    # The small files come first: a wrong model or option is not worth the download of its weights.
    folder = local_folder(llava) or options.snapshot(str(llava), _SMALL_FILES)
    with quiet():
        config = read_config(folder, str(llava))
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
        text.check_width(config.vision_config.hidden_size, llava)
        config.clip_text_config = text.text_config
    checkpoint, folder = open_checkpoint(llava, options, headers_only=dry_run, extra=_SMALL_FILES)
    if text is not None:
        warn_of_another_clip(text, checkpoint, str(llava))

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

    split = split_torch_state_dict_into_shards(
        {name: empty(tensor.info) for name, tensor in tensors.items()}, max_shard_size=shard_bytes
    )
    files = split.filename_to_tensors
    sizes = {file: sum(tensors[name].info.nbytes for name in names) for file, names in files.items()}
    needed = sum(sizes.values()) + _SMALL_BYTES
    final = check_target(out, needed_bytes=needed, overwrite=overwrite)
    of_clip = sum(name.startswith(_CLIP_NAMES) for name in tensors)
    result = Conversion(final, sizes, main_dtype, len(tensors) - of_clip, of_clip, written=not dry_run)
    if dry_run:
        return result

    with new_folder(out, needed_bytes=needed, overwrite=overwrite) as temporary:
        with quiet():
            # The model's own way of saving, without weights: the config, its auto_map and the code.
            model.save_pretrained(temporary, state_dict={})
            processor.save_pretrained(temporary)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", temporary / "generation_config.json")
        with progress_bar(result.total_bytes, progress) as wrote:
            for file, names in files.items():
                infos = {name: tensors[name].info for name in names}
                write_safetensors(temporary / file, infos, lambda name: tensors[name].read(), wrote)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        with quiet():
            _check_written(temporary, tensors)
    return result


def _check_not_source(out: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
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
    checkpoint: Checkpoint, text: ClipText | None, wanted: torch.dtype | None, main_dtype: torch.dtype
) -> dict[str, _Tensor]:
    """Everything that is to be written: LLaVA's tensors in the order of their files, then CLIP's."""
    tensors: dict[str, _Tensor] = {}
    for name, info in checkpoint.tensors.items():
        replaced = text is not None and name.startswith(_CLIP_NAMES)
        if replaced or name.endswith(_BUFFERS):
            continue
        dtype = wanted if wanted is not None and info.dtype.is_floating_point else info.dtype
        tensors[name] = _Tensor(TensorInfo("", dtype, info.shape), partial(checkpoint.read, name))
    for name, shape in text.shapes.items() if text is not None else ():
        tensors["model." + name] = _Tensor(TensorInfo("", main_dtype, shape), partial(text.read, name))  # type: ignore[union-attr]
    return tensors


def _check_written(folder: Path, tensors: Mapping[str, _Tensor]) -> None:
    """Read back what was written: the headers against the plan, and the whole as the model will load it."""
    written = Checkpoint.from_folder(folder, str(folder)).tensors
    planned = {name: (tensor.info.dtype, tensor.info.shape) for name, tensor in tensors.items()}
    if {name: (info.dtype, info.shape) for name, info in written.items()} != planned:
        raise OSError(f"the weights in {folder} are not those that were written; is the disk sound?")
    loaded: Any = IVTPLlavaForConditionalGeneration.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading_info(loaded[1], str(folder))
