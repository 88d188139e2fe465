"""Work that is replayed as CUDA graphs, for small batches: there Python's launches take longer than the GPU's work.

A graph is recorded when shapes come a second time, and is valid for tensors at the same addresses: inputs are copied to
where it was recorded, outputs are copied from there.
"""

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

logger = logging.get_logger(__name__)

Function = Callable[..., Any]
"""From tensors by name to dataclasses, lists or dicts of tensors; launches, and never asks the device for a value."""


class Recorded:
    """A function, recorded for inputs of some shapes.

    Parameters
    ----------
    function : callable
    inputs : mapping of str to Tensor
    pool : any
        Of memory, from `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, function: Function, inputs: Mapping[str, torch.Tensor], pool: Any) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        # Libraries allocate when they are first called on a stream, which a recording does not allow.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(**self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(**self.inputs)

    def run(self) -> Any:
        """Do the work on what `inputs` hold; the outputs are overwritten when it is done again."""
        self.graph.replay()
        return self.outputs


class Graphs:
    """The last shapes that came, and recordings for those that came before. Threads wait for each other.

    Parameters
    ----------
    limit : int
        Recordings that are kept; each holds its outputs, for a prompt the size of its KV cache.
    """

    record = Recorded

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._busy = threading.RLock()
        self.forget()

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return type(self)(self.limit)

    def __reduce__(self) -> Any:
        return type(self), (self.limit,)

    def __len__(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Drop all recordings, as the weights are not where they were."""
        self._seen: dict[Hashable, None] = {}
        self._refused: set[Hashable] = set()
        self._recorded: dict[Hashable, Any] = {}
        self._parts: list[tuple[Any, str, nn.Module]] = []
        self._weights: list[tuple[Any, str, int]] = []
        self._pool: Any = None

    def serve(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether work on these inputs can be replayed now: on one GPU, without gradients, autocast or a recording."""
        devices = {value.device for value in inputs.values()}
        return (
            len(devices) == 1
            and devices.pop().type == "cuda"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(self, module: Any, what: Hashable, function: Function, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What a function makes of inputs: at first by calling it, then by replaying it.

        Parameters
        ----------
        module : Module
            Whose weights the function reads: once one of them is another tensor, all recordings are dropped.
        what : hashable
            Everything besides shapes that the function depends on.
        function : callable
        inputs : mapping of str to Tensor

        Returns
        -------
        any
            Outputs of its own, which nothing overwrites.
        """
        shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in inputs.items())
        with self._busy:
            return self._run(module, (what, torch.is_inference_mode_enabled(), shapes), function, inputs)

    def _run(self, module: nn.Module, key: Hashable, function: Function, inputs: Mapping[str, torch.Tensor]) -> Any:
        if any(there.get(name) is not part for there, name, part in self._parts) or any(
            there.get(name) is None or there[name].data_ptr() != at for there, name, at in self._weights
        ):
            self.forget()
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            if key not in self._seen or key in self._refused:
                self._seen[key] = None
                _forget_first(self._seen, 16 * self.limit)
                return function(**inputs)
            if not self._weights:
                self._parts, self._weights = _parts(module), _addresses(module)
            try:
                recorded = self._record(function, inputs)
            except torch.OutOfMemoryError:
                logger.warning("A prompt is not recorded as a CUDA graph, as memory ran out")
                self._refused.add(key)
                return function(**inputs)
            except RuntimeError as error:
                logger.warning(f"CUDA graphs are given up, as a recording failed: {error}")
                self.limit = 0
                self.forget()
                return function(**inputs)
        self._recorded[key] = recorded
        _forget_first(self._recorded, self.limit)
        for name, value in inputs.items():
            recorded.inputs[name].copy_(value)
        return tree_map_only(torch.Tensor, torch.clone, recorded.run())

    def _record(self, function: Function, inputs: Mapping[str, torch.Tensor]) -> Any:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self.record(function, inputs, self._pool)


def _parts(module: nn.Module) -> list[tuple[Any, str, nn.Module]]:
    """Which modules a module is made of."""
    return [
        (one._modules, name, part)
        for one in module.modules()
        for name, part in one._modules.items()
        if part is not None
    ]


def _addresses(module: nn.Module) -> list[tuple[Any, str, int]]:
    """Where the weights and buffers of a module are."""
    return [
        (tensors, name, tensor.data_ptr())
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _forget_first(entries: dict[Hashable, Any], limit: int) -> None:
    while len(entries) > limit:
        del entries[next(iter(entries))]
