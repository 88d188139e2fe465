"""TOPS (Wang et al., 2026): sets of tokens that are relevant, cover the others, and differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, DecoderStep, FeatureStep, Needs
from ..model.rollout import DecoderAttentionRecord
from ..model.schedule import PruningPlan
from ..model.visual_sequence import VisualSequence
from .method import Method, groups_after
from .selecting import after_images, cls_attention, first_reader, on_visual

NORMALIZATIONS = ("mean", "minmax")
BEFORE_THE_DECODER = (0.5, 0.5)
"""The weights of diversity and coverage there, for all models and budgets (Appendix C.2)."""


@dataclass(frozen=True)
class TOPS(Method):
    """Picks tokens one by one by relevance, coverage and diversity, three times (arXiv 2606.27161).

    The next token i has the highest r + α d + λ c (Eq. 6 and 7). r is its *relevance*. d = 1 − max sim(i, s) over the
    tokens s that are picked is *diversity*. c = Σ max(0, sim(i, j) − max sim(j, s)) over the tokens j that are not
    picked is *coverage*. sim is the cosine. The first token is the most relevant one. Before the decoder r is the
    attention of CLS and the tokens are projected features (Eq. 8); at two layers of the decoder r is the attention of
    text raters and the tokens are hidden states (Eq. 9).

    No public code was found. Sec. 4.1 stretches r and c to 0 … 1, Algorithms 1 and 2 divide r, c and d by their means;
    the latter is the default, over the tokens that are not picked. The paper does not print the rule for raters, but
    that they engage most with the image at that layer: here they are the text tokens after it that attend to its visual
    tokens at least as much as the mean of them does. CLS is that of the tower's last layer but one.

    Parameters
    ----------
    keep : int, optional
        Tokens in the end. As in Table 9, there are eight times as many before the decoder, and four times as many after
        the first drop, which is the number by which the paper calls a budget: its 64 is `keep=16`.
    layers : tuple of int, optional
        The numbers of layers before the two drops; default: 12 and 24 of 32.
    diversity : float, default 0.5
        α in the decoder.
    coverage : float, optional
        λ in the decoder; default, as in Table 7 for LLaVA-1.5-7B: 0.5 if more than a sixth of all patches are left
        after the first drop, and 1 otherwise.
    normalization : {"mean", "minmax"}, default "mean"
    """

    layers: tuple[int, ...] | None = None
    diversity: float = field(default=0.5, kw_only=True)
    coverage: float | None = field(default=None, kw_only=True)
    normalization: str = field(default="mean", kw_only=True)

    name: ClassVar[str] = "tops"
    stages: ClassVar[tuple[str, ...]] = ("features", "decoder")
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,), all_projected=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 2:
            raise ValueError(f"{self.name}: layers={self.layers}; allowed: two numbers, such as (12, 24), or None.")
        for option in ("diversity", "coverage"):
            self.check_weight(option, optional=option == "coverage")
        if self.normalization not in NORMALIZATIONS:
            allowed = ", ".join(NORMALIZATIONS)
            raise ValueError(f"{self.name}: normalization={self.normalization!r}; allowed: {allowed}.")

    def bind(self, config: Any) -> TOPS:
        """Return the method with the weight of coverage for this budget."""
        if self.coverage is not None:
            return self
        left = 4 * self.final_tokens(config, config.num_patches)
        return replace(self, coverage=0.5 if 6 * left > config.num_patches else 1.0)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan a choice before the decoder and two drops in it; a decoder of one layer has but the last."""
        tops = self.tops(config, (12, 24))
        before, *counts = (min(patches, times * self.keep) for times in (8, 4, 1))
        return PruningPlan(patches, features=before, decoder=groups_after(tops, counts[-len(tops) :]))

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose among projected features by the attention of CLS."""
        relevance = cls_attention(step.records[-2])
        kept = self._choose(relevance, step.projected, step.keep, *BEFORE_THE_DECODER)
        return Choice(kept, scores=relevance)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Choose among hidden states by the attention of text raters."""
        assert self.coverage is not None
        relevance = rated(step.decoder_records[-1], step.sequence)
        hidden = step.sequence.visual(step.hidden).flatten(0, 1)
        kept = self._choose(relevance.flatten(0, 1), hidden, step.group.keep, self.diversity, self.coverage)
        return Choice(kept.unflatten(0, relevance.shape[:2]), scores=relevance)

    def _choose(
        self, relevance: torch.Tensor, states: torch.Tensor, keep: int, diversity: float, coverage: float
    ) -> torch.Tensor:
        """Choose for every image of (I, k, d): int64 (I, keep), ascending."""
        unit = normalize(states.double(), dim=-1).to(relevance.device)
        weights = diversity, coverage
        pairs = zip(relevance.double(), unit, strict=True)
        sets = [preserved(one, rows @ rows.T, keep, *weights, self.normalization) for one, rows in pairs]
        return torch.stack(sets).sort(-1).values


