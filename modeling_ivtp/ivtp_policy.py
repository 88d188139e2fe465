"""IVTP as a policy: group-wise rollout in both towers, for the CLS and the pseudo CLS (Sec. 3.2 to 3.4)."""

from dataclasses import dataclass
from typing import Any

from .configuration_ivtp import IVTPPruningConfig
from .group_rollout import AttentionRecord, decide
from .pruning_policy import Choice, DecoderMoment, Policy, TowerMoment
from .token_budget import Group, PruningPlan, plan_pruning


@dataclass(frozen=True)
class IVTPPolicy(Policy):
    """What the pruning options of a model say.

    Attributes
    ----------
    reading : IVTPPruningConfig
    """

    reading: IVTPPruningConfig

    observes = True

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether positions are renumbered without gaps."""
        return self.reading.positions == "compact"

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """See `plan_pruning`."""
        layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        return plan_pruning(self.reading, patches, *layers)

    @property
    def embeds_image(self) -> bool:  # type: ignore[override]
        """Relevance compares words with CLIP's embedding of the image (Eq. 6)."""
        return self.reading.guidance == "clip"

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Rollout goes down through all tokens' rows; the top layer gives one row, and so does every other reading."""
        return AttentionRecord(reference_only=layer == group.last or self.reading.aggregation != "rollout")

    def in_tower(self, moment: TowerMoment) -> Choice:
        """The patches that matter most to CLS."""
        scores, kept = decide(moment.records, self.reading.aggregation, moment.group.keep)
        return Choice(kept[:, 0], scores=scores[:, 0])

    def in_decoder(self, moment: DecoderMoment) -> Choice:
        """The visual tokens that matter most to the pseudo CLS."""
        scores, kept = decide(moment.records, self.reading.aggregation, moment.group.keep)
        return Choice(kept, scores=scores)
