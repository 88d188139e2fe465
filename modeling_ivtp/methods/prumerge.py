"""PruMerge+ (Shang et al., ICCV 2025): outliers of CLS attention, a uniform sample, and merging by key similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import cls_attention, join_choices, one_hot, patch_keys, ranking


@dataclass(frozen=True)
class PruMergePlus(Method):
    """Keeps the patches whose CLS attention is an outlier, and a regular sample of the other patches.

    Outliers lie above the third quartile by 1.5 times the distance of the quartiles, so their number adapts to the
    image. Each kept patch then takes in its nearest patches by the keys of all heads, weighted with their attention.
    Attention and keys are those of the tower's last layer, features those that LLaVA reads.

    Parameters
    ----------
    keep : int
        Outliers come first, the most attended ones if there are more than `keep`; the sample fills up.
    adaptive : bool, default False
        True: the sample has three patches for every outlier, in regular steps, and `keep` is the largest number.
    neighbours : int, default 32
        The number of patches that each kept one takes in.
    """

    adaptive: bool = False
    neighbours: int = 32

    name: ClassVar[str] = "prumerge+"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-1,))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("neighbours", 0)
        self.check_flag("adaptive")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep, exact=not self.adaptive)

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose and merge, image by image."""
        record = step.records[-1]
        attention = cls_attention(record)
        keys = normalize(patch_keys(record).float().transpose(1, 2).flatten(2), dim=-1)  # (I, k, H dh)
        chosen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for row, key in zip(attention, keys, strict=True):
            kept = outliers_and_sample(row, step.keep, self.adaptive)
            chosen.append((kept, take_in(row, key, kept, self.neighbours)))
        return join_choices(chosen, attention.shape[1], attention.shape[:1])


def outliers_and_sample(attention: torch.Tensor, keep: int, adaptive: bool) -> torch.Tensor:
    """Choose the patches of one image by the attention of CLS to them (k,): int64, ascending."""
    tokens = len(attention)
    lower, upper = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device)).unbind()
    number = min(keep, max(1, int((attention > upper + 1.5 * (upper - lower)).sum())))
    stays = torch.zeros(tokens, dtype=torch.bool, device=attention.device)
    stays[ranking(attention)[:number]] = True
    fill = min(keep, 4 * number) - number if adaptive else keep - number
    rest = (~stays).nonzero().flatten()
    if fill:
        # The middle of each of `fill` equal stretches of what is left.
        steps = (torch.arange(fill, device=attention.device) * 2 + 1) * len(rest) // (2 * fill)
        stays[rest[steps]] = True
    return stays.nonzero().flatten()


def take_in(attention: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return the mixture of one image's kept patches: float32 (k', k).

    Each is itself and its nearest patches, kept ones among them, weighted with the attention of CLS to them.
    """
    tokens = len(attention)
    mixture = one_hot(kept, tokens)
    alike = keys[kept] @ keys.T
    alike = alike.scatter(1, kept[:, None], float("-inf"))
    near = ranking(alike)[:, : min(neighbours, tokens - 1)]
    return mixture.scatter(1, near, attention[near])
