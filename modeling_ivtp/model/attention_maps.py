"""Products of vectors with attention maps (IVTP Eq. 2), without a whole map of all heads in memory.

The layers' own output comes from the model's attention kernels. Scoring needs a vector times the head-averaged map,
which is computed in three ways, each the fastest somewhere. On a CPU a layer's maps are computed once, for its output
and for scoring. On a GPU a kernel computes them tile by tile and stores none (`fused_attention`). In all other cases
they are computed again, a few heads at a time.
"""

from collections.abc import Iterator

import torch

from .fused_attention import fused_weighted_attention, is_served
from .labels import SCORE, labelled

MAP_VALUES_CPU = 2**20
"""Most float32 values of attention maps that exist at a time on a CPU."""

MAP_VALUES_DEVICE = 2**26
"""The same on other devices."""


def weighted_attention(
    weights: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply row vectors with the head-averaged map of Eq. 2: `weights @ mean_h softmax(q_h k_h^T * scale)`.

    Parameters
    ----------
    weights : float32 Tensor (B, M, Q)
        One row vector per image.
    query : Tensor (B, H, M, Q, dh)
    key : Tensor (B, H_kv, K, dh)
        H is a multiple of H_kv (grouped-query attention).
    scale : float
    visible : bool Tensor (B, M, Q, K), optional
        Which keys each query attends to; default: all.

    Returns
    -------
    float32 Tensor (B, M, K)
    """
    if visible is None and query.shape[2] == 1 and is_served(query, key):
        return fused_weighted_attention(weights[:, 0], query[:, :, 0], key, scale)[:, None]
    maps = _maps(query, key, scale, visible)
    return _over_heads([(weights[:, None, :, None] @ attention).squeeze(3) for attention in maps])


def averaged_attention(
    query: torch.Tensor, key: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute rows of the head-averaged attention map of Eq. 2, for so few queries that they fit into memory.

    Parameters
    ----------
    query, key, scale, visible
        As in `weighted_attention`.

    Returns
    -------
    float32 Tensor (B, M, Q, K)
    """
    return _over_heads(list(_maps(query, key, scale, visible)))


def _maps(query: torch.Tensor, key: torch.Tensor, scale: float, visible: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yield the maps of some heads at a time: float32 (B, some heads, M, Q, K)."""
    masked = None if visible is None else ~visible[:, None]
    for logits in map_heads(query.flatten(2, 3), key, scale):
        logits = logits.unflatten(2, query.shape[2:4])
        if masked is not None:
            logits = logits.masked_fill_(masked, float("-inf"))  # in place: nobody else holds these logits
        yield logits.softmax(-1, dtype=torch.float32)


def _over_heads(parts: list[torch.Tensor]) -> torch.Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).mean(1)


def map_heads(query: torch.Tensor, key: torch.Tensor, scale: float) -> Iterator[torch.Tensor]:
    """Yield scaled products of queries and keys, of as many heads at a time as `MAP_VALUES_...` allows.

    Parameters
    ----------
    query : Tensor (B, H, Q, dh)
    key : Tensor (B, H_kv, K, dh)
        H is a multiple of H_kv (grouped-query attention).
    scale : float

    Yields
    ------
    Tensor (B, some heads, Q, K), dtype of `query`
        For a softmax in float32.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    repeats = heads // kv_heads
    limit = MAP_VALUES_CPU if query.device.type == "cpu" else MAP_VALUES_DEVICE
    at_once = max(1, limit // max(1, batch * queries * keys))
    groups = max(1, at_once // repeats)
    # Heads that share a key are rows of one product, so that no key is copied.
    sharing = min(repeats, at_once)
    for group in range(0, kv_heads, groups):
        part = key[:, group : group + groups].transpose(2, 3)
        for first in range(0, repeats, sharing):
            rows = query.unflatten(1, (kv_heads, repeats))[:, group : group + groups, first : first + sharing]
            # Scaled first: in half precision the products themselves may overflow.
            logits = (rows.flatten(2, 3) * scale) @ part
            yield logits.view(batch, -1, queries, keys)


@labelled(SCORE)
def add_heads(total: torch.Tensor, attention: torch.Tensor) -> None:
    """Add maps (B, some heads, N, N) to a total (B, N, N), in place.

    This is all that scoring costs a layer whose output comes from its maps anyway.
    """
    for head in attention.unbind(1):  # a sum over heads first would write one more map
        total += head


def attend_with_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention without a mask, and its map averaged over heads, from one map of each head.

    Not differentiable.

    Parameters
    ----------
    query, key, value : Tensor (B, H, N, dh)
    scale : float

    Returns
    -------
    output : Tensor (B, N, H, dh)
    averaged : float32 Tensor (B, N, N)
    """
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, value.shape[3])
    averaged = torch.zeros(batch, tokens, tokens, device=query.device)
    first = 0
    for logits in map_heads(query, key, scale):
        attention = logits.softmax(-1, dtype=torch.float32)
        last = first + attention.shape[1]
        add_heads(averaged, attention)
        output[:, :, first:last] = (attention.to(value.dtype) @ value[:, first:last]).transpose(1, 2)
        first = last
    return output, averaged / heads
