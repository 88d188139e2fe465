"""FastV (Chen et al., ECCV 2024): after layer K, what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.schedule import Group, PruningPlan
from .method import Method
from .selecting import best_for_decoder, on_visual


@dataclass(frozen=True)
class FastV(Method):
    """Ranks visual tokens by the attention that the prompt's last token pays them in layer K, averaged over heads.

    Parameters
    ----------
    layer : int, default 2
        K: how many layers of the decoder see everything.
    """

    layer: int = 2

    name: ClassVar[str] = "fastv"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("layer", 1)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """All at once after layer K."""
        self.check_depth("layer", (self.layer,), config.text_config.num_hidden_layers)
        return PruningPlan(patches, decoder=(Group(self.layer - 1, self.layer - 1, self.keep),))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """By the last token's attention."""
        return best_for_decoder(step, received_from_last(step))


def received_from_last(step: DecoderStep) -> torch.Tensor:
    """What visual tokens receive from the prompt's last token: float32 (B, M, k)."""
    watch, sequence = step.decoder_records[-1], step.sequence
    first = sequence.prompt_end - 1
    one = torch.zeros(*sequence.columns.shape[:2], sequence.size - first, device=watch.query.device)
    one[..., 0] = 1.0
    return on_visual(watch.attention(first, one), sequence)
