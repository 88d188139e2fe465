"""Work that is replayed as CUDA graphs, for small batches: there Python's launches take longer than the GPU's work.

Which work is recorded, and until when it is valid; `graph_recording` has the recordings themselves.
"""

import operator
import threading
from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers.utils import logging

from .graph_recording import Function, Packing, Recorded, SharedMemory
from .own_layers import computes_from_weights, is_patched

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

    record, memory = Recorded, SharedMemory

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
