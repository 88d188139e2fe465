"""DivPrune (Alvar et al., CVPR 2025): the most diverse visual tokens, by the max-min distance problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn.functional import normalize

from ..model.diversity import farthest
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
