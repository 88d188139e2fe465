"""Tensors on their way from one checkpoint into another: split into files, written one by one, read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..files.console import progress_bar
from .llava_source import empty
from .weights import INDEX_FILE, Checkpoint, TensorInfo, write_safetensors


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: what its header will say, and how to get it when its turn comes."""

    info: TensorInfo
    read: Callable[[], Tensor]


class Shards:
    """How tensors are split into weight files.

    Parameters
    ----------
    tensors : mapping of str to Planned
    max_bytes : int
        Largest file.
    """

    def __init__(self, tensors: Mapping[str, Planned], max_bytes: int) -> None:
        self._tensors = tensors
        self._split = split_torch_state_dict_into_shards(
            {name: empty(tensor.info) for name, tensor in tensors.items()}, max_shard_size=max_bytes
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
            What the file system says, or if what lies there then is not what was written.
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
