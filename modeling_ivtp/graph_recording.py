"""One recording: work that was launched once into a CUDA graph, and is done again on other inputs.

A graph is valid for tensors at the same addresses: inputs are copied to where it was recorded, outputs from where it
leaves them. All recordings leave them in the same memory, so that many of them take little more than the largest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Function = Callable[..., Any]
"""From tensors by name to a tree of tensors, as pytree knows them; launches, and never asks the device for a value."""

_SPARE = 2**28
"""Bytes by which the room for outputs is at most larger than was asked for."""


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies in the memory of its type: the elements from `start`, in this shape."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, memory: Mapping[torch.dtype, torch.Tensor]) -> torch.Tensor:
        return memory[self.dtype][self.start : self.start + self.shape.numel()].view(self.shape)


class Packing:
    """How outputs lie one behind the other, all of a type in one piece of memory, so that one copy takes them along.

    Parameters
    ----------
    outputs : tree of tensors and constants
        Such as those to be packed, for their shapes and types.
    """

    def __init__(self, outputs: Any) -> None:
        self.leaves, self.form = tree_flatten(outputs)
        self.order: dict[torch.dtype, list[int]] = {}
        self.sizes: dict[torch.dtype, int] = {}
        tensors = [place for place, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        # Kernels read 16 bytes at a time: what would leave the next one askew comes last.
        for place in sorted(tensors, key=lambda place: self.leaves[place].nbytes % 16 != 0):
            shape, dtype = self.leaves[place].shape, self.leaves[place].dtype
            start = self.sizes.get(dtype, 0)
            self.leaves[place] = _Piece(start, shape, dtype)
            self.order.setdefault(dtype, []).append(place)
            self.sizes[dtype] = start + shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    def pack(self, outputs: Any, memory: Mapping[torch.dtype, torch.Tensor]) -> None:
        """Copy outputs into memory, of each type as much as `sizes` says."""
        leaves, _ = tree_flatten(outputs)
        for dtype, places in self.order.items():
            torch.cat([leaves[place].reshape(-1) for place in places], out=memory[dtype])

    def unpack(self, memory: Mapping[torch.dtype, torch.Tensor]) -> Any:
        """The outputs that lie in memory: views of it."""
        found = [leaf.of(memory) if isinstance(leaf, _Piece) else leaf for leaf in self.leaves]
        return tree_unflatten(found, self.form)


class SharedMemory:
    """What the recordings of a device have in common: a pool for what they work on, room for what they put out.

    Each starts when the one before is done with it, whatever streams they are run on. All are recorded on one stream,
    for which libraries hold memory of their own.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.free = torch.cuda.Event()
        self._rooms: dict[torch.dtype, torch.Tensor] = {}

    def room(self, sizes: Mapping[torch.dtype, int], device: torch.device) -> dict[torch.dtype, torch.Tensor]:
        """Room for as many elements of each type; what is too small is replaced, for recordings that follow."""
        for dtype, size in sizes.items():
            if dtype not in self._rooms or self._rooms[dtype].numel() < size:
                # More than is asked for, so that a little more the next time does not take as much again. Not made for
                # inference alone, as it would be here: some prompts come in inference mode, and some without gradients.
                with torch.inference_mode(False):
                    spare = min(size // 2, _SPARE // dtype.itemsize)
                    self._rooms[dtype] = torch.empty(size + spare, dtype=dtype, device=device)
        return {dtype: self._rooms[dtype][:size] for dtype, size in sizes.items()}


class Recorded:
    """A function, recorded for inputs of some shapes.

    Parameters
    ----------
    function : callable
    inputs : mapping of str to Tensor
    packing : Packing
        Of its outputs.
    memory : SharedMemory
    """

    def __init__(
        self, function: Function, inputs: Mapping[str, torch.Tensor], packing: Packing, memory: SharedMemory
    ) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.packing, self.memory, self.runs = packing, memory, 0
        self.outputs = memory.room(packing.sizes, next(iter(inputs.values())).device)
        self.graph = torch.cuda.CUDAGraph()
        self.made_on = torch.cuda.current_stream()
        try:
            # Other threads may go on with work of their own meanwhile.
            with torch.cuda.graph(
                self.graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"
            ):
                packing.pack(function(**self.inputs), self.outputs)
        except BaseException:
            torch.cuda.set_stream(self.made_on)  # PyTorch stays on the other one
            raise

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Do the work on inputs of the same shapes; outputs that nothing overwrites."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.memory.free)
        self.runs += 1
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        if stream != self.made_on:
            for held in (*self.inputs.values(), *self.outputs.values()):
                held.record_stream(stream)  # lest it is given away, when this is dropped, before the stream is done
        self.graph.replay()
        taken = {dtype: room.clone() for dtype, room in self.outputs.items()}
        self.memory.free.record(stream)
        return self.packing.unpack(taken)
