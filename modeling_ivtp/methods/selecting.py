"""Tools of the comparison systems: ranking visual tokens, reading attention, and putting ragged choices together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.rollout import AttentionRecord, DecoderAttentionRecord, reference_row
from ..model.visual_sequence import VisualSequence


def ranking(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the highest score (..., k) to the lowest; of equals the earlier one first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def best(scores: torch.Tensor, keep: int, there: torch.Tensor | None = None) -> Choice:
    """The `keep` tokens with the highest scores, in spatial order; of equals the earlier one.

    Parameters
    ----------
    scores : float Tensor (..., k)
    keep : int
    there : bool Tensor (..., k), optional
        Which tokens there are, where images have different numbers of them.
    """
    if there is None:
        kept = ranking(scores)[..., :keep]
        return Choice(kept.sort(-1).values, scores=scores)
    there = there.to(scores.device)
    scores = scores.masked_fill(~there, float("-inf"))
    order = ranking(scores)[..., :keep]
    order = order.masked_fill(~there.gather(-1, order), scores.shape[-1])
    return Choice(order.sort(-1).values, scores=scores, ragged=True)


def best_for_decoder(step: DecoderStep, scores: torch.Tensor, keep: int | None = None) -> Choice:
    """`best` for the visual tokens of a prompt, with scores (B, M, k)."""
    sequence = step.sequence
    return best(scores, keep or step.group.keep, sequence.token_present if sequence.ragged else None)


def cls_attention(record: AttentionRecord) -> torch.Tensor:
    """What CLS pays each patch in a layer of the tower, averaged over heads: float32 (I, k)."""
    return reference_row(record)[:, 0, 1:]


def patch_keys(record: AttentionRecord) -> torch.Tensor:
    """The patches' keys in a layer of the tower: (I, H, k, dh)."""
    return record.key[:, :, 1:]


def after_images(sequence: VisualSequence) -> torch.Tensor:
    """The text tokens after each image, which are all that can attend to it: bool (B, M, n).

    Behind an image that ends its prompt there are none; its last token, which answers, stands in for them.
    """
    place = torch.arange(sequence.size, device=sequence.columns.device)
    visual = torch.zeros(sequence.slots.shape[0], sequence.size + 1, dtype=torch.bool, device=place.device)
    visual = visual.scatter(1, sequence.columns.flatten(1), True)[:, :-1]
    text = ~visual if sequence.valid is None else ~visual & sequence.valid
    last = sequence.columns.masked_fill(~sequence.token_present, -1).amax(-1)
    after = text[:, None] & (place > last[..., None]) & (place < sequence.prompt_end)
    alone = ~after.any(-1, keepdim=True) & (place == sequence.prompt_end - 1)
    return after | alone


def first_reader(sequence: VisualSequence) -> int:
    """A column before which nothing stands after an image: those from it on are all whose attention matters."""
    if not sequence.counted or any(row.images > 1 for row in sequence.rows):
        return 0
    least = sequence.drafted + 1
    return max(
        0, sequence.size - max((max(row.text_after, least) for row in sequence.rows if row.images), default=least)
    )


def received(watch: DecoderAttentionRecord, sequence: VisualSequence, readers: torch.Tensor) -> torch.Tensor:
    """What each visual token receives from tokens that read it, averaged over them and over heads.

    Parameters
    ----------
    watch : DecoderAttentionRecord
    sequence : VisualSequence
    readers : bool Tensor (B, M, n)
        Which tokens of the sequence count, for each image.

    Returns
    -------
    float32 Tensor (B, M, k)
    """
    first = first_reader(sequence)
    weights = readers[..., first:].float()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    return on_visual(watch.attention(first, weights.to(watch.query.device)), sequence)


def on_visual(values: torch.Tensor, sequence: VisualSequence) -> torch.Tensor:
    """Values of columns (B, M, ..., n) at each image's own visual tokens: (B, M, ..., k); of none, of any."""
    index = sequence.columns.to(values.device).clamp_max(sequence.size - 1)
    while index.dim() < values.dim():
        index = index.unsqueeze(2)
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def together(choices: Sequence[tuple[torch.Tensor, torch.Tensor | None]], tokens: int, shape: torch.Size) -> Choice:
    """One choice of those of single images, which may keep different numbers.

    Parameters
    ----------
    choices : sequence of (int64 Tensor (k_i,), float32 Tensor (k_i, k) or None)
        What each image keeps, ascending, and the mixtures of it.
    tokens : int
        k.
    shape : Size
        The leading dimensions, whose product is the number of images.
    """
    most = max(len(kept) for kept, _ in choices)
    device = choices[0][0].device
    kept = torch.full((len(choices), most), tokens, device=device)
    mixed = any(mixture is not None for _, mixture in choices)
    mixtures = torch.zeros(len(choices), most, tokens, device=device) if mixed else None
    for row, (one, mixture) in enumerate(choices):
        kept[row, : len(one)] = one
        if mixtures is not None:
            mixtures[row, : len(one)] = one_hot(one, tokens) if mixture is None else mixture
    return Choice(
        kept.unflatten(0, shape),
        mixture=None if mixtures is None else mixtures.unflatten(0, shape),
        ragged=any(len(one) != most for one, _ in choices),
    )


def one_hot(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mixture that changes nothing: float32 (..., k', k)."""
    return torch.nn.functional.one_hot(kept, tokens).float()
