"""TopK and TopK+ (IVTP Tables 1 and 7): the patches that CLS attends to most, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..model.configuration_ivtp import IVTPPruningConfig
from ..model.pruner import Choice, DecoderStep, Needs, TowerStep
from ..model.rollout import reference_row
from ..model.schedule import PruningPlan
from .method import Method, linear_schedule, single_layers
from .selecting import best, cls_attention
from .two_stage import TwoStage

CRITERIA = ("attention", "similarity")


@dataclass(frozen=True)
class TopK(Method):
    """Drops, at every layer of the tower, the patches that CLS attends to least; as many at each.

    The paper prints the tower's FLOPs and not the schedule. Equal steps reproduce them within 8% for the tower and 0.2%
    for the whole model.

    Parameters
    ----------
    criterion : {"attention", "similarity"}, default "attention"
        Whether patches are ranked by the attention of CLS to them, averaged over heads, or by the cosine of their
        hidden states with those of CLS. IVTP's Sec. 4.1 calls the criterion similarity with CLS.
    """

    criterion: str = field(default="attention", kw_only=True)

    name: ClassVar[str] = "topk"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ValueError(f"{self.name}: criterion={self.criterion!r}; allowed: {', '.join(CRITERIA)}.")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan equal steps over the layers below the features."""
        return PruningPlan(patches, tower=single_layers(linear_schedule(patches, self.keep, config.feature_depth)))

    def in_tower(self, step: TowerStep) -> Choice:
        """Rank by the CLS row of the layer's attention, or by similarity with CLS."""
        if self.criterion == "similarity":
            return best(similarity(step.hidden[:, 1:], step.hidden[:, 0]), step.group.keep)
        return best(cls_attention(step.records[-1]), step.group.keep)


@dataclass(frozen=True)
class TopKPlus(TwoStage, TopK):
    """TopK continued in the decoder's first layers, still by the image's own CLS.

    CLS runs through these layers as the pseudo-CLS token; `criterion` says how visual tokens are compared with it.
    """

    name: ClassVar[str] = "topk+"
    stages: ClassVar[tuple[str, ...]] = ("tower", "decoder")
    requires: ClassVar[Needs] = Needs(
        pseudo_cls=True, options=IVTPPruningConfig(guidance="visual_cls", aggregation="last")
    )

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan equal steps in each of the two stages."""
        handed_over = self.handed_over(patches)
        return PruningPlan(
            patches,
            tower=single_layers(linear_schedule(patches, handed_over, config.feature_depth)),
            decoder=single_layers(linear_schedule(handed_over, self.keep, self.depth(config))),
        )

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the attention of the image's CLS, or by similarity with it."""
        if self.criterion == "similarity":
            assert step.pseudo_cls is not None
            return best(similarity(step.sequence.visual(step.hidden), step.pseudo_cls), step.group.keep)
        return best(reference_row(step.records[-1])[..., 1:], step.group.keep)


def similarity(tokens: torch.Tensor, cls: torch.Tensor) -> torch.Tensor:
    """Return the cosines of tokens (..., k, d) with CLS (..., d): float32 (..., k)."""
    return torch.nn.functional.cosine_similarity(tokens.float(), cls.float()[..., None, :], dim=-1)
