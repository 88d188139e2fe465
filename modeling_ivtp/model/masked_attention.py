"""Attention in training with learned pruners: all tokens stay, and each counts as a key by its weight.

Dropping tokens has no gradient, and rows that keep different numbers do not form a batch. So while a pruner is trained,
a visual token's weight multiplies what its key gets of every other token's attention (DynamicViT; LVPruning Eq. 7 to 9,
ATP-LLaVA Sec. 3.3.2). With weights of 0 and 1 the others see what they would see if the token were gone.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import repeat_kv

EPSILON = 1e-6
"""Constant that is added to a row's sum, in equal parts to each key that the row sees."""


def masked_softmax(logits: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Normalise rows of logits, with each key counted by its weight and a token's own key counted in full.

    `(exp(a - max a) M + ε / n) / (sum exp(a - max a) M + ε)` over the n keys that a row sees, with M_ij = 1 for i = j
    and the weight of j otherwise (LVPruning Eq. 7, 9). It is differentiable at weights of 0, which adding log M to the
    logits is not. The maximum is that of the keys that count at all: if a token of weight 0 had it, the others' sum
    could be as small as ε. The derivative by a weight of 0 is bounded by 1 / ε.

    Parameters
    ----------
    logits : Tensor (B, H, n, n)
    weights : Tensor (B, n)
        From 0 to 1.
    visible : bool Tensor (B or 1, 1, n, n)
        Which keys each query sees; its own is always seen.

    Returns
    -------
    Tensor (B, H, n, n)
        In float32 at least. Rows sum to one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    visible = visible | itself
    factors = weights.to(logits.dtype)[:, None, None].masked_fill(itself, 1.0)
    logits = logits.masked_fill(~visible, float("-inf"))
    most = logits.detach().masked_fill(factors == 0, float("-inf")).amax(-1, keepdim=True)
    shares = (logits - most).clamp_max(-math.log(EPSILON)).exp() * factors
    even = EPSILON * visible / visible.sum(-1, keepdim=True)
    return (shares + even) / (shares.sum(-1, keepdim=True) + EPSILON)


def masked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    weights: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as transformers' attention functions do, with keys counted by weights.

    Parameters
    ----------
    module : Module
        The attention layer.
    query : Tensor (B, H, n, dh)
    key, value : Tensor (B, H_kv, n, dh)
    attention_mask : Tensor (B or 1, 1, n, n), or (B, n), or None
        The layer's mask, as any attention implementation gets it: bool or added, with causality or of padding alone.
    weights : Tensor (B, n)
    scaling : float
        Factor of the products of queries and keys.
    dropout : float, default 0

    Returns
    -------
    output : Tensor (B, n, H, dh)
    attention : Tensor (B, H, n, n)
    """
    repeats = query.shape[1] // key.shape[1]
    logits = query @ repeat_kv(key, repeats).transpose(2, 3) * scaling
    attention = masked_softmax(logits, weights.to(query.device), _visible(attention_mask, logits))
    attention = nn.functional.dropout(attention, dropout, module.training)
    output = attention.to(value.dtype) @ repeat_kv(value, repeats)
    return output.transpose(1, 2).contiguous(), attention


def _visible(mask: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Return which keys each query sees, by the mask that a layer gets: bool (B or 1, 1, n, n)."""
    size = logits.shape[-1]
    if mask is not None and mask.dim() == 4:
        return mask[..., :size] if mask.dtype == torch.bool else mask[..., :size] > torch.finfo(mask.dtype).min / 2
    causal = torch.ones(size, size, dtype=torch.bool, device=logits.device).tril()[None, None]
    return causal if mask is None else causal & mask[:, None, None].bool()
