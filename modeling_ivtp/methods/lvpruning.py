"""LVPruning's selection at inference (Sun et al., 2025; Sec. 3.3): three drops in the decoder by a module's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.schedule import PruningPlan
from .method import Method, groups_after
from .selecting import after_images, best_for_decoder

Scorer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Scores (B, M, k) of visual tokens after a layer, from its number, their states (B, M, k, d), all states (B, n, d) and
the text's mask (B, M, n)."""


def cross_similarity(layer: int, visual: torch.Tensor, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Score by the cosine with the mean of the text, in place of the decision module that LVPruning learns."""
    weight = text.float() / text.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.einsum("bmn,bnd->bmd", weight.to(hidden.device), hidden.float())
    return torch.nn.functional.cosine_similarity(visual.float(), mean[:, :, None], dim=-1)


@dataclass(frozen=True)
class LVPruningTopK(Method):
    """Keeps the best by a decision module's scores after layers 1, 8 and 16 of 32: ρ, ρ − 0.2 and ρ − 0.4 of them all.

    Parameters
    ----------
    keep : int
        Tokens in the end, (ρ − 0.4) N; ρ follows from it.
    scores : callable, optional
        The decision module, see `Scorer`; default: `cross_similarity`, which is not learned.
    layers : tuple of int, optional
        The number of layers before each drop; default: 1, 8 and 16 of 32.
    """

    scores: Scorer = cross_similarity
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "lvpruning-topk"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.scores):
            raise ValueError(f"{self.name}: scores={self.scores!r}; allowed: a callable, see `Scorer`.")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan equal steps of 0.2 of all patches, upwards from the tokens in the end."""
        tops = self.tops(config, (1, 8, 16))
        counts = [min(patches, round(self.keep + 0.2 * patches * above)) for above in range(len(tops) - 1, -1, -1)]
        return PruningPlan(patches, decoder=groups_after(tops, counts))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the decision module's scores."""
        sequence = step.sequence
        text = after_images(sequence)
        scores = self.scores(step.group.last, sequence.visual(step.hidden), step.hidden, text)
        if scores.shape != sequence.columns.shape:
            raise ValueError(
                f"{self.name}: scores returned {tuple(scores.shape)}; allowed: {tuple(sequence.columns.shape)}, one "
                "for each visual token."
            )
        return best_for_decoder(step, scores.float())
