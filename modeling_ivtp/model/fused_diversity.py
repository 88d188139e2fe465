"""Triton kernels for the greedy choices of `diversity`: one program picks for one image, without waiting for the host.

By determinants, a program picks a panel of tokens at a time. The rows of the Cholesky factor that belong to the panel
stay in registers, and each step reads one row of the matrix. After a panel the matrix is brought up to date by one
product over all images, which occupies the whole GPU. A single launch for all picks would have one multiprocessor read
the growing factor at every step, hundreds of rows of it in the end.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has a build; a loop in PyTorch picks there
    triton = None

logger = logging.get_logger(__name__)

_PANEL = 16
_MOST_TOKENS = 1024
_WARPS = 16
_works: dict[Any, bool] = {}


def is_served(matrix: torch.Tensor) -> bool:
    """Return whether the kernels take a matrix (I, k, k): on a GPU where they compile, if it fits into registers."""
    floats = matrix.dtype in (torch.float32, torch.float64)
    if triton is None or matrix.device.type != "cuda" or not floats or matrix.shape[1] > _MOST_TOKENS:
        return False
    kind = matrix.device.index, matrix.dtype
    if kind not in _works:
        _works[kind] = _compiles(matrix.device, matrix.dtype)
    return _works[kind]


def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Run the kernels once: without a C compiler, or on an old GPU, Triton can be imported and fails here."""
    probe = torch.eye(20, device=device, dtype=dtype)[None]
    try:
        fused_span(probe.clone(), 18)
        fused_spread(probe, 2)
    except Exception as error:
        logger.warning(f"Choosing falls back to PyTorch on {device}, as Triton's kernel fails: {error}")
        return False
    return True


def fused_span(matrix: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick by determinants; see `diversity.spanning`.

    Parameters
    ----------
    matrix : float64 or float32 Tensor (I, k, k)
        L of each image. It is overwritten.
    keep : int

    Returns
    -------
    int64 Tensor (I, keep)
        k where nothing is left to pick.
    """
    images, tokens, _ = matrix.shape
    left = matrix.diagonal(dim1=1, dim2=2).contiguous()
    floor = tokens * torch.finfo(matrix.dtype).eps * left.amax(-1)
    picked = torch.empty(images, keep, dtype=torch.int64, device=matrix.device)
    factors = matrix.new_empty(images, _PANEL, tokens)
    for first in range(0, keep, _PANEL):
        count = min(_PANEL, keep - first)
        with _on(matrix.device):
            _pick_panel[(images,)](
                matrix, left, floor, factors, picked, tokens, keep, first, count, **_sizes(tokens), PANEL=_PANEL
            )
        if first + count < keep:
            matrix.baddbmm_(factors.transpose(1, 2), factors, alpha=-1)
    return picked


def fused_spread(distance: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick by distances (I, k, k); see `diversity.farthest`."""
    images, tokens, _ = distance.shape
    distance = distance.contiguous()
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    first = distance.masked_fill(itself, float("inf")).amin(-1).argmax(-1)
    picked = torch.empty(images, keep, dtype=torch.int64, device=distance.device)
    with _on(distance.device):
        _pick_farthest[(images,)](distance, first, picked, tokens, keep, **_sizes(tokens))
    return picked


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sizes(tokens: int) -> dict[str, Any]:
    return {"WIDTH": max(16, 1 << (tokens - 1).bit_length()), "num_warps": _WARPS}


if triton is not None:

    @triton.jit
    def _pick_panel(  # type: ignore[no-untyped-def]
        matrix, left, floor, factors, picked, tokens, keep, first, count,
        PANEL: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Pick the next tokens of an image, and leave their rows of the Cholesky factor, zeros for none."""
        image = tl.program_id(0).to(tl.int64)
        matrix += image * tokens * tokens
        left += image * tokens
        factors += image * PANEL * tokens
        picked += image * keep + first
        lowest = tl.load(floor + image)
        columns, numbers = tl.arange(0, WIDTH), tl.arange(0, PANEL)
        present = columns < tokens
        lengths = tl.load(left + columns, mask=present, other=float("-inf"))
        rows = tl.zeros([PANEL, WIDTH], lengths.dtype)
        for step in range(count):
            longest = tl.max(lengths, 0)
            going = longest > lowest
            at = tl.min(tl.where(lengths == longest, columns, WIDTH), 0)
            at = tl.where(going, at, tokens)
            of_picked = tl.sum(tl.where(columns[None, :] == at, rows, 0.0), 1)
            row = tl.load(matrix + tl.where(going, at, 0) * tokens + columns, mask=present, other=0.0)
            row = (row - tl.sum(rows * of_picked[:, None], 0)) / tl.sqrt(tl.where(going, longest, 1.0))
            row = tl.where(going, row, 0.0)
            rows = tl.where(numbers[:, None] == step, row[None, :], rows)
            lengths = tl.where(columns == at, float("-inf"), lengths - row * row)
            tl.store(picked + step, at.to(tl.int64))
        tl.store(left + columns, lengths, mask=present)
        places = factors + numbers[:, None] * tokens + columns[None, :]
        tl.store(places, rows, mask=present[None, :])

    @triton.jit
    def _pick_farthest(distance, first, picked, tokens, keep, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pick all tokens of an image, from its first one on."""
        image = tl.program_id(0).to(tl.int64)
        distance += image * tokens * tokens
        picked += image * keep
        at = tl.load(first + image)
        tl.store(picked, at)
        columns = tl.arange(0, WIDTH)
        present = columns < tokens
        gap = tl.load(distance + at * tokens + columns, mask=present, other=float("-inf"))
        for step in range(1, keep):
            gap = tl.where(columns == at, float("-inf"), gap)
            widest = tl.max(gap, 0)
            at = tl.min(tl.where(gap == widest, columns, WIDTH), 0).to(tl.int64)
            at = tl.minimum(at, tokens - 1)
            tl.store(picked + step, at)
            gap = tl.minimum(gap, tl.load(distance + at * tokens + columns, mask=present, other=float("-inf")))
