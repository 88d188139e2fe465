"""The test whether a module's weights alone decide what it computes: its results may then be kept or replayed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registry

_KNOWN_LAYERS = {"torch", "transformers", "bitsandbytes", __name__.partition(".")[0]}
"""Libraries whose layers compute from their weights. Layers of others, such as adapters, may have switches besides."""

_IDLE_HOOKS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}
"""Modules whose hooks transformers leaves behind: for hidden states and for gradients, when somebody wants them."""


def is_patched(modules: Iterable[nn.Module]) -> bool:
    """Return whether a call of one of these modules runs anything other than its class's own forward.

    That is so with hooks, with a `forward` of the instance's own, and with a compiled one.
    """
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return True
    hooks: list[Any] = []
    for module in modules:
        compiled = module._compiled_call_impl is not None or type(module).__module__.startswith("torch._dynamo")
        # accelerate replaces forwards, too, to move inputs to where the weights are.
        if compiled or ("forward" in module.__dict__ and "_hf_hook" not in module.__dict__):
            return True
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) not in _IDLE_HOOKS for hook in hooks)


def computes_from_weights(module: nn.Module, device: torch.device | None = None) -> bool:
    """Return whether only its weights and inputs decide what a module computes, as far as can be told.

    Parameters
    ----------
    module : Module
    device : torch.device, optional
        Require, besides, that all of its weights are on this device, as tensors of floating point or int64.
    """
    modules = list(module.modules())
    if is_patched(modules) or any(type(part).__module__.partition(".")[0] not in _KNOWN_LAYERS for part in modules):
        return False
    weights = list(module.parameters())
    # Replicas have no weights of their own, and wrapped ones no address.
    if not weights or not all(weight.data_ptr() for weight in weights):
        return False
    if device is None:
        return True
    return all(
        tensor.device == device
        and type(tensor) in (nn.Parameter, torch.Tensor)
        and (tensor.is_floating_point() or tensor.dtype == torch.int64)
        for tensor in (*weights, *module.buffers())
    )
