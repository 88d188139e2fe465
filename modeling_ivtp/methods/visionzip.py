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
    key is most similar, and the mean of those that joined is added to it. As in the authors' code, CLS itself is one of
    the dominant tokens: of 64 tokens 53 are dominant patches. It takes the place of the most attended patch that is
    neither dominant nor contextual.

    Parameters
    ----------
    contextual : int, optional
        How many of `keep` are contextual; default: 10 of 64, in proportion.
    keep_cls : bool, default True
        False: all dominant tokens are patches.
    """

    contextual: int | None = None
    keep_cls: bool = True

    name: ClassVar[str] = "visionzip"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("contextual", 0, self.keep, optional=True)
        self.check_flag("keep_cls")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        self.check_whole("contextual", 0, self.keep, optional=True)
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Keep the dominant tokens and merge the others into the contextual ones."""
        record = step.records[-2]
        attention = cls_attention(record)
        images, tokens = attention.shape
        contextual = round(step.keep * 10 / 64) if self.contextual is None else self.contextual
        with_cls = self.keep_cls and contextual < step.keep
        dominant = best(attention, step.keep - contextual - with_cls).kept
        others = torch.ones_like(attention, dtype=torch.bool).scatter(1, dominant, False)
        rest = others.nonzero()[:, 1].view(images, -1)  # (I, r), ascending
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
        if contextual:
            stride = rest.shape[1] // contextual
            is_target[: stride * contextual : stride] = True
        targets, joining = rest[:, is_target], rest[:, ~is_target]
        kept, mixture = [dominant, targets], [one_hot(dominant, tokens)]
        if contextual:
            keys = normalize(patch_keys(record).float().mean(1), dim=-1)
            mixture.append(merged(keys, targets, joining))
        if with_cls:
            place = joining.gather(1, attention.gather(1, joining).argmax(1, keepdim=True))
            kept.append(place)
            mixture = [torch.nn.functional.pad(part, (0, 1)) for part in mixture]
            mixture.append(one_hot(torch.full_like(place, tokens), tokens + 1))
        everything, order = torch.cat(kept, 1).sort(1)
        weights = torch.cat(mixture, 1)
        weights = weights.gather(1, order[..., None].expand(-1, -1, weights.shape[-1]))
        return Choice(everything, mixture=weights, scores=attention)


def merged(keys: torch.Tensor, targets: torch.Tensor, joining: torch.Tensor) -> torch.Tensor:
    """Return the mixture (I, t, k) of contextual tokens: each target, and the mean of the patches that join it.

    Parameters
    ----------
    keys : float32 Tensor (I, k, dh)
        Of unit length.
    targets, joining : int64 Tensor (I, t), (I, j)
        Indices of patches.
    """
    images, tokens, width = keys.shape
    target_keys, keys = (keys.gather(1, index[..., None].expand(-1, -1, width)) for index in (targets, joining))
    partner = (keys @ target_keys.transpose(1, 2)).argmax(-1)
    weights = torch.zeros(images, targets.shape[1], tokens, device=keys.device)
    weights[torch.arange(images, device=keys.device)[:, None], partner, joining] = 1.0
    return weights / weights.sum(-1, keepdim=True).clamp_min(1) + one_hot(targets, tokens)
