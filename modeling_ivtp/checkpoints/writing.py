"""Writing a checkpoint folder: weights tensor by tensor, the small files beside them, and a check of the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.console import quiet
from ..files.folder import check_target, new_folder
from ..model.placeholders import check_placeholders
from .llava_source import check_loading_info
from .shards import PlannedTensor, Shards
from .weights import Checkpoint

RECIPE_FILE = "ivtp_recipe.json"
"""The file that names the recipe a checkpoint was built from; `ivtp push` chooses the model card by it."""
CLIP_NAMES = ("model.clip_text_model.", "model.visual_projection.")
"""Beginnings of the names of CLIP's tensors in our checkpoints."""
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files with the terms of use, which go wherever the weights go."""
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", *TERMS)
"""Files of a repository that are read beside its weights."""
_SMALL_BYTES = 50_000_000  # room for config, tokenizers and code, which take far less


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, or the plan of one after a dry run.

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
        """Bytes of all tensors."""
        return sum(self.weight_files.values())


def write_checkpoint(
    out: str | os.PathLike[str],
    tensors: Mapping[str, PlannedTensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    write_small_files: Callable[[Path], None],
    model_class: Any,
    processor_class: Any,
    overwrite: bool,
    dry_run: bool,
    progress: bool,
    note: Mapping[str, Any] | None = None,
) -> Conversion:
    """Write a folder, whole or not at all, and check that its model loads from it and its processor fits the model.

    Parameters
    ----------
    out : str or path
        The folder.
    tensors : mapping of str to PlannedTensor
        The weights.
    dtype : torch.dtype
        The type that most weights have.
    max_shard_bytes : int
        Size of the largest weight file.
    write_small_files : callable
        Writes everything but the weights into the folder that it is given.
    model_class, processor_class : type
        The classes of transformers or ours that have to load the folder.
    overwrite, dry_run, progress : bool
        As for `convert`.
    note : mapping, optional
        Content of the recipe file; the digest of the weights is added.

    Raises
    ------
    ValueError
        If the written folder lacks a tensor of the model, or its processor writes a wrong number of placeholders.
    OSError
        If the target exists or the disk is full.
    """
    shards = Shards(tensors, max_shard_bytes)
    needed = sum(shards.sizes.values()) + _SMALL_BYTES
    final = check_target(out, needed_bytes=needed, overwrite=overwrite)
    of_clip = sum(name.startswith(CLIP_NAMES) for name in tensors)
    result = Conversion(final, shards.sizes, dtype, len(tensors) - of_clip, of_clip, written=not dry_run)
    if dry_run:
        return result
    with new_folder(out, needed_bytes=needed, overwrite=overwrite) as temporary:
        with quiet():
            # First: saving a model removes weight files that it did not write.
            write_small_files(temporary)
        shards.write(temporary, progress=progress)
        if note is not None:
            # Whoever trains on in this folder makes it another model, which the recipe's card says nothing about.
            weights = Checkpoint.from_folder(temporary, str(temporary)).digest()
            (temporary / RECIPE_FILE).write_text(json.dumps({**note, "weights": weights}, indent=1) + "\n")
        with quiet():
            _check_loads(temporary, model_class, processor_class)
    return result


def save_without_weights(model: Any, processor: Any, folder: Path) -> None:
    """Save config, `auto_map`, code and processor the way transformers does."""
    model.save_pretrained(folder, state_dict={})
    processor.save_pretrained(folder)


def copy_beside(source: Path, target: Path) -> None:
    """Copy the generation settings and the terms of use, which belong neither to the config nor to the processor."""
    for pattern in ("generation_config.json", *TERMS):
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def check_not_source(out: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Raise ValueError if writing to `out` would replace a folder or file that is read from."""
    target = Path(os.path.realpath(Path(out).expanduser()))
    for source in sources:
        path = None if source is None else Path(os.path.realpath(Path(source).expanduser()))
        if path is not None and path.exists() and (path == target or target in path.parents):
            raise ValueError(f"{out} is, or holds, {source}, which is read from; choose another folder to write")


def _check_loads(folder: Path, model_class: Any, processor_class: Any) -> None:
    """Raise ValueError unless weights and processor in a folder are exactly the model's; no weight is read."""
    model, info = model_class.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading_info(info, str(folder))
    check_placeholders(processor_class.from_pretrained(folder), model.config, folder)
