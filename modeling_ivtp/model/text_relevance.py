"""Relevance of the instruction's words to the image: Eq. 6 to 8 of the paper (Sec. 3.3) as functions on tensors.

CLIP's own BPE tokens are compared with the image (Eq. 6). Their scores are carried over to the language model's tokens
by the characters that both cover (Eq. 7). The embeddings of the tokens that pass a threshold are averaged into the
pseudo-CLS token (Eq. 8). The features of Eq. 5 come from CLIP's text tower, which the model runs.

Shapes: B rows, M images of a row, T CLIP tokens of a row (all windows, flattened), S tokens of the prompt, P CLIP's
projection width, d the language model's width.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_STEPS = 2**40
"""Fixed-point steps of a cosine: finer than float32, and an int64 holds the sum of four million of them."""


def overlapping_spans(
    offsets: Sequence[tuple[int, int]], clip_offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Find for each LLM token the CLIP tokens that cover its characters: the index set of Eq. 7.

    Parameters
    ----------
    offsets : sequence of (int, int)
        Half-open character range of each LLM token, in any order. An empty range (a special or padding token) overlaps
        nothing.
    clip_offsets : sequence of (int, int)
        Half-open, non-empty character range of each CLIP token in the same text, starts and ends ascending. Tokens that
        hold the bytes of one character share its range.

    Returns
    -------
    list of (int, int)
        Half-open range of CLIP tokens that share a character with each LLM token, (0, 0) where there is none. Takes
        n log n time.
    """
    starts = [start for start, _ in clip_offsets]
    ends = [end for _, end in clip_offsets]
    spans = []
    for start, end in offsets:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        spans.append((first, last) if start < end and first < last else (0, 0))
    return spans


def token_relevance(text_features: Tensor, image_features: Tensor) -> Tensor:
    """Compute the visual relevance of CLIP's text tokens: c of Eq. 6, their cosine with the image embedding.

    Parameters
    ----------
    text_features : Tensor (B, T, P), floating
        Projected features of CLIP's text tokens.
    image_features : Tensor (B, M, P), floating
        Projected CLS embeddings of the images.

    Returns
    -------
    Tensor (B, M, T), float32
        Cosines, computed in float32 whatever the inputs' dtype; 0 for a zero vector.
    """
    text, images = normalize(text_features.float(), dim=-1), normalize(image_features.float(), dim=-1)
    # Sums, not a matrix product: autocast and TF32 would use fewer bits, and a row's result would depend on the batch.
    rows = [(text * image.unsqueeze(1)).sum(-1) for image in images.unbind(1)]
    return torch.stack(rows, dim=1) if rows else text.new_zeros(text.shape[0], 0, text.shape[1])


def map_relevance(relevance: Tensor, spans: Tensor) -> Tensor:
    """Carry the relevance from CLIP's tokens to the language model's: C of Eq. 7, the mean over each span.

    The sums are taken in fixed point. Integer addition is exact, so a row's result does not depend on the number of
    windows in the batch. It also runs on every device and under deterministic algorithms, unlike a float64 cumsum.

    Parameters
    ----------
    relevance : Tensor (B, M, T), float32
        Cosines of CLIP's tokens with each image (Eq. 6).
    spans : Tensor (B, S, 2), int64
        CLIP tokens of each prompt token as a half-open range counted from the end of T (-T <= first < last <= 0);
        (0, 0) where there is none.

    Returns
    -------
    Tensor (B, M, S), float32
        Mean cosine of each token's span, -inf where it has none. Not differentiable: it is used for choosing only.
    """
    sums = (relevance.float() * _STEPS).round().to(torch.int64).cumsum(-1)
    sums = torch.cat([sums.new_zeros(*sums.shape[:-1], 1), sums], dim=-1)
    bounds = (spans + relevance.shape[-1]).clamp(0, relevance.shape[-1])
    images = relevance.shape[1]
    first, last = (bounds[..., side].unsqueeze(1).expand(-1, images, -1) for side in (0, 1))
    total, steps = sums.gather(-1, last) - sums.gather(-1, first), (last - first).clamp(min=1) * _STEPS
    means = total.to(torch.float32) / steps.to(torch.float32)  # int / int would have the default dtype
    return means.masked_fill(~instruction_tokens(spans).unsqueeze(1), float("-inf"))


