"""PyramidDrop (Xing et al., CVPR 2025): the decoder in stages, a share of the visual tokens dropped after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..model.pruner import Choice, DecoderStep
from ..model.schedule import PruningPlan, geometric_schedule
from .fastv import received_from_last
from .method import Method, groups_after
from .selecting import best_for_decoder


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Cuts the decoder into four equal stages and keeps one share of the visual tokens at the end of each but the last.

    Tokens are ranked by the attention of the instruction's last token in the stage's last layer, averaged over heads.
    The share is the one that leads to `keep`.

    Parameters
    ----------
    layers : tuple of int, optional
        The number of layers before each drop; default: 8, 16 and 24 of 32.
    """

    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "pyramiddrop"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every stage."""
        tops = self.tops(config, (8, 16, 24))
        counts = geometric_schedule(patches, self.keep, len(tops))
        return PruningPlan(patches, decoder=groups_after(tops, counts))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the last token's attention."""
        return best_for_decoder(step, received_from_last(step))
