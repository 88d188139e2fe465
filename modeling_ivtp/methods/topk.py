"""TopK and TopK+ (IVTP Tables 1 and 7): the patches that CLS attends to most, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..model.configuration_ivtp import IVTPPruningConfig
from ..model.pruner import Choice, DecoderStep, Needs, TowerStep
from ..model.rollout import reference_row
from ..model.schedule import PruningPlan
from .method import Method, linear_schedule, single_layers
from .selecting import best, cls_attention
from .two_stage import TwoStage


@dataclass(frozen=True)
class TopK(Method):
    """Drops, at every layer of the tower, the patches that CLS attends to least; as many at each.

    The paper prints the tower's FLOPs and not the schedule. Equal steps reproduce them within 8% for the tower and 0.2%
    for the whole model.
    """

    name: ClassVar[str] = "topk"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan equal steps over the layers below the features."""
        return PruningPlan(patches, tower=single_layers(linear_schedule(patches, self.keep, config.feature_depth)))

    def in_tower(self, step: TowerStep) -> Choice:
        """Rank by the CLS row of the layer's attention, averaged over heads."""
        return best(cls_attention(step.records[-1]), step.group.keep)


@dataclass(frozen=True)
class TopKPlus(TwoStage, TopK):
    """TopK continued in the decoder's first layers, still by visual similarity alone: by the image's own CLS."""

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
        """Rank by the attention of the image's CLS, which runs through the layers as the pseudo-CLS token."""
        return best(reference_row(step.records[-1])[..., 1:], step.group.keep)
