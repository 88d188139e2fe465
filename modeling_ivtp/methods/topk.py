"""TopK and TopK+ (IVTP Tables 1 and 7): the patches that CLS attends to most, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..configuration_ivtp import IVTPPruningConfig
from ..group_rollout import reference_row
from ..pruning_policy import Choice, DecoderMoment, TowerMoment
from ..token_budget import PruningPlan
from .method import Method, feature_depth, linear_schedule, single_layers
from .selecting import best, cls_attention


@dataclass(frozen=True)
class TopK(Method):
    """Drops, at every layer of the tower, the patches that CLS attends to least; as many at each.

    The paper gives the tower's FLOPs and not the schedule; equal steps come to them within 8% of the tower and 0.2% of
    the whole.
    """

    name: ClassVar[str] = "topk"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def layout(self, config: Any, patches: int) -> PruningPlan:
        """Equal steps down the layers that make the features."""
        return PruningPlan(patches, tower=single_layers(linear_schedule(patches, self.keep, feature_depth(config))))

    def in_tower(self, moment: TowerMoment) -> Choice:
        """By the CLS row of the layer's attention, averaged over heads."""
        return best(cls_attention(moment.records[-1]), moment.group.keep)


@dataclass(frozen=True)
class TopKPlus(TopK):
    """TopK continued in the decoder's first layers, still by visual similarity alone: with the image's own CLS.

    Parameters
    ----------
    tower_tokens : int, optional
        What the tower hands over; default: 1.875 times `keep`, as IVTP does.
    decoder_layers : int, optional
        Layers of the decoder that take part; default: as many as the model's own pruning, 12 of LLaVA-1.5.
    """

    tower_tokens: int | None = None
    decoder_layers: int | None = None

    name: ClassVar[str] = "topk+"
    stages: ClassVar[tuple[str, ...]] = ("tower", "decoder")
    observes = True
    reading = IVTPPruningConfig(guidance="visual_cls", aggregation="last")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("tower_tokens", self.keep, optional=True)
        self.check_whole("decoder_layers", 1, optional=True)

    def layout(self, config: Any, patches: int) -> PruningPlan:
        """Equal steps in each of the two stages."""
        handed_over = min(patches, self.tower_tokens or round(1.875 * self.keep))
        return PruningPlan(
            patches,
            tower=single_layers(linear_schedule(patches, handed_over, feature_depth(config))),
            decoder=single_layers(linear_schedule(handed_over, self.keep, decoder_depth(self, config))),
        )

    def in_decoder(self, moment: DecoderMoment) -> Choice:
        """By the attention of the image's CLS, which travels along."""
        return best(reference_row(moment.records[-1])[..., 1:], moment.group.keep)


def decoder_depth(method: Any, config: Any) -> int:
    """How many layers of the decoder a two-stage method prunes in.

    Raises
    ------
    ValueError
        If the model has fewer.
    """
    there = config.text_config.num_hidden_layers
    if method.decoder_layers is None:
        return min(there, config.pruning.decoder_layers or there)
    if method.decoder_layers > there:
        raise ValueError(f"{method.name}: decoder_layers={method.decoder_layers}; the decoder has {there} layers.")
    return method.decoder_layers
