"""EViT (Liang et al., ICLR 2022): attentive patches stay, the others are fused into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, TowerStep
from ..model.schedule import PruningPlan, geometric_schedule
from .method import Method, groups_after
from .selecting import cls_attention, one_hot, ranking


@dataclass(frozen=True)
class EViT(Method):
    """Keeps, between attention and MLP of three layers, the patches that CLS attends to most.

    The others become one token, their sum weighted with that attention (Sec. 3.2). EViT acts at layers 4, 7 and 10 of
    12, and here at the same shares of the tower's depth, with one keep rate for all three. The fused token is one of
    the `keep`. It takes the place of the most attentive of the fused patches.
    """

    name: ClassVar[str] = "evit"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan three steps of one ratio."""
        depth = config.feature_depth
        layers = tuple(dict.fromkeys(max(1, round(at * depth / 12)) - 1 for at in (4, 7, 10)))
        counts = geometric_schedule(patches, self.keep, len(layers))
        return PruningPlan(patches, tower=groups_after(layers, counts, middle=True))

    def in_tower(self, step: TowerStep) -> Choice:
        """Keep the attentive patches and fuse the others."""
        attention = cls_attention(step.records[-1])
        tokens = attention.shape[-1]
        order = ranking(attention)
        stays = torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order[:, : step.group.keep - 1], True)
        kept = order[:, : step.group.keep].sort(-1).values
        mixture = one_hot(kept, tokens)
        fused = attention.masked_fill(stays, 0)
        is_fused = ~stays.gather(-1, kept)
        mixture = torch.where(is_fused[..., None], fused[:, None], mixture)
        return Choice(kept, mixture=mixture, scores=attention)
