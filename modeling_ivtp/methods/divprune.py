"""DivPrune (Alvar et al., CVPR 2025): the most diverse visual tokens, by the max-min distance problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method


@dataclass(frozen=True)
class DivPrune(Method):
    """Picks projected features greedily, each the farthest, by cosine distance, from those picked before."""

    name: ClassVar[str] = "divprune"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(all_projected=True)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, after the projector."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Pick one token after the other."""
        unit = normalize(step.projected.float(), dim=-1)
        return Choice(farthest(1 - unit @ unit.transpose(1, 2), step.keep).sort(1).values)


def farthest(distance: torch.Tensor, keep: int) -> torch.Tensor:
    """Pick tokens greedily by the max-min distance (I, k, k), in their order: int64 (I, keep).

    The first is the one whose nearest neighbour is farthest; of equals the earlier.
    """
    images, tokens, _ = distance.shape
    itself = torch.full((tokens,), float("inf"), device=distance.device).diag()
    picked = [(distance + itself.nan_to_num(0)).amin(-1).argmax(-1)]
    rows = torch.arange(images, device=distance.device)
    gap = distance[rows, picked[0]].clone()
    gap[rows, picked[0]] = float("-inf")
    for _ in range(keep - 1):
        picked.append(gap.argmax(-1))
        gap = torch.minimum(gap, distance[rows, picked[-1]])
        gap[rows, picked[-1]] = float("-inf")
    return torch.stack(picked, 1)
