"""CLIP's text tower and projection choose tokens and are never trained (Fig. 2): layers that tools leave alone."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection


class FrozenLinear(nn.Module):
    """A linear layer that adapters and quantisers do not take for one of theirs.

    They look for `nn.Linear`. An adapter here would get no gradient, since none comes through a choice of tokens, and a
    quantised layer would move the cosines that the key words hang on (Eq. 6). Weights and names are those of
    `nn.Linear`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer: (..., in_features) to (..., out_features)."""
        return nn.functional.linear(hidden_states, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the layer's size for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FrozenCLIPTextModel(CLIPTextModel):
    """`CLIPTextModel` of frozen layers."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_frozen(module)


class FrozenCLIPTextModelWithProjection(CLIPTextModelWithProjection):
    """`CLIPTextModelWithProjection` of frozen layers."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_frozen(module)


_FROZEN = {
    CLIPTextModel: FrozenCLIPTextModel,
    CLIPTextModelWithProjection: FrozenCLIPTextModelWithProjection,
    nn.Linear: FrozenLinear,
}


def init_frozen(module: nn.Module) -> None:
    """Draw the weights of a `FrozenLinear` that a checkpoint lacks; leave other modules alone."""
    if isinstance(module, FrozenLinear):
        init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)


def freeze(module: Any) -> Any:
    """Freeze CLIP's text tower or a projection in place, and make its layers frozen ones; returns the module."""
    module.requires_grad_(False)
    for part in module.modules():
        part.__class__ = _FROZEN.get(type(part), type(part))
    return module
