"""Whether what a module computes follows from its weights: then it may be kept, or replayed, until one changes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registry

_KNOWN_LAYERS = {"torch", "transformers", "bitsandbytes", __name__.partition(".")[0]}
"""Libraries whose layers do. Those of others, such as adapters, may be switched without a change of weights."""

_IDLE_HOOKS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}
"""Where hooks are from that transformers leaves behind: for hidden states, and for gradients, when those are wanted."""


def is_patched(modules: Iterable[nn.Module]) -> bool:
    """Whether more, or other work than a module's own forward is done when one of these is called.

    That is so with hooks, a `forward` of the instance's own, or one that is compiled.
    """
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return True
    hooks: list[Any] = []
    for one in modules:
        compiled = one._compiled_call_impl is not None or type(one).__module__.startswith("torch._dynamo")
        # accelerate replaces forwards, too, to move inputs to where the weights are.
        if compiled or ("forward" in one.__dict__ and "_hf_hook" not in one.__dict__):
            return True
        hooks += [*one._forward_hooks.values(), *one._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) not in _IDLE_HOOKS for hook in hooks)


def computes_from_weights(module: nn.Module, device: torch.device | None = None) -> bool:
    """Whether nothing but its weights and inputs decides what a module computes, as far as can be told.

    Parameters
    ----------
    module : Module
    device : torch.device, optional
        Whether, besides, all of its weights are there, as tensors of floating point.
    """
    modules = list(module.modules())
    if is_patched(modules) or any(type(one).__module__.partition(".")[0] not in _KNOWN_LAYERS for one in modules):
        return False
    weights = list(module.parameters())
    # Replicas have none of their own, and wrappers no address.
    if not weights or not all(weight.data_ptr() for weight in weights):
        return False
    if device is None:
        return True
    return all(
        held.device == device
        and type(held) in (nn.Parameter, torch.Tensor)
        and (held.is_floating_point() or held.dtype == torch.int64)
        for held in (*weights, *module.buffers())
    )
