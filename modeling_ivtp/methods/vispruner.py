"""VisPruner (Zhang et al., ICCV 2025): important patches by CLS attention, diverse ones by removing duplicates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import best, cls_attention, ranking

AT_ONCE = 8
"""Patches that are removed in a round."""


@dataclass(frozen=True)
class VisPruner(Method):
    """Keeps the patches that CLS attends to most, and of the others those that no other patch resembles.

    A share of the budget is for *important* patches, by the attention of CLS in the tower's last layer but one. The
    *diverse* ones are what is left when duplicates are removed, eight in a round: the others alternate between two
    sets, and those of the first set go whose cosine with their nearest patch of the second is highest. The first round
    alternates in the order of attention, a later one over what is left of the first set, the least similar last, and
    then the second set.

    As in the authors' code (Theia-4869/VisPruner, arXiv 2412.01818), similarity is that of the features before the
    projector. Its rounds need even numbers; here the first set has one patch more where the number is odd.

    Parameters
    ----------
    important_ratio : float, default 0.5
        Share of important patches, rounded down.
    """

    important_ratio: float = field(default=0.5, kw_only=True)

    name: ClassVar[str] = "vispruner"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("important_ratio")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Keep important patches, and those of the others that are left in the end."""
        attention = cls_attention(step.records[-2])
        order, important = ranking(attention), int(step.keep * self.important_ratio)
        unit = normalize(step.features.double(), dim=-1)
        rest = without_duplicates(unit @ unit.transpose(1, 2), order[:, important:], step.keep - important)
        stays = torch.zeros_like(attention, dtype=torch.bool)
        stays.scatter_(1, torch.cat([order[:, :important], rest.to(order.device)], 1), True)
        return replace(best(stays.float(), step.keep), scores=attention)


def without_duplicates(similarity: torch.Tensor, tokens: torch.Tensor, keep: int) -> torch.Tensor:
    """Remove duplicates round by round until `keep` tokens are left.

    Parameters
    ----------
    similarity : Tensor (I, k, k)
    tokens : int64 Tensor (I, n)
        The candidates, in the order over which they alternate.
    keep : int

    Returns
    -------
    int64 Tensor (I, keep)
    """
    if keep == 0:
        return tokens[:, :0]
    tokens, images = tokens.to(similarity.device), torch.arange(len(tokens), device=similarity.device)
    while tokens.shape[1] > keep:
        first, second = tokens[:, ::2], tokens[:, 1::2]
        gone = min(AT_ONCE, tokens.shape[1] - keep, first.shape[1])
        nearest = similarity[images[:, None, None], first[:, :, None], second[:, None]].amax(-1)
        tokens = torch.cat([first.gather(1, ranking(nearest)[:, gone:]), second], 1)
    return tokens
