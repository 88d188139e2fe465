"""Functions that methods share: ranking visual tokens, reading attention, and joining the choices of single images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._moved import old_names
from ..model.pruner import Choice, DecoderStep
from ..model.rollout import AttentionRecord, DecoderAttentionRecord, reference_row, roll_down
from ..model.visual_sequence import VisualSequence


def ranking(scores: torch.Tensor) -> torch.Tensor:
    """Return the indices of scores (..., k) from the highest to the lowest; of equals the earlier one comes first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def best(scores: torch.Tensor, keep: int, present: torch.Tensor | None = None) -> Choice:
    """Choose the `keep` tokens with the highest scores, in spatial order; of equals the earlier one.

    Parameters
    ----------
    scores : float Tensor (..., k)
    keep : int
    present : bool Tensor (..., k), optional
        Which tokens exist, if images have different numbers of them.
    """
    if present is None:
        kept = ranking(scores)[..., :keep]
        return Choice(kept.sort(-1).values, scores=scores)
    present = present.to(scores.device)
    scores = scores.masked_fill(~present, float("-inf"))
    order = ranking(scores)[..., :keep]
    order = order.masked_fill(~present.gather(-1, order), scores.shape[-1])
    return Choice(order.sort(-1).values, scores=scores, ragged=True)


def best_for_decoder(step: DecoderStep, scores: torch.Tensor, keep: int | None = None) -> Choice:
    """Choose the best visual tokens of a prompt by scores (B, M, k); see `best`."""
    sequence = step.sequence
    return best(scores, keep or step.group.keep, sequence.token_present if sequence.ragged else None)


def cls_attention(record: AttentionRecord) -> torch.Tensor:
    """Return the attention of CLS to each patch in a layer of the tower, averaged over heads: float32 (I, k)."""
    return reference_row(record)[:, 0, 1:]


def mean_attention(record: AttentionRecord) -> torch.Tensor:
    """Return the attention that each patch receives in a layer of the tower, from all tokens alike: float32 (I, k).

    It is averaged over heads, patches and CLS. The record holds the queries of all of them.
    """
    images, _, tokens, _ = record.key.shape
    row = torch.full((images, 1, tokens), 1 / tokens, device=record.key.device)
    return roll_down(row, record, residual=False)[:, 0, 1:]


def patch_keys(record: AttentionRecord) -> torch.Tensor:
    """Return the patches' keys in a layer of the tower: (I, H, k, dh)."""
    return record.key[:, :, 1:]


def text_tokens(sequence: VisualSequence, answers: bool = False) -> torch.Tensor:
    """Mark the columns that are tokens of the text, or also of `answers` that are to be learned: bool (B, n)."""
    columns = sequence.columns
    visual = torch.zeros(columns.shape[0], sequence.size + 1, dtype=torch.bool, device=columns.device)
    text = ~visual.scatter(1, columns.flatten(1), True)[:, :-1]
    if sequence.valid is not None:
        text = text & sequence.valid
    return text if answers or sequence.answers is None else text & ~sequence.at_slots(sequence.answers)


def prompt_ends(sequence: VisualSequence) -> torch.Tensor:
    """Mark the last token of the prompt, or every token right before an answer that is to be learned: bool (B, n)."""
    column = torch.arange(sequence.size, device=sequence.columns.device)
    if sequence.answers is None:
        return (column == sequence.prompt_end - 1).expand(sequence.slots.shape[0], -1)
    answers = sequence.at_slots(sequence.answers)
    ends = torch.nn.functional.pad(answers[:, 1:], (0, 1), value=False) & text_tokens(sequence)
    return torch.where(ends.any(-1, keepdim=True), ends, column == sequence.prompt_end - 1)


def image_tokens(sequence: VisualSequence, there: torch.Tensor | None = None) -> torch.Tensor:
    """Mark the columns of each image's tokens, or of those that are `there` (bool (B, M, k)): bool (B, M, n)."""
    there = sequence.token_present if there is None else there
    columns = sequence.columns.to(there.device).masked_fill(~there, sequence.size)
    return there.new_zeros(*there.shape[:2], sequence.size + 1).scatter(2, columns, True)[..., :-1]


def after_images(sequence: VisualSequence) -> torch.Tensor:
    """Mark the text tokens after each image, which are the only ones that attend to it: bool (B, M, n).

    After an image that ends its prompt there are none; then the prompt's last token, which predicts the answer, counts.
    Answers that are to be learned attend to it, too, but are not there at inference, and do not count.
    """
    column, text = torch.arange(sequence.size, device=sequence.columns.device), text_tokens(sequence)
    last = sequence.columns.masked_fill(~sequence.token_present, -1).amax(-1)
    after = text[:, None] & (column > last[..., None]) & (column < sequence.prompt_end)
    return after | (~after.any(-1, keepdim=True) & prompt_ends(sequence)[:, None])


def first_reader(sequence: VisualSequence) -> int:
    """Return the first column that may hold text after an image; earlier columns' attention is not needed."""
    if not sequence.counted or any(row.images > 1 for row in sequence.rows):
        return 0
    least = sequence.drafted + 1
    return max(
        0, sequence.size - max((max(row.text_after, least) for row in sequence.rows if row.images), default=least)
    )


def received(
    record: DecoderAttentionRecord, sequence: VisualSequence, readers: torch.Tensor, first: int | None = None
) -> torch.Tensor:
    """Return the attention that each visual token receives, averaged over its readers and over heads.

    Parameters
    ----------
    record : DecoderAttentionRecord
    sequence : VisualSequence
    readers : bool Tensor (B, M, n)
        The tokens of the sequence whose attention counts, for each image.
    first : int, optional
        A column before which nobody reads; default: `first_reader`.

    Returns
    -------
    float32 Tensor (B, M, k)
    """
    first = first_reader(sequence) if first is None else first
    weights = readers[..., first:].float()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    return on_visual(record.attention(first, weights.to(record.query.device)), sequence)


def on_visual(values: torch.Tensor, sequence: VisualSequence) -> torch.Tensor:
    """Pick each image's visual tokens from values of columns: (B, M, ..., n) to (B, M, ..., k), any for absent ones."""
    index = sequence.columns.to(values.device).clamp_max(sequence.size - 1)
    while index.dim() < values.dim():
        index = index.unsqueeze(2)
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def join_choices(choices: Sequence[tuple[torch.Tensor, torch.Tensor | None]], tokens: int, shape: torch.Size) -> Choice:
    """Join the choices of single images, which may keep different numbers.

    Parameters
    ----------
    choices : sequence of (int64 Tensor (k_i,), float32 Tensor (k_i, k) or None)
        The tokens that each image keeps, ascending, and their mixtures.
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
    for row, (image, mixture) in enumerate(choices):
        kept[row, : len(image)] = image
        if mixtures is not None:
            mixtures[row, : len(image)] = one_hot(image, tokens) if mixture is None else mixture
    return Choice(
        kept.unflatten(0, shape),
        mixture=None if mixtures is None else mixtures.unflatten(0, shape),
        ragged=any(len(image) != most for image, _ in choices),
    )


def one_hot(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the mixture that leaves the kept tokens as they are: float32 (..., k', k)."""
    return torch.nn.functional.one_hot(kept, tokens).float()


__getattr__ = old_names(__name__)
