"""CUDA graphs: work is captured when its shapes come again, and replayed on other inputs from then on.

A graph is valid for tensors at the same addresses. So inputs are copied to where they were when it was captured, and
outputs are copied from where it leaves them. All graphs leave their outputs in the same memory, so that many graphs
take little more than the largest one.
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

logger = logging.get_logger(__name__)

Function = Callable[..., Any]
"""From tensors by name to a tree of tensors, as pytree knows them; it must never ask the device for a value."""

AUTOMATIC_SHARE = 64
"""Graphs that nobody asked for take at most one part in so many of the GPU's memory."""

_SIGHTINGS = 2
"""Times that shapes have to come until their work is captured."""

_SPARE = 2**28
"""Most bytes by which the memory for outputs exceeds what is needed."""


@dataclass(frozen=True)
class _Piece:
    """Place of a tensor in the memory of its type: the elements from `start` on, in this shape."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, memory: Mapping[torch.dtype, torch.Tensor]) -> torch.Tensor:
        return memory[self.dtype][self.start : self.start + self.shape.numel()].view(self.shape)


class Packing:
    """Layout of outputs one after the other, all of a type in one tensor, so that one copy takes all of them.

    Parameters
    ----------
    outputs : tree of tensors and constants
        An example, for its shapes and types.
    """

    def __init__(self, outputs: Any) -> None:
        self.leaves, self.form = tree_flatten(outputs)
        self.order: dict[torch.dtype, list[int]] = {}
        self.sizes: dict[torch.dtype, int] = {}
        tensors = [number for number, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        # Kernels read 16 bytes at a time: a tensor after which the next one would not be aligned comes last.
        for number in sorted(tensors, key=lambda number: self.leaves[number].nbytes % 16 != 0):
            shape, dtype = self.leaves[number].shape, self.leaves[number].dtype
            start = self.sizes.get(dtype, 0)
            self.leaves[number] = _Piece(start, shape, dtype)
            self.order.setdefault(dtype, []).append(number)
            self.sizes[dtype] = start + shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    def pack(self, outputs: Any, memory: Mapping[torch.dtype, torch.Tensor]) -> None:
        """Copy outputs into memory, which has `sizes` elements of each type."""
        leaves, _ = tree_flatten(outputs)
        for dtype, numbers in self.order.items():
            torch.cat([leaves[number].reshape(-1) for number in numbers], out=memory[dtype])

    def unpack(self, memory: Mapping[torch.dtype, torch.Tensor]) -> Any:
        """Return the outputs that lie in memory, as views of it."""
        leaves = [leaf.of(memory) if isinstance(leaf, _Piece) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.form)


class SharedMemory:
    """Memory that the graphs of a device share: a pool for their work, and room for their outputs.

    Each graph starts when the one before has finished, whatever streams they run on. All are captured on one stream,
    because libraries hold memory for each stream.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.free = torch.cuda.Event()
        self._rooms: dict[torch.dtype, torch.Tensor] = {}

    def room(self, sizes: Mapping[torch.dtype, int], device: torch.device) -> dict[torch.dtype, torch.Tensor]:
        """Return memory for so many elements of each type, and replace what is too small for later graphs."""
        for dtype, size in sizes.items():
            if dtype not in self._rooms or self._rooms[dtype].numel() < size:
                # More than needed, so that a slightly larger graph does not take as much again. It must not be an
                # inference tensor: some prompts come in inference mode, and some only without gradients.
                with torch.inference_mode(False):
                    spare = min(size // 2, _SPARE // dtype.itemsize)
                    self._rooms[dtype] = torch.empty(size + spare, dtype=dtype, device=device)
        return {dtype: self._rooms[dtype][:size] for dtype, size in sizes.items()}


class CapturedGraph:
    """A function, captured for inputs of some shapes.

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
        self.stream = torch.cuda.current_stream()
        try:
            # Other threads may go on with work of their own meanwhile.
            with torch.cuda.graph(
                self.graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"
            ):
                packing.pack(function(**self.inputs), self.outputs)
        except BaseException:
            torch.cuda.set_stream(self.stream)  # PyTorch stays on the other one
            raise

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Replay the work on inputs of the same shapes and return outputs that nothing overwrites."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.memory.free)
        self.runs += 1
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        if stream != self.stream:
            # Otherwise their memory could be reused, once this graph is dropped, before the stream is done with it.
            for tensor in (*self.inputs.values(), *self.outputs.values()):
                tensor.record_stream(stream)
        self.graph.replay()
        outputs = {dtype: room.clone() for dtype, room in self.outputs.items()}
        self.memory.free.record(stream)
        return self.packing.unpack(outputs)


class Graphs:
    """Captured graphs by the shapes of their inputs, and the shapes that came lately. Threads wait for each other.

    Parameters
    ----------
    limit : int
        Graphs that are kept.
    automatic : bool, default False
        Whether nobody asked for graphs. Then only work that is small beside the GPU's memory is captured, of modules
        whose weights alone decide what they compute.
    """

    capture, memory = CapturedGraph, SharedMemory

    def __init__(self, limit: int, automatic: bool = False) -> None:
        self.limit, self.automatic = limit, automatic
        self._lock = threading.RLock()
        self.forget()

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return type(self)(self.limit, self.automatic)

    def __reduce__(self) -> Any:
        return type(self), (self.limit, self.automatic)

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Drop all graphs, because the weights are at other addresses."""
        self._seen: dict[Hashable, int] = {}
        self._sightings = _SIGHTINGS
        self._refused: set[Hashable] = set()
        self._captured: dict[Hashable, Any] = {}
        self._parts: list[nn.Module] = []
        self._children: list[tuple[Any, list[Any]]] = []
        self._weights: list[tuple[Any, list[Any]]] = []
        self._memory: dict[torch.device, Any] = {}

    def can_replay(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Return whether work on these inputs can be replayed.

        They must be on one GPU, and neither gradients, autocast nor another capture may be active.
        """
        devices = {value.device for value in inputs.values()}
        return (
            len(devices) == 1
            and devices.pop().type == "cuda"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(
        self,
        module: Any,
        variant: Hashable,
        function: Function,
        inputs: Mapping[str, torch.Tensor],
        work_bytes: int = 0,
    ) -> Any:
        """Replay a function on inputs, or capture it if its shapes came before.

        Parameters
        ----------
        module : Module
            Whose weights the function reads. Once one of them is another tensor, all graphs are dropped. With a hook
            anywhere in it, or a forward of an instance's own, nothing is replayed, because a graph would not call them.
        variant : hashable
            Everything besides shapes that the function depends on.
        function : callable
        inputs : mapping of str to Tensor
        work_bytes : int, default 0
            Estimate of the bytes that the work and its outputs take besides the weights.

        Returns
        -------
        any
            Outputs that nothing overwrites. None: nothing ran, and the caller has to do the work.
        """
        shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in inputs.items())
        device = next(iter(inputs.values())).device
        # A graph is of the current GPU, which need not be the model's.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._lock, on_device:
            key = (variant, _kernel_settings(), shapes)
            if not all(map(_has_same_children, self._children)) or not all(map(_has_same_weights, self._weights)):
                self.forget()
            if not self.limit or key in self._refused or is_patched([module, *self._parts]):
                return None
            graph = self._captured.pop(key, None)
            if graph is not None:
                self._captured[key] = graph
                return graph.run(inputs)
            sightings = self._seen.pop(key, 0) + 1
            if sightings >= self._sightings:
                return self._run_and_capture(module, key, function, inputs, work_bytes)
            self._seen[key] = sightings
            while len(self._seen) > 16 * max(1, self.limit):
                del self._seen[next(iter(self._seen))]
            return None

    def _run_and_capture(
        self, module: nn.Module, key: Hashable, function: Function, inputs: Mapping[str, torch.Tensor], work_bytes: int
    ) -> Any:
        """Do the work and capture it. None: it cannot be captured, and did not run."""
        parts, device = list(module.modules()), next(iter(inputs.values())).device
        if is_patched(parts):
            return None
        if not self._weights:
            self._remember(parts)
        fits = not self.automatic or (computes_from_weights(module, device) and self.has_room(work_bytes, device))
        if not fits or next(module.parameters(), None) is None:
            self._refuse(key)
            return None
        if device not in self._memory:
            self._memory[device] = self.memory()
        memory = self._memory[device]
        try:
            outputs = self.warm_up(function, inputs, memory)
        except RuntimeError:
            self._refuse(key)  # if it was not a lack of memory, the caller meets the same error without graphs
            return None
        try:
            self._captured[key] = self.capture(function, inputs, Packing(outputs), memory)
        except torch.OutOfMemoryError:
            logger.warning("A prompt is not captured as a CUDA graph, as memory ran out")
            self._refuse(key)
        except Exception as error:  # the outputs are there, whatever it is
            logger.warning(f"CUDA graphs are given up, as capturing failed: {error}")
            self.limit = 0
            self.forget()
        while len(self._captured) > self.limit:
            dropped = self._captured.pop(next(iter(self._captured)))
            # Capturing takes longer than running: after an unused graph, shapes have to come more often.
            self._sightings = self._sightings if dropped.runs else min(2 * self._sightings, 1024)
        return outputs

    def _remember(self, parts: list[nn.Module]) -> None:
        """Keep the parts of a module and where their weights are, to notice when they change."""
        self._parts = parts[1:]  # without the module itself, which holds this object
        self._children = [(part._modules, list(part._modules.values())) for part in parts]
        tensors = [held for part in parts for held in (part._parameters, part._buffers)]
        self._weights = [(held, _addresses(held)) for held in tensors]

    def _refuse(self, key: Hashable) -> None:
        if len(self._refused) >= 16 * max(1, self.limit):
            self._refused.clear()
        self._refused.add(key)

    @staticmethod
    def warm_up(function: Function, inputs: Mapping[str, torch.Tensor], memory: Any) -> Any:
        """Run once on the capturing stream: libraries allocate at a first call, which a capture does not allow."""
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
    def has_room(work_bytes: int, device: torch.device) -> bool:
        """Return whether so many bytes are few beside a GPU's memory, and beside what is free of it."""
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return work_bytes <= total // AUTOMATIC_SHARE and 8 * work_bytes <= free + unused


def _kernel_settings() -> tuple[Hashable, ...]:
    """Return the PyTorch settings that decide which kernels run and what kind of tensors they make."""
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


def _has_same_children(known: tuple[Any, list[Any]]) -> bool:
    """Return whether a module has the children that it had."""
    children, before = known
    return len(children) == len(before) and all(map(operator.is_, children.values(), before))


def _has_same_weights(known: tuple[Any, list[Any]]) -> bool:
    """Return whether a module's weights are at the addresses where they were."""
    weights, before = known
    return _addresses(weights) == before


def _addresses(tensors: Mapping[str, torch.Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