def text_similarity(embeddings: Tensor, reference: Tensor, spans: Tensor) -> Tensor:
    """Compute relevance without CLIP's text tower: cosines of the instruction's own embeddings with the visual CLS.

    Parameters
    ----------
    embeddings : Tensor (B, S, d), floating
        Input embeddings of the prompt's tokens.
    reference : Tensor (B, M, d), floating
        Visual CLS of each image, projected into the language model's space.
    spans : Tensor (B, S, 2), int64
        As in `map_relevance`; only tokens that have a span belong to the instruction.

    Returns
    -------
    Tensor (B, M, S), float32
        Cosines (Eq. 6 with the language model's embeddings in place of CLIP's), -inf outside the instruction.
    """
    return token_relevance(embeddings, reference).masked_fill(~instruction_tokens(spans).unsqueeze(1), float("-inf"))


PADDING_SPAN = (1, 1)
"""Mark of padding in `clip_spans`: an empty range, which tells where the processor put the padding."""


def misplaced_spans(spans: Tensor, placeholders: Tensor, valid: Tensor | None) -> Tensor:
    """Find rows whose spans do not belong to their tokens: somebody moved the padding, or appended something.

    Parameters
    ----------
    spans : Tensor (B, S, 2), int64
    placeholders : bool Tensor (B, S)
        Where an image token stands.
    valid : bool Tensor (B, S), optional
        False for padding. Default: there is none.

    Returns
    -------
    bool Tensor (B,)
        Rows in which a word's span lies on padding or on an image, or a padding's span on a token.
    """
    padding = spans[..., 0] == PADDING_SPAN[0]
    wordless = placeholders
    if valid is not None:
        wordless, padding = placeholders | ~valid, padding & valid
    return (instruction_tokens(spans) & wordless | padding).any(1)


def instruction_tokens(spans: Tensor) -> Tensor:
    """Mark the tokens that belong to the instruction.

    Parameters
    ----------
    spans : Tensor (B, S, 2), int64
        As in `map_relevance`.

    Returns
    -------
    Tensor (B, S), bool
        True where the token has a span.
    """
    return spans[..., 0] < spans[..., 1]


def key_tokens(relevance: Tensor, threshold: float) -> Tensor:
    """Mark the key tokens of the instruction: the indicator function of Eq. 8.

    Parameters
    ----------
    relevance : Tensor (B, M, S), float32
        Relevance of each token (Eq. 7), -inf outside the instruction.
    threshold : float
        The paper's tau, 0.2. Minus infinity marks every token of the instruction, and only those.

    Returns
    -------
    Tensor (B, M, S), bool
        True where the relevance is at least `threshold`.
    """
    return (relevance >= threshold) & (relevance > float("-inf"))


def pseudo_cls(embeddings: Tensor, key_tokens: Tensor, fallback: Tensor) -> Tensor:
    """Make each image's pseudo-CLS token (Eq. 8): the mean embedding of its key tokens, or the visual CLS without any.

    Parameters
    ----------
    embeddings : Tensor (B, S, d), floating
        Embeddings of the prompt's tokens.
    key_tokens : Tensor (B, M, S), bool
        Key tokens of each image.
    fallback : Tensor (B, M, d), floating
        Projected visual CLS of each image.

    Returns
    -------
    Tensor (B, M, d), dtype of `embeddings`
        Means, accumulated in float32. Gradients reach the embeddings of the key tokens, or the fallback.
    """
    fallback = fallback.to(embeddings.dtype)
    accumulate = torch.promote_types(embeddings.dtype, torch.float32)
    # One image at a time: a (B, M, S, d) tensor of long prompts with many images would not fit into memory.
    means = [
        embeddings.masked_fill(~keys.unsqueeze(-1), 0).sum(1, dtype=accumulate) / keys.sum(1, keepdim=True).clamp(min=1)
        for keys in key_tokens.unbind(1)
    ]
    if not means:
        return fallback
    return torch.where(key_tokens.any(-1, keepdim=True), torch.stack(means, dim=1).to(embeddings.dtype), fallback)
