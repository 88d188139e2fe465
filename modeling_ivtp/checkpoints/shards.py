"""Tensors on their way from one checkpoint into another: split into files, written one by one, read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..files.console import progress_bar
from .weights import INDEX_FILE, Checkpoint, TensorInfo, write_safetensors


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its entry in the file's header, and a function that reads it when its turn comes."""

    info: TensorInfo
    read: Callable[[], Tensor]


class Shards:
    """The split of tensors into weight files.

    Parameters
    ----------
    tensors : mapping of str to PlannedTensor
    max_bytes : int
        Size of the largest file.
    """

    def __init__(self, tensors: Mapping[str, PlannedTensor], max_bytes: int) -> None:
        self._tensors = tensors
        self._split = split_torch_state_dict_into_shards(
            {name: meta_tensor(tensor.info) for name, tensor in tensors.items()}, max_shard_size=max_bytes
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of tensors in each file."""
        return {
            file: sum(self._tensors[name].info.nbytes for name in names)
            for file, names in self._split.filename_to_tensors.items()
        }

    def write(self, folder: Path, *, progress: bool) -> None:
        """Write all files, and their index if there are several; then read the headers back.

        Raises
        ------
        OSError
            If the file system refuses, or the headers differ from what was written.
        """
        with progress_bar(sum(self.sizes.values()), progress) as wrote:
            for file, names in self._split.filename_to_tensors.items():
                infos = {name: self._tensors[name].info for name in names}
                write_safetensors(folder / file, infos, lambda name: self._tensors[name].read(), wrote)
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written = Checkpoint.from_folder(folder, str(folder)).tensors
        planned = {name: (tensor.info.dtype, tensor.info.shape) for name, tensor in self._tensors.items()}
        if {name: (info.dtype, info.shape) for name, info in written.items()} != planned:
            raise OSError(f"the weights in {folder} are not those that were written; is the disk sound?")


def meta_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor without data."""
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
