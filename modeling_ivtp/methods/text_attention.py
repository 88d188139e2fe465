"""Text-to-visual attention in the decoder, of one layer or fused over several, in one step or progressively.

A widespread summary describes this method under the name of IVTP. It is not IVTP: it has no vision tower, no rollout
and no CLIP. It is here for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.schedule import Group, PruningPlan, geometric_schedule
from .method import Method
from .selecting import after_images, best_for_decoder, received


@dataclass(frozen=True)
class TextAttention(Method):
    """Ranks visual tokens by the attention of the text after their image, averaged over heads and text tokens.

    Parameters
    ----------
    layers : tuple of int, optional
        The number of layers before each drop, k or k1 and k2; default: 8 of 32. Progressive drops share one ratio.
    fuse : int, default 1
        The number of layers up to each drop that are fused.
    weights : tuple of float, optional
        Weight of each of them, lowest layer first; default: equal weights.
    """

    layers: tuple[int, ...] | None = None
    fuse: int = 1
    weights: tuple[float, ...] | None = None

    name: ClassVar[str] = "text_attention"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("fuse", 1)
        if self.weights is not None and not _are_weights(self.weights, self.fuse):
            raise ValueError(
                f"{self.name}: weights={self.weights}; allowed: {self.fuse} numbers (fuse) of at least 0, not all 0."
            )

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every drop."""
        tops = self.tops(config, (8,))
        groups: list[Group] = []
        for top, count in zip(tops, geometric_schedule(patches, self.keep, len(tops)), strict=True):
            first = top - self.fuse + 1
            if first < (groups[-1].last + 1 if groups else 0):
                raise ValueError(
                    f"{self.name}: fuse={self.fuse} reaches below the drop before layer {top + 1}; allowed: at most "
                    f"{top - (groups[-1].last if groups else -1)} there."
                )
            groups.append(Group(first, top, count))
        return PruningPlan(patches, decoder=tuple(groups))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the fused attention of the text."""
        readers = after_images(step.sequence)
        rows = [received(record, step.sequence, readers) for record in step.decoder_records]
        return best_for_decoder(step, fused(rows, self.weights))


def _are_weights(weights: Any, number: int) -> bool:
    if not isinstance(weights, (tuple, list)) or len(weights) != number:
        return False
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in weights):
        return False
    if not all(0 <= value < inf for value in weights):
        return False
    return sum(weights) > 0


def fused(rows: Sequence[torch.Tensor], weights: Sequence[float] | None) -> torch.Tensor:
    """Return the weighted mean of several layers' rows."""
    share = torch.tensor(weights or [1.0] * len(rows), dtype=torch.float32)
    share = share / share.sum()
    total = torch.zeros_like(rows[-1])
    for weight, row in zip(share.tolist(), rows, strict=True):
        total = total + weight * row.to(total.device)
    return total
