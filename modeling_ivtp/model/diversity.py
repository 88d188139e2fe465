"""Choices of tokens that differ from each other, picked one after the other.

`spanning` picks the greedy maximum of a determinant: tokens that matter, each with much that those before it lack.
`farthest` picks by the max-min distance. Both are single operators to `torch.compile`, `torch.export` and CUDA graphs.

The determinant of a Gram matrix is the product of the squared lengths that each vector has outside the span of those
before it. So the greedy maximum is a Cholesky factorisation that always goes on with the largest diagonal entry left.
Tokens are picked in float64 (in float32 where a device has no more), since near-ties are common. Images are looked at
one by one on a CPU, so that a batch chooses what its images choose alone; on a GPU kernels of Triton pick, where it is
to be had.
"""

import re

import numpy as np
import torch

from .fused_diversity import fused_span, fused_spread, is_served

SHARPNESS = 0.25
"""The exponent alpha of `quality`, unless the options set another one."""

NAMESPACE = re.sub(r"\W", "_", __name__)
"""Code from the Hub and the installed package may be loaded side by side, so each has operators of its own."""


def quality(scores: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Stretch the scores of each image to 0 … 1 and raise them to a power: q = minmax(s)^alpha.

    Parameters
    ----------
    scores : Tensor (..., k)
        Where all of an image's scores are equal, every q is 1.
    sharpness : float
        alpha, 0 or more. With 0 every q is 1, and the choice is by diversity alone.

    Returns
    -------
    float64 Tensor (..., k)
    """
    scores = _precise(scores)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low), 1.0) ** sharpness


def choose_diverse(scores: torch.Tensor, features: torch.Tensor, keep: int, sharpness: float) -> torch.Tensor:
    """Choose tokens K by the greedy maximum of det L_K, with L_ij = q_i <u_i, u_j> q_j.

    Parameters
    ----------
    scores : Tensor (..., k)
        They become q; see `quality`.
    features : Tensor (..., k, d)
        The directions u, of any length.
    keep : int
    sharpness : float

    Returns
    -------
    int64 Tensor (..., keep)
        Indices of the tokens that stay, ascending.
    """
    shape = scores.shape[:-1]
    flat = scores.flatten(0, -2)
    picked = spanning(features.flatten(0, -3), quality(flat, sharpness), flat, keep)
    return picked.unflatten(0, shape).sort(-1).values


def spanning(features: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick tokens by the greedy maximum of det L_K, with L_ij = w_i <u_i, u_j> w_j.

    The token with the longest part outside the span of those that are picked is next; of equals the earlier one. If
    no squared length is left above k times the precision times the largest w^2, nothing differs any more: then the
    highest scores fill up, of equals the earlier one.

    Parameters
    ----------
    features : Tensor (I, k, d)
        The directions u, of any length.
    weights : Tensor (I, k)
        w, 0 or more.
    scores : Tensor (I, k)
    keep : int
        At most k.

    Returns
    -------
    int64 Tensor (I, keep)
        In the order in which they were picked.
    """
    return _spanning(features.detach(), _precise(weights.detach()), scores.detach(), keep)


def spanned(features: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Return which share of all tokens' squared lengths lies in the span of the first tokens picked.

    Of L_ij = w_i <u_i, u_j> w_j this is 1 less the trace that is left once those tokens are projected out, over the
    whole trace.

    Parameters
    ----------
    features : Tensor (I, k, d)
        The directions u, of any length.
    weights : Tensor (I, k)
        w, 0 or more.
    picked : int64 Tensor (I, k')
        In the order in which they were picked.

    Returns
    -------
    float64 Tensor (I, k')
        Ascending, at most 1; 1 where all lengths are 0.
    """
    features, weights = _precise(features.detach()), _precise(weights.detach())
    lengths = features.norm(dim=-1)
    units = features / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)[..., None]
    vectors = weights[..., None] * (units - units.mean(1, keepdim=True))
    chosen = vectors.gather(1, picked[..., None].expand(-1, -1, vectors.shape[-1]))
    basis, factor = torch.linalg.qr(chosen.transpose(1, 2))
    # A token that adds nothing to those before it leaves a direction of its own that is only rounding.
    size = factor.diagonal(dim1=1, dim2=2).abs()
    real = size > size.amax(1, keepdim=True) * chosen.shape[-1] * torch.finfo(size.dtype).eps
    shares = ((vectors @ basis).square().sum(1) * real).cumsum(1)
    shares = torch.nn.functional.pad(shares, (0, picked.shape[1] - shares.shape[1]), value=float("inf"))
    total = vectors.square().sum((1, 2))[:, None]
    return torch.where(total > 0, shares / total, 1.0).clamp_max(1.0)


def farthest(distance: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick tokens greedily by the max-min distance, in their order.

    The first is the one whose nearest neighbour is farthest. Each further one is the farthest from those before it. Of
    equals the earlier one is picked.

    Parameters
    ----------
    distance : float Tensor (I, k, k)
    keep : int
        At most k.

    Returns
    -------
    int64 Tensor (I, keep)
    """
    return _farthest(distance.detach(), keep)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@torch.library.custom_op(f"{NAMESPACE}::spanning", mutates_args=())
def _spanning(features: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    if features.device.type == "cpu":
        rows = [_span_on_cpu(*image, keep) for image in zip(features, weights, strict=True)]
        picked = torch.from_numpy(np.stack(rows)) if rows else features.new_empty((0, keep), dtype=torch.int64)
    else:
        kernel = _kernel(features, weights)
        picked = fused_span(kernel, keep) if is_served(kernel) else _span(kernel, keep)
    return _filled(picked, scores)


@torch.library.custom_op(f"{NAMESPACE}::farthest", mutates_args=())
def _farthest(distance: torch.Tensor, keep: int) -> torch.Tensor:
    if distance.device.type == "cpu":
        rows = [_spread_on_cpu(image.numpy(), keep) for image in distance]
        return torch.from_numpy(np.stack(rows)) if rows else distance.new_empty((0, keep), dtype=torch.int64)
    return fused_spread(distance, keep) if is_served(distance) else _spread(distance, keep)


@_spanning.register_fake
def _(features: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


@_farthest.register_fake
def _(distance: torch.Tensor, keep: int) -> torch.Tensor:
    return distance.new_empty((distance.shape[0], keep), dtype=torch.int64)


def _kernel(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the matrix L of each image: (I, k, k)."""
    features = features.to(weights.dtype)
    kernel = features @ features.transpose(1, 2)
    lengths = kernel.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(lengths > 0, weights / lengths, 0.0)
    kernel.mul_(scale[:, :, None]).mul_(scale[:, None])
    # Exactly w^2: equal weights are equal, whatever rounding makes of their vectors' lengths.
    kernel.diagonal(dim1=1, dim2=2).copy_(torch.where(lengths > 0, weights.square(), 0.0))
    return kernel


def _span(kernel: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick by determinants (I, k, k) on any device: int64 (I, keep), and k where nothing is left to pick."""
    images, tokens, _ = kernel.shape
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    floor = tokens * torch.finfo(kernel.dtype).eps * left.amax(-1)
    factors, picked = kernel.new_zeros(images, keep, tokens), []
    rows, going = torch.arange(images, device=kernel.device), floor >= 0
    for step in range(keep):
        at = left.argmax(-1)
        length = left[rows, at]
        going = going & (length > floor)
        picked.append(at.where(going, tokens))
        before = factors[rows, :step, at][:, None] @ factors[:, :step]
        row = (kernel[rows, at] - before[:, 0]) / length.sqrt()[:, None]
        factors[:, step] = row.where(going[:, None], 0.0)
        left = left.addcmul(factors[:, step], factors[:, step], value=-1).scatter(1, at[:, None], float("-inf"))
    return torch.stack(picked, 1)


def _span_on_cpu(features: torch.Tensor, weights: torch.Tensor, keep: int) -> np.ndarray:
    """Do the same for one image, of features (k, d). A step in NumPy takes a few microseconds, and one in torch 30."""
    # The large product runs on the model's own threads; those of NumPy would compete with them while they wait.
    vectors = features.double()
    kernel = (vectors @ vectors.T).numpy()
    lengths = np.sqrt(kernel.diagonal())
    scale = np.divide(weights.numpy(), lengths, out=np.zeros_like(lengths), where=lengths > 0)
    kernel *= scale[:, None]
    kernel *= scale
    left = np.where(lengths > 0, weights.numpy() ** 2, 0.0)
    floor = len(left) * np.finfo(left.dtype).eps * left.max()
    factors, picked = np.empty((keep, len(left))), np.full(keep, len(left))
    for step in range(keep):
        at = left.argmax()
        if not left[at] > floor:
            break
        picked[step] = at
        row = np.subtract(kernel[at], factors[:step, at] @ factors[:step], out=factors[step])
        row /= np.sqrt(left[at])
        left -= row * row
        left[at] = -np.inf
    return picked


def _filled(picked: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Replace k at the end of picks (I, keep) by the tokens with the highest scores that are not picked."""
    images, tokens = scores.shape
    taken = torch.zeros(images, tokens + 1, dtype=torch.bool, device=picked.device).scatter_(1, picked, True)[:, :-1]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(1, taken.gather(1, order).sort(dim=-1, stable=True).indices)
    place = torch.arange(picked.shape[1], device=picked.device) - taken.sum(-1, keepdim=True)
    return order.gather(1, place.clamp_min(0)).where(place >= 0, picked)


def _spread(distance: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick by distances (I, k, k) on any device: int64 (I, keep)."""
    images, tokens, _ = distance.shape
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    rows = torch.arange(images, device=distance.device)
    picked = [distance.masked_fill(itself, float("inf")).amin(-1).argmax(-1)]
    gap = distance[rows, picked[0]].clone()
    for _ in range(keep - 1):
        gap.scatter_(1, picked[-1][:, None], float("-inf"))
        picked.append(gap.argmax(-1))
        gap = torch.minimum(gap, distance[rows, picked[-1]])
    return torch.stack(picked, 1)


def _spread_on_cpu(distance: np.ndarray, keep: int) -> np.ndarray:
    """Do the same for one image (k, k)."""
    others = distance.copy()
    np.fill_diagonal(others, np.inf)
    picked = np.empty(keep, dtype=np.int64)
    picked[0] = others.min(-1).argmax()
    gap = distance[picked[0]].copy()
    for step in range(1, keep):
        gap[picked[step - 1]] = -np.inf
        picked[step] = gap.argmax()
        np.minimum(gap, distance[picked[step]], out=gap)
    return picked
