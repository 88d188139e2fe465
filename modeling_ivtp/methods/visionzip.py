"""VisionZip (Yang et al., CVPR 2025): dominant tokens by CLS attention, contextual ones by merging the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import best, cls_attention, one_hot, patch_keys


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps the patches that CLS attends to most in the tower's last layer but one, and merges the others into a few.

    Contextual tokens are taken in regular steps from the others. Every other patch joins the one whose head-averaged
    key is most similar, and the mean of those that joined is added to it. CLS itself is not handed over.

    Parameters
    ----------
    contextual : int, optional
        How many of `keep` are contextual; default: 10 of 64, in proportion.
    """

    contextual: int | None = None

    name: ClassVar[str] = "visionzip"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("contextual", 0, self.keep, optional=True)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Keep the dominant tokens and merge the others into the contextual ones."""
        record = step.records[-2]
        attention = cls_attention(record)
        keys = normalize(patch_keys(record).float().mean(1), dim=-1)
        images, tokens = attention.shape
        contextual = round(step.keep * 10 / 64) if self.contextual is None else self.contextual
        dominant = best(attention, step.keep - contextual).kept
        if contextual == 0:
            return Choice(dominant, scores=attention)
        others = torch.ones_like(attention, dtype=torch.bool).scatter(1, dominant, False)
        rest = others.nonzero()[:, 1].view(images, -1)  # (I, r), ascending
        stride = rest.shape[1] // contextual
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
        is_target[: stride * contextual : stride] = True
        targets, joining = rest[:, is_target], rest[:, ~is_target]

        def at(index: torch.Tensor) -> torch.Tensor:
            return keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))

        joined = (at(joining) @ at(targets).transpose(1, 2)).argmax(-1)
        taken = torch.zeros(images, contextual, tokens, device=keys.device)
        taken[torch.arange(images, device=keys.device)[:, None], joined, joining] = 1.0
        taken = taken / taken.sum(-1, keepdim=True).clamp_min(1) + one_hot(targets, tokens)
        kept = torch.cat([dominant, targets], 1)
        mixture = torch.cat([one_hot(dominant, tokens), taken], 1)
        kept, order = kept.sort(1)
        return Choice(kept, mixture=mixture.gather(1, order[..., None].expand(-1, -1, tokens)), scores=attention)
