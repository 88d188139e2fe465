"""PruMerge+ (Shang et al., ICCV 2025): outliers of CLS attention, a uniform sample, and merging by key similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.rollout import AttentionRecord
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import join_choices, one_hot, ranking


@dataclass(frozen=True)
class PruMergePlus(Method):
    """Keeps the patches whose CLS attention is an outlier, and a regular sample of the other patches.

    Outliers lie above the third quartile by 1.5 times the distance of the quartiles, so their number adapts to the
    image. Each kept patch then takes in its nearest patches by the keys of all heads, weighted with their attention.
    The last token is the sum of all dropped patches, weighted likewise, in the place of the most attended of them.
    Attention and keys are those of the tower's last layer, features those that LLaVA reads. As in the authors' code,
    attention is computed with all heads side by side, as one head of their whole width.

    Parameters
    ----------
    keep : int
        Outliers come first, the most attended ones if there are too many; the sample fills up.
    adaptive : bool, default False
        True: the sample is every n-th patch but the last, where n is a third of the patches per outlier, as in the
        authors' code, and `keep` is the largest number. That code fails without an outlier, or if more than a third of
        the patches are outliers; here n is at least 1, and the most attended patch counts as an outlier.
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
        attention = single_head_attention(record)
        keys = normalize(record.flat_patch_keys.float(), dim=-1)
        chosen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for row, key in zip(attention, keys, strict=True):
            stays = outliers_and_sample(row, max(1, step.keep - 1), self.adaptive)
            kept, mixture = stays, take_in(row, key, stays, self.neighbours)
            if step.keep > 1:
                place = row.scatter(0, stays, -1.0).argmax()
                kept, order = torch.cat([stays, place[None]]).sort()
                mixture = torch.cat([mixture, row.scatter(0, stays, 0.0)[None]])[order]
            chosen.append((kept, mixture))
        return join_choices(chosen, attention.shape[1], attention.shape[:1])


def single_head_attention(record: AttentionRecord) -> torch.Tensor:
    """Return the attention of CLS to each patch with all heads as one: float32 (I, k)."""
    query, key = record.query[:, :, 0, 0].float(), record.key.float()
    width = query.shape[1] * query.shape[2]
    return (torch.einsum("ihd,ihkd->ik", query, key) * width**-0.5).softmax(-1)[:, 1:]


def outliers_and_sample(attention: torch.Tensor, keep: int, adaptive: bool) -> torch.Tensor:
    """Choose the patches of one image by the attention of CLS to them (k,): int64, ascending."""
    tokens = len(attention)
    lower, upper = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device)).unbind()
    outliers = max(1, int((attention > upper + 1.5 * (upper - lower)).sum()))
    stays = torch.zeros(tokens, dtype=torch.bool, device=attention.device)
    stays[ranking(attention)[: min(keep, outliers)]] = True
    rest = (~stays).nonzero().flatten()
    if adaptive:
        stride = max(1, int(1 / (outliers / tokens)) // 3)
        rest = rest[(rest % stride == 0) & (rest < tokens - 1)]
    fill = min(keep - min(keep, outliers), len(rest))
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
    similarity = keys[kept] @ keys.T
    similarity = similarity.scatter(1, kept[:, None], float("-inf"))
    near = ranking(similarity)[:, : min(neighbours, tokens - 1)]
    return mixture.scatter(1, near, attention[near])
