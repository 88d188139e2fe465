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
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do, with keys counted by weights and a token's own key in full.

    A row of attention is `(exp(a - max a) M + ε / n) / (sum exp(a - max a) M + ε)` over the n keys that it sees, with
    M_ij = 1 for i = j and the weight of j otherwise (LVPruning Eq. 7, 9); it sums to one. It is differentiable at
    weights of 0, which adding log M to the logits is not. The maximum is that of the keys that count at all: if a token
    of weight 0 had it, the others' sum could be as small as ε. The derivative by a weight of 0 is bounded by 1 / ε.
    Rows are computed in float32 at least. The backward pass computes the maps again: kept for it is the mask, which all
    layers share, and no map but what dropout drew.

    Parameters
    ----------
    module : Module
        The attention layer.
    query : Tensor (B, H, n, dh)
    key, value : Tensor (B, H_kv, n, dh)
    attention_mask : Tensor (B or 1, 1, n, n), or (B, n), or None
        The layer's mask, as any attention implementation gets it: bool or added, with causality or of padding alone. A
        token always sees itself.
    weights : Tensor (B, n)
        From 0 to 1.
    scaling : float
        Factor of the products of queries and keys.
    dropout : float, default 0

    Returns
    -------
    output : Tensor (B, n, H, dh)
    None
        In place of the attention maps.
    """
    repeats = query.shape[1] // key.shape[1]
    noise = None
    if dropout and module.training:
        shape = (*query.shape[:3], query.shape[2])
        noise = nn.functional.dropout(query.new_ones(shape), dropout)
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    output = _Attention.apply(query, key, value, weights.to(query.device), attention_mask, scaling, noise)
    return output.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """The attention of `masked_attention`, with its derivative by queries, keys, values and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        weights: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):  # as in the backward pass
            factors, even = _factors(query, weights, _visible(mask, query))
            logits = _logits(query, key, scaling)
            most = logits.masked_fill(factors == 0, float("-inf")).amax(-1, keepdim=True)
            shares = _exponentials(logits, most).mul_(factors)
            total = shares.sum(-1, keepdim=True).add_(EPSILON)
            attention = shares.add_(even).div_(total).to(value.dtype)
            ctx.save_for_backward(query, key, value, weights, mask, most, total, noise)
            ctx.scaling = scaling
            return (attention if noise is None else attention * noise) @ value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, mask, most, total, noise = ctx.saved_tensors
        visible = _visible(mask, query)
        factors, even = _factors(query, weights, visible)
        exponentials = _exponentials(_logits(query, key, ctx.scaling), most)
        attention = torch.addcmul(even, exponentials, factors).div_(total)
        of_attention = gradient @ value.transpose(2, 3)
        used = attention.to(value.dtype)
        if noise is not None:
            of_attention, used = of_attention * noise, used * noise
        of_value = used.transpose(2, 3) @ gradient
        of_attention = of_attention.to(attention.dtype)
        # By the quotient rule, of the unnormalised shares; then by the product rule, of their two factors.
        of_factors = of_attention.sub_(attention.mul_(of_attention).sum(-1, keepdim=True)).div_(total)
        of_factors = of_factors.mul_(exponentials)
        of_logits = (of_factors * factors).to(query.dtype)
        itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
        of_weights = of_factors.sum(1, keepdim=True).masked_fill_(itself | ~visible, 0.0).sum((1, 2))
        of_query = of_logits @ key * ctx.scaling
        of_key = of_logits.transpose(2, 3) @ query * ctx.scaling
        return of_query, of_key, of_value, of_weights.to(weights.dtype), None, None, None


def _logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    logits = query @ key.transpose(2, 3) * scaling
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _exponentials(logits: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return exp(a - max a), in the logits' place. Keys that do not count, which alone may be above, are bounded."""
    return logits.sub_(most).clamp_max_(-math.log(EPSILON)).exp_()


def _factors(query: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return M, 0 for keys out of sight, and the share of ε that each key in sight gets: both (B or 1, 1, n, n)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
    factors = weights.to(dtype)[:, None, None].masked_fill(itself, 1.0).masked_fill(~visible, 0.0)
    return factors, EPSILON * visible / visible.sum(-1, keepdim=True).to(dtype)


def _visible(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Return which keys each query sees, by the mask that a layer gets: bool (B or 1, 1, n, n)."""
    size, device = query.shape[2], query.device
    itself = torch.eye(size, dtype=torch.bool, device=device)
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :size]
        return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2) | itself
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]
    return causal if mask is None else causal & mask[:, None, None].bool() | itself
