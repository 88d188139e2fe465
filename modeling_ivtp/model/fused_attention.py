"""A Triton kernel for rollout: a vector times a layer's head-averaged attention map, which is never stored.

It passes twice over the tiles of the map (IVTP Eq. 2), which it computes from queries and keys. The first pass finds
the log-sum-exp of each query's row, as flash attention does. The second computes the normalised tiles again and adds up
their weighted columns. Both add in a fixed order, so the same inputs give the same bits.
"""

from typing import Any

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has a build; PyTorch computes the maps there
    triton = None

logger = logging.get_logger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST_HEAD = 128
_TILE = 64
_works: dict[tuple[Any, ...], bool] = {}


def is_served(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether the kernel takes queries (B, H, ..., dh) and keys (B, H_kv, K, dh), on a GPU where it compiles."""
    if triton is None or query.device.type != "cuda" or query.dtype not in _DTYPES or query.dtype != key.dtype:
        return False
    if query.shape[-1] > _WIDEST_HEAD:
        return False
    if torch.compiler.is_compiling():
        return True  # the compiler needs Triton, too
    kind = query.device.index, query.dtype, query.shape[-1]
    if kind not in _works:
        _works[kind] = _compiles(query.device, query.dtype, query.shape[-1])
    return _works[kind]


def _compiles(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Run the kernel once: without a C compiler, or on an old GPU, Triton can be imported and fails here."""
    probe = torch.zeros(1, 1, 16, width, device=device, dtype=dtype)
    try:
        fused_weighted_attention(torch.zeros(1, 16, device=device), probe, probe, 1.0)
    except Exception as error:
        logger.warning(f"Scoring falls back to PyTorch on {device}, as Triton's kernel fails: {error}")
        return False
    return True


def fused_weighted_attention(
    weights: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float
) -> torch.Tensor:
    """Multiply row vectors with the head-averaged map: `weights @ mean_h softmax(q_h k_h^T * scale)`.

    It allocates float32 (B, H, Q) and (B, H, K) besides the result.

    Parameters
    ----------
    weights : float32 Tensor (B, Q)
    query : Tensor (B, H, Q, dh)
        float16, bfloat16 or float32; products are added up in float32.
    key : Tensor (B, H_kv, K, dh)
        H is a multiple of H_kv.
    scale : float

    Returns
    -------
    float32 Tensor (B, K)
    """
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        # Triton launches on the current GPU, wherever the tensors are.
        with torch.cuda.device(query.device):
            return _launch(weights, query, key, scale)
    return _launch(weights, query, key, scale)


def _launch(weights: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    if query.stride(3) != 1:
        query = query.contiguous()
    if key.stride(3) != 1:
        key = key.contiguous()
    weights = weights.contiguous()
    totals = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    columns = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    sizes = (queries, keys, heads, heads // key.shape[1], width, float(scale))
    strides = (*query.stride()[:3], *key.stride()[:3])
    tiles: dict[str, Any] = {"TILE": _TILE, "WIDTH": max(16, 1 << (width - 1).bit_length())}
    _row_totals[(-(-queries // _TILE), batch * heads)](query, key, totals, *sizes, *strides, **tiles)
    _column_sums[(-(-keys // _TILE), batch * heads)](query, key, totals, weights, columns, *sizes, *strides, **tiles)
    return columns.mean(1)


if triton is not None:

    @triton.jit
    def _tile(vectors, numbers, count, step, width, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """Load the vectors of these numbers, zeros after the last one."""
        dims = tl.arange(0, WIDTH)
        present = (numbers[:, None] < count) & (dims[None, :] < width)
        return tl.load(vectors + numbers[:, None] * step + dims[None, :], mask=present, other=0.0)

    @triton.jit
    def _row_totals(  # type: ignore[no-untyped-def]
        query, key, totals, queries, keys, heads, repeats, width, scale,
        query_batch, query_head, query_step, key_batch, key_head, key_step,
        TILE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Compute the log-sum-exp of a tile of rows."""
        part = tl.program_id(1)
        batch, head = part // heads, part % heads
        query += batch * query_batch + head * query_head
        key += batch * key_batch + (head // repeats) * key_head
        rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
        left = _tile(query, rows, queries, query_step, width, WIDTH)
        highest = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for start in range(0, keys, TILE):
            columns = start + tl.arange(0, TILE)
            right = _tile(key, columns, keys, key_step, width, WIDTH)
            # A compiled caller passes the scale in 64 bits.
            scores = (tl.dot(left, tl.trans(right), input_precision="ieee") * scale).to(tl.float32)
            scores = tl.where(columns[None, :] < keys, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
            highest = higher
        tl.store(totals + part * queries + rows, highest + tl.log(total), mask=rows < queries)

    @triton.jit
    def _column_sums(  # type: ignore[no-untyped-def]
        query, key, totals, weights, sums, queries, keys, heads, repeats, width, scale,
        query_batch, query_head, query_step, key_batch, key_head, key_step,
        TILE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Compute the weighted sums of a tile of columns, for one head."""
        part = tl.program_id(1)
        batch, head = part // heads, part % heads
        query += batch * query_batch + head * query_head
        key += batch * key_batch + (head // repeats) * key_head
        columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
        right = _tile(key, columns, keys, key_step, width, WIDTH)
        added = tl.zeros([TILE], tl.float32)
        for start in range(0, queries, TILE):
            rows = start + tl.arange(0, TILE)
            left = _tile(query, rows, queries, query_step, width, WIDTH)
            weight = tl.load(weights + batch * queries + rows, mask=rows < queries, other=0.0)
            total = tl.load(totals + part * queries + rows, mask=rows < queries, other=float("inf"))
            scores = (tl.dot(left, tl.trans(right), input_precision="ieee") * scale).to(tl.float32)
            added += tl.sum(tl.exp(scores - total[:, None]) * weight[:, None], 0)
        tl.store(sums + part * keys + columns, added, mask=columns < keys)
