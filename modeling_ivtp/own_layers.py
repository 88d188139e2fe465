"""Whether what a module computes follows from its weights: then it may be kept, or replayed, until one changes."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules import module as registry

_KNOWN_LAYERS = {"torch", "transformers", "bitsandbytes", __name__.partition(".")[0]}
"""Libraries whose layers do. Those of others, such as adapters, may be switched without a change of weights."""

_IDLE_HOOKS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}
"""Where hooks are from that transformers leaves behind: for hidden states, and for gradients, when those are wanted."""


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody looks into a forward of one of these modules, or of all there are."""
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return True
    hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks) if hooks]
    return any(getattr(hook, "__module__", None) not in _IDLE_HOOKS for found in hooks for hook in found.values())


def computes_from_weights(module: nn.Module, device: torch.device | None = None) -> bool:
    """Whether nothing but its weights and inputs decides what a module computes, as far as can be told.

    Parameters
    ----------
    module : Module
    device : torch.device, optional
        Whether, besides, all of its weights are there, as tensors of floating point.
    """
    modules = list(module.modules())
    if has_hooks(modules) or any(type(one).__module__.partition(".")[0] not in _KNOWN_LAYERS for one in modules):
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
