"""Safetensors checkpoints, read and written one tensor at a time.

A checkpoint is a folder with `model.safetensors` or with numbered shards and their index, or a single file. Opening one
reads the headers alone, and each tensor is read when it is needed, so that a 7B model is never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..model.adapter import adapter_message

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_PATTERNS = (SINGLE_FILE, "model-*.safetensors", INDEX_FILE)

# The format's own names of the types (https://github.com/huggingface/safetensors#format).
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header: the file that holds it, its type and its shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, in the order in which reading them is fastest.

    Attributes
    ----------
    source : str
        The name or path that the user gave; every error names it.
    tensors : mapping of str to TensorInfo
        All tensors.
    folder : Path or None
        The folder of the files; None if only the headers were fetched from the Hub, so that no tensor can be read.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    folder: Path | None
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def loaded_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the weights once they are loaded as `dtype`; quantised ones stay as they are."""
        return sum(
            info.nbytes // info.dtype.itemsize * dtype.itemsize if info.dtype.is_floating_point else info.nbytes
            for info in self.tensors.values()
        )

    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, in the type it is stored in.

        Raises
        ------
        RuntimeError
            If only the headers were fetched.
        OSError
            If the file cannot be read.
        """
        if self.folder is None:
            raise RuntimeError(f"only the headers of {self.source} were fetched; {name} cannot be read")
        path = self.folder / self.tensors[name].file
        try:
            if str(path) not in self._open:
                # Shards are read one after the other: a single open one keeps the mapped memory at one shard.
                self._open.clear()
                self._open[str(path)] = safe_open(path, framework="pt", device="cpu")
            return self._open[str(path)].get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{path} is damaged: {error}") from error

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point type that most bytes are stored in; float32 if there is none."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def digest(self) -> str:
        """Hash names, types, shapes and numbers of the weights; the split into files does not matter.

        Returns
        -------
        str
            64 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {DTYPE_NAMES[info.dtype]} {info.shape}".encode())
            digest.update(self.read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a single safetensors file.

        Raises
        ------
        OSError
            If the file is missing, truncated or not a safetensors file.
        """
        path = Path(path)
        return cls(str(path), _read_header(path), path.parent)

    @classmethod
    def from_folder(cls, folder: Path, source: str) -> Checkpoint:
        """Open a folder with one safetensors file, or with shards and their index, and read every header.

        Raises
        ------
        ValueError
            If the folder holds weights in another format, or none.
        OSError
            If a shard is missing, truncated or lacks a tensor that the index promises.
        """
        if (folder / SINGLE_FILE).is_file():
            return cls(source, _read_header(folder / SINGLE_FILE), folder)
        if not (folder / INDEX_FILE).is_file():
            raise ValueError(no_safetensors(source, [path.name for path in folder.iterdir()], folder))
        shards = _read_index(folder / INDEX_FILE)
        tensors: dict[str, TensorInfo] = {}
        for file, names in shards.items():
            header = _read_header(folder / file)
            _check_promised(folder / file, names, header)
            wanted = set(names)
            tensors.update((name, info) for name, info in header.items() if name in wanted)
        return cls(source, tensors, folder)


def check_weights(folder: Path, source: str) -> None:
    """Check by their headers that a folder's safetensors files are whole.

    Raises
    ------
    ValueError
        If the folder holds weights in another format, or none; the message names `source`.
    OSError
        Naming the file that is missing or damaged, shorter or longer than its header says, or without a tensor that
        the index promises.
    """
    if (folder / SINGLE_FILE).is_file():
        shards: dict[str, list[str]] = {SINGLE_FILE: []}
    elif (folder / INDEX_FILE).is_file():
        shards = _read_index(folder / INDEX_FILE)
    else:
        raise ValueError(no_safetensors(source, [path.name for path in folder.iterdir()], folder))
    for file, promised in shards.items():
        with _opened(folder / file) as weights:
            _check_promised(folder / file, promised, set(weights.keys()))


def no_safetensors(source: str, files: Collection[str], folder: Path | None = None) -> str:
    """Return the message about a repository, or a local `folder`, without safetensors weights among its files."""
    if ADAPTER_CONFIG_NAME in files:
        return adapter_message(source, None if folder is None else folder / ADAPTER_CONFIG_NAME)
    others = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")))
    found = f"only {', '.join(others[:3])}" if others else "no weights at all"
    return (
        f"{source} has no {SINGLE_FILE} and no {INDEX_FILE} ({found}); other formats can run code when they are opened "
        "and are not read: load the model with transformers and save it with model.save_pretrained(folder)"
    )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    wrote: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a safetensors file tensor by tensor, so that no more than one of them is in memory.

    Parameters
    ----------
    path : Path
        The new file.
    tensors : mapping of str to TensorInfo
        Names, types and shapes of the tensors; `file` is ignored.
    read : callable
        Returns a tensor by name; it is cast to the type in `tensors`.
    wrote : callable
        Called with the bytes of every piece that was written.

    Raises
    ------
    OSError
        If the file system refuses, for instance because the disk is full.
    ValueError
        If a tensor has another shape than in `tensors`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first: then every tensor of the file is aligned, whatever the mixture.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    offset = 0
    for name in names:
        info = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            tensor = read(name)
            if tuple(tensor.shape) != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tensors[name].shape}")
            _write_bytes(file, tensor.to(tensors[name].dtype), wrote)


def _write_bytes(file: BinaryIO, tensor: Tensor, wrote: Callable[[int], None], piece: int = 1 << 24) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), piece):
        written = file.write(data[start : start + piece])
        wrote(written)


def dtype_named(name: str, where: str) -> torch.dtype:
    """Return the type that a header calls `name`; ValueError names the file `where` it is unknown."""
    if name not in DTYPES:
        raise ValueError(f"{where} holds a tensor of type {name}; supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_promised(path: Path, promised: Iterable[str], present: Collection[str]) -> None:
    missing = [name for name in promised if name not in present]
    if missing:
        raise OSError(f"{path} lacks {len(missing)} tensors that {INDEX_FILE} promises: {missing[0]}…")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        return {
            name: TensorInfo(path.name, dtype_named(part.get_dtype(), str(path)), tuple(part.get_shape()))
            for name, part in slices.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file after checking that its header fits its size."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise OSError(f"{path} is truncated or not a safetensors file ({error}); fetch or save it again") from error


def _read_index(path: Path) -> dict[str, list[str]]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is not a readable index of safetensors shards") from error
    shards: dict[str, list[str]] = {}
    for name, file in items:
        # An index comes from strangers: a shard is a file of the same folder and nothing else.
        if not isinstance(file, str) or Path(file).name != file:
            raise OSError(f"{path} names {file!r} as a shard; a shard is a file in the same folder")
        shards.setdefault(file, []).append(name)
    return shards
