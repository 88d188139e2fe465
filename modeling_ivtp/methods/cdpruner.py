"""CDPruner (Zhang et al., NeurIPS 2025): diversity conditioned on the instruction, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.diversity import spanning
from ..model.pruner import Choice, Needs, PromptStep
from ..model.schedule import PruningPlan
from .method import Method


@dataclass(frozen=True)
class CDPruner(Method):
    """Picks the visual tokens with the largest determinant of similarity, scaled with relevance to the instruction.

    Similarity is the cosine of projected features. Relevance is the cosine of a patch with the instruction in CLIP's
    space, averaged over the instruction's windows and stretched to 0 … 1 within the image. All of it is computed in
    float64, since near-ties are common. Where no token adds anything to those picked, the most relevant fill up.

    Parameters
    ----------
    negated : bool, default True
        Whether relevance is negated, as in the authors' own code: CLIP's patches are more similar to words that they do
        not show.
    """

    negated: bool = True

    name: ClassVar[str] = "cdpruner"
    stages: ClassVar[tuple[str, ...]] = ("prompt",)
    requires: ClassVar[Needs] = Needs(patch_embeds=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("negated")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the decoder."""
        return PruningPlan(patches, prompt=self.keep)

    def in_prompt(self, step: PromptStep) -> Choice:
        """Pick one token after the other."""
        scores = self.relevance(step)
        rows = scores.flatten(0, 1)
        kept = spanning(step.features.flatten(0, 1), rows, rows, step.keep).sort(-1).values
        return Choice(kept.unflatten(0, scores.shape[:2]), scores=scores.float())

    def relevance(self, step: PromptStep) -> torch.Tensor:
        """Return the relevance of each patch to the instruction: float64 (B, M, k)."""
        assert step.patch_embeds is not None
        assert step.text_embeds is not None
        assert step.windows is not None
        patches, text = normalize(step.patch_embeds.double(), dim=-1), normalize(step.text_embeds.double(), dim=-1)
        similarity = patches @ text.transpose(1, 2).unsqueeze(1)  # (B, M, k, W)
        windows = step.windows[:, None, None].to(similarity.device)
        relevance = (similarity * windows).sum(-1) / windows.sum(-1).clamp_min(1)
        return stretched(-relevance if self.negated else relevance)


def stretched(values: torch.Tensor) -> torch.Tensor:
    """Stretch values (..., k) to 0 … 1, with none at exactly 0."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low + 1e-6) / (high - low + 1e-6)
