"""FastV (Chen et al., ECCV 2024): after layer K, the visual tokens that the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.rollout import DecoderAttentionRecord
from ..model.schedule import Group, PruningPlan
from ..model.visual_sequence import VisualSequence
from .method import Method
from .selecting import best_for_decoder, on_visual, prompt_ends, received


@dataclass(frozen=True)
class FastV(Method):
    """Ranks visual tokens by the attention of the prompt's last token to them in layer K, averaged over heads.

    Parameters
    ----------
    layer : int, default 2
        K: the number of decoder layers that get all visual tokens.
    """

    layer: int = 2

    name: ClassVar[str] = "fastv"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("layer", 1)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one drop after layer K."""
        self.check_depth("layer", (self.layer,), config.text_config.num_hidden_layers)
        return PruningPlan(patches, decoder=(Group(self.layer - 1, self.layer - 1, self.keep),))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the last token's attention."""
        return best_for_decoder(step, received_from_last(step.decoder_records[-1], step.sequence))


def received_from_last(record: DecoderAttentionRecord, sequence: VisualSequence) -> torch.Tensor:
    """Return the attention of the prompt's last token to the visual tokens: float32 (B, M, k).

    In training it is that of the tokens right before the answers, averaged, as PyramidDrop trains.
    """
    if sequence.answers is not None:
        readers = prompt_ends(sequence)[:, None].expand(-1, sequence.columns.shape[1], -1)
        return received(record, sequence, readers, first=0)
    last = sequence.prompt_end - 1
    weights = torch.zeros(*sequence.columns.shape[:2], sequence.size - last, device=record.query.device)
    weights[..., 0] = 1.0
    return on_visual(record.attention(last, weights), sequence)