def preserved(
    relevance: torch.Tensor, similarity: torch.Tensor, keep: int, diversity: float, coverage: float, normalization: str
) -> torch.Tensor:
    """Pick the tokens of one image by Eq. 7, in their order: int64 (keep,).

    Coverage is kept up to date: a pick changes it only for the tokens to which it is nearer than the earlier picks.

    Parameters
    ----------
    relevance : float64 Tensor (k,)
    similarity : float64 Tensor (k, k)
    keep : int
    diversity, coverage : float
        α and λ.
    normalization : {"mean", "minmax"}
    """
    left = torch.ones_like(relevance, dtype=torch.bool)
    at = relevance.argmax()
    picked, left[at], nearest = [at], False, similarity[at]
    covers = (similarity[left] - nearest[left, None]).clamp_min(0).sum(0)
    for _ in range(keep - 1):
        criteria = torch.stack([relevance, 1 - nearest, covers])
        weighted = normalized(criteria, left, normalization)
        score = weighted[0] + diversity * weighted[1] + coverage * weighted[2]
        at = score.masked_fill(~left, -inf).argmax()
        picked.append(at)
        left[at] = False
        covers = covers - (similarity[at] - nearest[at]).clamp_min(0)
        nearer = (similarity[at] > nearest) & left
        rows, before, after = similarity[nearer], nearest[nearer, None], similarity[at][nearer, None]
        covers = covers - ((rows - before).clamp_min(0) - (rows - after).clamp_min(0)).sum(0)
        nearest = torch.maximum(nearest, similarity[at])
    return torch.stack(picked)


def normalized(criteria: torch.Tensor, left: torch.Tensor, how: str) -> torch.Tensor:
    """Divide criteria (n, k) by their means over the tokens left (k,), or stretch them to 0 … 1 there."""
    values, tiny = criteria[:, left], torch.finfo(criteria.dtype).tiny
    if how == "mean":
        return criteria / values.mean(1, keepdim=True).clamp_min(tiny)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (criteria - low) / (high - low).clamp_min(tiny)


def rated(record: DecoderAttentionRecord, sequence: VisualSequence) -> torch.Tensor:
    """Return the attention of each image's raters to its visual tokens, averaged over them and heads: (B, M, k).

    Raters are the text tokens after an image whose attention to its visual tokens, all together, is at least the mean.
    """
    first, images = first_reader(sequence), sequence.columns.shape[1]
    rows = on_visual(record.attention_map(first)[:, None].expand(-1, images, -1, -1), sequence)  # (B, M, q, k)
    rows = rows * sequence.token_present[:, :, None].to(rows.device)
    readers = after_images(sequence)[..., first:].to(rows.device)
    total = rows.sum(-1)
    mean = (total * readers).sum(-1, keepdim=True) / readers.sum(-1, keepdim=True).clamp_min(1)
    raters = readers & (total >= mean)
    raters = raters.where(raters.any(-1, keepdim=True), readers).float()  # rounding may lift the mean of equals
    return torch.einsum("bmq,bmqk->bmk", raters, rows) / raters.sum(-1, keepdim=True).clamp_min(1)
