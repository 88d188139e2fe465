"""ATP-LLaVA's selection at inference (Ye et al., CVPR 2025; Sec. 3.3.1): redundancy scores and a spatial sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.rollout import DecoderAttentionRecord
from ..model.schedule import PruningPlan, geometric_schedule
from ..model.visual_sequence import VisualSequence
from .method import Method, after
from .selecting import after_images, best, best_for_decoder, on_visual, ranking, received


@dataclass(frozen=True)
class ATPSpatial(Method):
    """Keeps the tokens that others attend to, and a uniform sample of what is left that none of them crowds out.

    The redundancy score is the mean of what a token receives from the visual tokens as logits (Eq. 3) and from the text
    as attention (Eq. 4). ATP-LLaVA learns two thresholds for each picture and layer; here they are counts instead: a
    share of the kept tokens is the sample, regular steps over what is left of the grid, row by row; the rest goes by
    redundancy score. ATP-LLaVA's two-dimensional positions, which are learned with, are not part of it.

    Parameters
    ----------
    spatial : float, default 0.25
        Share of the kept tokens that the uniform sample makes.
    layers : tuple of int, optional
        How many layers stand below each drop; default: 4, 14 and 24 of 32.
    """

    spatial: float = 0.25
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "atp-spatial"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("spatial")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """One ratio for every drop."""
        tops = self.tops(config, (4, 14, 24))
        counts = geometric_schedule(patches, self.keep, len(tops))
        return PruningPlan(patches, decoder=after(tops, counts))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """The sample first, then by redundancy score."""
        watch, sequence = step.decoder_records[-1], step.sequence
        cross = received(watch, sequence, after_images(sequence))
        score = (received_logits(watch, sequence) + cross) / 2
        tokens, keep = sequence.columns.shape[2], step.group.keep
        number = round(self.spatial * keep)
        if number == 0:
            return best_for_decoder(step, score)
        count = sequence.token_present.sum(-1, keepdim=True).to(score.device)
        # The middle of each of `number` equal stretches of what is left, row by row.
        sample = (torch.arange(number, device=score.device) * 2 + 1) * count // (2 * number)
        first = torch.zeros_like(score).scatter(-1, sample.clamp_max(tokens - 1), 1.0)
        rank = ranking(score).argsort(-1)
        chosen = best(first * tokens - rank, keep, sequence.token_present if sequence.ragged else None)
        return Choice(chosen.kept, scores=score, ragged=chosen.ragged)


def received_logits(watch: DecoderAttentionRecord, sequence: VisualSequence) -> torch.Tensor:
    """Mean product of the visual tokens' queries with each one's key, averaged over heads (Eq. 1, 3): (B, M, k)."""
    query, key = watch.query.float(), watch.key[:, :, watch.past :].float()
    there = sequence.token_present.to(query.device)
    weight = torch.zeros(*there.shape[:2], sequence.size + 1, device=query.device)
    weight = weight.scatter(2, sequence.columns.to(query.device), 1.0)[..., :-1]
    mean = torch.einsum("bmn,bhnd->bhmd", weight, query) / there.sum(-1).clamp_min(1)[:, None, :, None]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhmd,bhnd->bmn", mean, key) * watch.scale / query.shape[1]
    return on_visual(logits, sequence)
