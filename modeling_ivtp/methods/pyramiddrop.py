"""PyramidDrop (Xing et al., CVPR 2025): the decoder in stages, a share of the visual tokens dropped after each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..model.pruner import Choice, DecoderStep, Needs
from ..model.schedule import PruningPlan, geometric_schedule
from .fastv import received_from_last
from .method import Method, groups_after
from .selecting import best_for_decoder


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Cuts the decoder into four equal stages and keeps one share of the visual tokens at the end of each but the last.

    Tokens are ranked by the attention of the instruction's last token, averaged over heads. As in the authors' code,
    it is the attention of the layer after the stage: its norm, queries and keys on the stage's output. The share is the
    one that leads to `keep`.

    Parameters
    ----------
    layers : tuple of int, optional
        The number of layers before each drop; default: 8, 16 and 24 of 32.
    next_layer : bool, default True
        False: rank by the attention of the stage's last layer, which costs no further products.
    """

    layers: tuple[int, ...] | None = None
    next_layer: bool = True

    name: ClassVar[str] = "pyramiddrop"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("next_layer")

    @property
    def needs(self) -> Needs:
        """The queries and keys of the layer after each stage, if that layer ranks."""
        return replace(super().needs, next_record=self.next_layer)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every stage."""
        tops, depth = self.tops(config, (8, 16, 24)), config.text_config.num_hidden_layers
        if self.next_layer and tops[-1] == depth - 1:
            numbers = tuple(top + 1 for top in tops)
            raise ValueError(
                f"{self.name}: layers={numbers}; allowed: 1 to {depth - 1}, because a later layer ranks, or "
                "next_layer=False."
            )
        counts = geometric_schedule(patches, self.keep, len(tops))
        return PruningPlan(patches, decoder=groups_after(tops, counts))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the last token's attention."""
        record = step.decoder_records[-1] if step.next_record is None else step.next_record
        return best_for_decoder(step, received_from_last(record, step.sequence))
