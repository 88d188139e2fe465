"""ATP-LLaVA's selection at inference (Ye et al., CVPR 2025; Sec. 3.3.1): redundancy scores and a spatial sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.rollout import DecoderAttentionRecord
from ..model.schedule import PruningPlan, geometric_schedule
from ..model.visual_sequence import VisualSequence
from .method import Method, groups_after
from .selecting import after_images, best, best_for_decoder, on_visual, ranking, received


@dataclass(frozen=True)
class ATPSpatial(Method):
    """Keeps the tokens that others attend to, and a uniform sample of the remaining grid.

    The redundancy score is the mean of what a token receives from the visual tokens as logits (Eq. 3) and from the text
    as attention (Eq. 4). ATP-LLaVA learns two thresholds for each image and layer. Here they are counts instead: a
    share of the kept tokens is the sample, in regular steps over what is left of the grid, row by row; the other tokens
    are the best by redundancy score. ATP-LLaVA's two-dimensional positions, which need training, are left out.

    Parameters
    ----------
    spatial : float, default 0.25
        Share of the sample among the kept tokens.
    layers : tuple of int, optional
        The number of layers before each drop; default: 4, 14 and 24 of 32.
    """

    spatial: float = 0.25
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "atp-spatial"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("spatial")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every drop."""
        tops = self.tops(config, (4, 14, 24))
        counts = geometric_schedule(patches, self.keep, len(tops))
        return PruningPlan(patches, decoder=groups_after(tops, counts))

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Take the sample first, then the best by redundancy score."""
        record, sequence = step.decoder_records[-1], step.sequence
        cross = received(record, sequence, after_images(sequence))
        score = (received_logits(record, sequence) + cross) / 2
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


def received_logits(
    record: DecoderAttentionRecord, sequence: VisualSequence, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean logit of the visual tokens to each of them, averaged over heads (Eq. 1, 3): (B, M, k).

    `weights` (B, M, k) say how much each of them counts in the mean, where tokens are weighted and not dropped.
    """
    query, key = record.query.float(), record.key[:, :, record.past :].float()
    counted = sequence.token_present.to(query.device).float()
    if weights is not None:
        counted = counted * weights.detach().to(query.device)
    weight = torch.zeros(*counted.shape[:2], sequence.size + 1, device=query.device)
    weight = weight.scatter(2, sequence.columns.to(query.device), counted)[..., :-1]
    mean = torch.einsum("bmn,bhnd->bhmd", weight, query) / counted.sum(-1).clamp_min(1e-6)[:, None, :, None]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhmd,bhnd->bmn", mean, key) * record.scale / query.shape[1]
    return on_visual(logits, sequence)
