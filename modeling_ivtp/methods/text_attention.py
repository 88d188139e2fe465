"""Text-to-visual attention in the decoder, of one layer or fused over several, in one step or progressively.

A widespread summary describes this method under the name of IVTP. It is not IVTP: it has no vision tower, no rollout
and no CLIP. It is here for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar

import torch
from transformers.utils import logging

from ..model.configuration_ivtp import is_number, is_weight
from ..model.pruner import Choice, DecoderStep, Needs
from ..model.schedule import Group, PruningPlan, geometric_schedule
from .method import Method, scaled_layers
from .selecting import after_images, best_for_decoder, image_tokens, received

logger = logging.get_logger(__name__)

LAYERS = (8, 16)
"""The numbers of layers before each drop, of 32: the summary gives the first."""
READERS = ("instruction", "text", "vision")


@dataclass(frozen=True)
class TextAttention(Method):
    """Ranks visual tokens by the attention of the instruction's tokens, averaged over heads and tokens.

    By default the attention of several layers is fused and tokens are dropped in two steps, as in the summary, which
    gives the first layer, 8 of 32, and no other number.

    Parameters
    ----------
    keep : int, optional
        Tokens in the end; each drop has the same ratio.
    layers : tuple of int, optional
        The number of layers before each drop, k or k1 and k2; default: 8 and 16 of 32.
    fuse : int, optional
        The number of layers up to each drop that are fused; default: 3 of 32, but none before the last drop.
    weights : tuple of float, optional
        Weight of each fused layer, lowest layer first; default: equal weights.
    readers : {"instruction", "text", "vision"}, default "instruction"
        Whose attention counts: that of the instruction's tokens after the image, of all text after the image, or of the
        image's own tokens, which know nothing of the question. The inputs say which tokens are the instruction
        (`clip_spans`). Where they do not, all text reads.
    ratios : tuple of float, optional
        In place of `keep`: the share of the visual tokens that each drop keeps, r1 and r2.
    """

    layers: tuple[int, ...] | None = None
    fuse: int | None = None
    weights: tuple[float, ...] | None = None
    readers: str = field(default="instruction", kw_only=True)
    ratios: tuple[float, ...] | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "text_attention"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)
    requires: ClassVar[Needs] = Needs(instruction=True)
    budgets: ClassVar[tuple[str, ...]] = ("keep", "average", "ratios")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("fuse", 1, optional=True)
        if self.weights is not None:
            number = self.fuse or (len(self.weights) if isinstance(self.weights, (tuple, list)) else 1)
            if not _are_weights(self.weights, number):
                raise ValueError(
                    f"{self.name}: weights={self.weights}; allowed: {number} numbers (fuse) of at least 0, not all 0."
                )
        if self.readers not in READERS:
            raise ValueError(f"{self.name}: readers={self.readers!r}; allowed: {', '.join(READERS)}.")
        if self.ratios is not None and not _are_ratios(self.ratios):
            raise ValueError(
                f"{self.name}: ratios={self.ratios}; allowed: numbers above 0, up to 1, such as (0.5, 0.5)."
            )

    def final_tokens(self, config: Any, patches: int) -> int:
        """Return `keep`, the number for an `average`, or the one that the ratios lead to."""
        return super().final_tokens(config, patches) if self.ratios is None else self._ratio_counts(patches)[-1]

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every drop, or those of `ratios`."""
        tops = self.tops(config, LAYERS)
        counts = geometric_schedule(patches, self.keep, len(tops))
        if self.ratios is not None:
            if len(self.ratios) != len(tops):
                raise ValueError(
                    f"{self.name}: ratios={self.ratios}; allowed: {len(tops)} of them, one for each drop (layers)."
                )
            counts = self._ratio_counts(patches)
        spans = self.spans(config.text_config.num_hidden_layers)
        return PruningPlan(
            patches, decoder=tuple(Group(*span, count) for span, count in zip(spans, counts, strict=True))
        )

    def spans(self, depth: int) -> list[tuple[int, int]]:
        """Return the first and the last layer (0-based) that each drop fuses, in a decoder of `depth` layers.

        Raises
        ------
        ValueError
            If the decoder does not have them, or a drop fuses layers below the drop before it.
        """
        numbers = self.layers or scaled_layers(LAYERS, 32, depth)
        self.check_depth("layers", numbers, depth)
        fused_layers = self.fuse or len(self.weights or ()) or scaled_layers((3,), 32, depth)[0]
        spans: list[tuple[int, int]] = []
        lowest = 0
        for number in numbers:
            first = number - fused_layers
            if self.fuse is None and self.weights is None:
                first = max(first, lowest)
            if first < lowest:
                raise ValueError(
                    f"{self.name}: fuse={fused_layers} reaches below the drop before layer {number}; allowed: at "
                    f"most {number - lowest} there."
                )
            spans.append((first, number - 1))
            lowest = number
        return spans

    def _ratio_counts(self, patches: int) -> tuple[int, ...]:
        return tuple(max(1, round(patches * share)) for share in accumulate(self.ratios or (), mul))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the fused attention of the readers."""
        return best_for_decoder(step, self.score(step))

    def score(self, step: DecoderStep) -> torch.Tensor:
        """Return the fused attention that each visual token gets of the readers: float32 (B, M, k)."""
        readers = self.readers_at(step)
        # Only text is known to stand at the end.
        first = 0 if self.readers == "vision" else None
        return fused([received(record, step.sequence, readers, first) for record in step.decoder_records], self.weights)

    def readers_at(self, step: DecoderStep) -> torch.Tensor:
        """Mark the tokens that read each image: bool (B, M, n)."""
        if self.readers == "vision":
            return image_tokens(step.sequence)
        return self.instructed(step, after_images(step.sequence))

    def instructed(self, step: DecoderStep, text: torch.Tensor) -> torch.Tensor:
        """Narrow the text after each image (bool (B, M, n)) to the instruction, if its words alone read."""
        if self.readers == "text":
            return text
        if step.instruction is None:
            logger.warning_once(
                "The inputs do not say which tokens are the instruction (clip_spans), so all text after the image "
                "chooses. Prepare inputs with IVTPLlavaProcessor and a CLIP tokenizer."
            )
            return text
        words = text & step.instruction.to(text.device)[:, None]
        return torch.where(words.any(-1, keepdim=True), words, text)


def _are_ratios(ratios: Any) -> bool:
    if not isinstance(ratios, (tuple, list)) or not ratios:
        return False
    return all(is_number(ratio) and 0 < ratio <= 1 for ratio in ratios)


def _are_weights(weights: Any, number: int) -> bool:
    if not isinstance(weights, (tuple, list)) or len(weights) != number:
        return False
    return all(is_weight(value) for value in weights) and sum(weights) > 0


def fused(rows: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
    """Return the weighted mean of several layers' rows."""
    shares: Sequence[Any]
    if isinstance(weights, torch.Tensor):
        shares = list(weights.to(rows[-1].device) / weights.sum().to(rows[-1].device))
    else:
        # Numbers, not a tensor: a GPU would wait for it.
        share = torch.tensor([1.0] * len(rows) if weights is None else weights, dtype=torch.float32)
        shares = (share / share.sum()).tolist()
    total = torch.zeros_like(rows[-1])
    for weight, row in zip(shares, rows, strict=True):
        total = total + weight * row.to(total.device)
    return total
