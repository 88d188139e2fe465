"""One recording: work that was launched once into a CUDA graph, and is done again on other inputs.

A graph is valid for tensors at the same addresses: inputs are copied to where it was recorded, outputs from where it
leaves them. All recordings leave them in the same memory, so that many of them take little more than the largest.
"""

import operator
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import logging

from .replayable import computes_from_weights, is_patched

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
    """How outputs lie one after the other, all of a type in one piece of memory, so that one copy takes them along.

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


class CapturedGraph:
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


logger = logging.get_logger(__name__)

AUTOMATIC_SHARE = 64
"""Unasked, work is recorded that takes at most one part in so many of the GPU's memory."""

_SIGHTS = 2
"""How often shapes have to come until their work is recorded."""


class Graphs:
    """The last shapes that came, and recordings for those that came before. Threads wait for each other.

    Parameters
    ----------
    limit : int
        Recordings that are kept.
    automatic : bool, default False
        Whether nobody asked for them: then work is recorded that is small beside the GPU's memory, of modules that
        compute from their weights alone.
    """

    record, memory = CapturedGraph, SharedMemory

    def __init__(self, limit: int, automatic: bool = False) -> None:
        self.limit, self.automatic = limit, automatic
        self._busy = threading.RLock()
        self.forget()

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return type(self)(self.limit, self.automatic)

    def __reduce__(self) -> Any:
        return type(self), (self.limit, self.automatic)

    def __len__(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Drop all recordings, as the weights are not where they were."""
        self._seen: dict[Hashable, int] = {}
        self._sights = _SIGHTS
        self._refused: set[Hashable] = set()
        self._recorded: dict[Hashable, Any] = {}
        self._parts: list[nn.Module] = []
        self._modules: list[tuple[Any, list[Any]]] = []
        self._weights: list[tuple[Any, list[Any]]] = []
        self._memory: dict[torch.device, Any] = {}

    def serve(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether work on these inputs can be replayed now: on one GPU, without gradients, autocast or a recording."""
        devices = {value.device for value in inputs.values()}
        return (
            len(devices) == 1
            and devices.pop().type == "cuda"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(
        self, module: Any, what: Hashable, function: Function, inputs: Mapping[str, torch.Tensor], taken: int = 0
    ) -> Any:
        """What a function makes of inputs, by replaying it.

        Parameters
        ----------
        module : Module
            Whose weights the function reads: once one of them is another tensor, all recordings are dropped. With a
            hook anywhere in it, or a forward of an instance's own, nothing is replayed, as those would not be called.
        what : hashable
            Everything besides shapes that the function depends on.
        function : callable
        inputs : mapping of str to Tensor
        taken : int, default 0
            Bytes that the work and its outputs take besides the weights; the caller's estimate.

        Returns
        -------
        any
            Outputs that nothing overwrites. None: it is not replayed, or not yet; do the work.
        """
        shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in inputs.items())
        device = next(iter(inputs.values())).device
        # A graph is of the current GPU, which need not be the model's.
        there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._busy, there:
            key = (what, _switches(), shapes)
            if not all(map(_unchanged, self._modules)) or not all(map(_in_place, self._weights)):
                self.forget()
            if not self.limit or key in self._refused or is_patched([module, *self._parts]):
                return None
            recorded = self._recorded.pop(key, None)
            if recorded is not None:
                self._recorded[key] = recorded
                return recorded.run(inputs)
            sights = self._seen.pop(key, 0) + 1
            if sights >= self._sights:
                return self._first(module, key, function, inputs, taken)
            self._seen[key] = sights
            while len(self._seen) > 16 * max(1, self.limit):
                del self._seen[next(iter(self._seen))]
            return None

    def _first(
        self, module: nn.Module, key: Hashable, function: Function, inputs: Mapping[str, torch.Tensor], taken: int
    ) -> Any:
        """Do the work and record it, where that can be."""
        parts, device = list(module.modules()), next(iter(inputs.values())).device
        if is_patched(parts):
            return None
        if not self._weights:
            # Without the module itself, which holds this.
            self._parts = parts[1:]
            self._modules = [(one._modules, list(one._modules.values())) for one in parts]
            held = [tensors for one in parts for tensors in (one._parameters, one._buffers)]
            self._weights = [(tensors, _addresses(tensors)) for tensors in held]
        fits = not self.automatic or (computes_from_weights(module, device) and self.has_room(taken, device))
        if not fits or next(module.parameters(), None) is None:
            self._refuse(key)
            return None
        if device not in self._memory:
            self._memory[device] = self.memory()
        memory = self._memory[device]
        try:
            outputs = self.warm_up(function, inputs, memory)
        except RuntimeError:
            self._refuse(key)  # who called gets the error without graphs, too, if it was not memory that ran out
            return None
        try:
            self._recorded[key] = self.record(function, inputs, Packing(outputs), memory)
        except torch.OutOfMemoryError:
            logger.warning("A prompt is not recorded as a CUDA graph, as memory ran out")
            self._refuse(key)
        except Exception as error:  # whatever it is, there is an answer
            logger.warning(f"CUDA graphs are given up, as a recording failed: {error}")
            self.limit = 0
            self.forget()
        while len(self._recorded) > self.limit:
            dropped = self._recorded.pop(next(iter(self._recorded)))
            # Recording takes longer than running: what came and went unused is a reason to look longer at what comes.
            self._sights = self._sights if dropped.runs else min(2 * self._sights, 1024)
        return outputs

    @staticmethod
    def warm_up(function: Function, inputs: Mapping[str, torch.Tensor], memory: Any) -> Any:
        """Libraries allocate when they are first called on a stream, which a recording does not allow."""
        memory.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(memory.stream):
                outputs = function(**inputs)
        finally:
            torch.cuda.current_stream().wait_stream(memory.stream)
        for leaf in tree_flatten(outputs)[0]:
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(torch.cuda.current_stream())
        return outputs

    @staticmethod
    def has_room(taken: int, device: torch.device) -> bool:
        """Whether so many bytes are few beside a GPU's memory, and beside what of it is free."""
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return taken <= total // AUTOMATIC_SHARE and 8 * taken <= free + unused

    def _refuse(self, key: Hashable) -> None:
        if len(self._refused) >= 16 * max(1, self.limit):
            self._refused.clear()
        self._refused.add(key)


def _switches() -> tuple[Hashable, ...]:
    """What of PyTorch's settings decides which kernels are launched, and what kind of tensors come of it."""
    backends: Any = torch.backends
    return (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.matmul.fp32_precision,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def _unchanged(known: tuple[Any, list[Any]]) -> bool:
    """Whether a module has the parts it had."""
    there, before = known
    return len(there) == len(before) and all(map(operator.is_, there.values(), before))


def _in_place(known: tuple[Any, list[Any]]) -> bool:
    """Whether the weights of a module are where they were."""
    there, before = known
    return _addresses(there) == before


def _addresses(tensors: Mapping[str, torch.Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
