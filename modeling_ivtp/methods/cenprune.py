"""Cen-Prune (Wen et al., 2026): DivPrune and CDPruner on centred features, weighted with what is distinct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from ..model.diversity import farthest, spanning
from ..model.pruner import Choice, FeatureStep, PromptStep
from .cdpruner import CDPruner
from .divprune import DivPrune


@dataclass(frozen=True)
class CenDivPrune(DivPrune):
    """Picks projected features as DivPrune does, after their mean is taken off, and prefers distinct ones.

    The mean of an image's tokens hides how they differ (arXiv 2608.30263, Sec. 4). So distance is 1 minus the cosine of
    centred features (Eq. 3 and 4). What centring loses is *distinctiveness*: minus the mean cosine with the other
    tokens before centring (Eq. 5), stretched to 0 … 1 within the image (Eq. 11). The first token is DivPrune's. Each
    further one has the highest product of distinctiveness and distance from those picked (Eq. 7).

    No public code was found. The features are those of LLaVA after the projector, not standardised, as the paper's
    Appendix A has them for LLaVA. All of it is computed in float64.
    """

    name: ClassVar[str] = "cen-divprune"

    def in_features(self, step: FeatureStep) -> Choice:
        """Pick one token after the other."""
        features = step.projected.double()
        unit, scores = normalize(centred(features), dim=-1), distinctiveness(features)
        picked = farthest_and_distinct(1 - unit @ unit.transpose(1, 2), scores, step.keep)
        return Choice(picked.sort(1).values, scores=scores.float())


@dataclass(frozen=True)
class CenCDPruner(CDPruner):
    """Picks the largest determinant as CDPruner does, of centred features, and prefers distinct ones.

    Similarity is the cosine of centred features, and relevance is multiplied with distinctiveness (Eq. 8); see
    `CenDivPrune` for both. Each of the two is stretched to 0 … 1 first.

    Parameters
    ----------
    negated : bool, default True
        As in `CDPruner`.
    """

    name: ClassVar[str] = "cen-cdpruner"

    def in_prompt(self, step: PromptStep) -> Choice:
        """Pick one token after the other."""
        features = step.features.double()
        scores = self.relevance(step) * distinctiveness(features)
        rows = scores.flatten(0, 1)
        kept = spanning(centred(features).flatten(0, 1), rows, rows, step.keep).sort(-1).values
        return Choice(kept.unflatten(0, scores.shape[:2]), scores=scores.float())


def centred(features: torch.Tensor) -> torch.Tensor:
    """Take the mean of an image's tokens off each of them (Eq. 3): (..., k, d)."""
    return features - features.mean(-2, keepdim=True)


def distinctiveness(features: torch.Tensor) -> torch.Tensor:
    """Return minus the mean cosine of each token with the others, stretched to 0 … 1 (Eq. 5 and 11): (..., k).

    The mean over the others is that over all, up to constants (Eq. 6), and those are lost in stretching.
    """
    unit = normalize(features, dim=-1)
    scores = -(unit @ unit.mean(-2, keepdim=True).transpose(-1, -2))[..., 0]
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def farthest_and_distinct(distance: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick tokens by their distance from those picked times a score, in their order: int64 (I, keep).

    The first is that of `farthest`. Of equals the earlier one is picked.

    Parameters
    ----------
    distance : Tensor (I, k, k)
    scores : Tensor (I, k)
    keep : int
    """
    rows = torch.arange(len(distance), device=distance.device)
    picked = [farthest(distance, 1)[:, 0].to(distance.device)]
    gap, left = distance[rows, picked[0]], torch.ones_like(scores, dtype=torch.bool)
    for _ in range(keep - 1):
        left[rows, picked[-1]] = False
        picked.append((scores * gap).masked_fill(~left, float("-inf")).argmax(-1))
        gap = torch.minimum(gap, distance[rows, picked[-1]])
    return torch.stack(picked, 1)
