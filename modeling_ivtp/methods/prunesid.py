"""PruneSID (Fang et al., ICLR 2026): groups of patches by principal components, without redundancy inside a group."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import cls_attention, one_hot, ranking

GROUP_SIZE = 4
"""Tokens of the budget for each group."""


@dataclass(frozen=True)
class PruneSID(Method):
    """Groups the patches by meaning, suppresses similar ones inside each group, and shares out the budget.

    *Principal semantic components* (arXiv 2603.09480): a patch belongs to the right singular vector of the features
    on which it weighs most. The features go through a sigmoid first, and each patch is centred. There is one group for
    each four tokens of the budget. *Suppression*: inside a group the patch that CLS attends to most is picked and those
    suppressed whose cosine with it is above a threshold, until none is left. The threshold is the mean cosine of two
    patches times the budget over 32, so a larger budget suppresses less. *Shares*: each group gets one token, and the
    rest in proportion to its picked patches, up to five for each 64 tokens of the budget. A group gives its picked
    patches first, in their order, and then suppressed ones by the attention of CLS.

    As in the authors' code (ZhengyaoFang/PruneSID), features and attention are those of the tower's last layer but one,
    and CLS itself is one of the tokens. It takes the place of the most attended patch that does not stay. That code
    finds the components by a randomised factorisation; here they are exact, so that an image always keeps the same. The
    paper's further rule, a budget that depends on the image, is not in that code, nor here.

    Parameters
    ----------
    keep_cls : bool, default True
        False: all tokens are patches.
    """

    keep_cls: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "prunesid"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("keep_cls")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose image by image."""
        attention = cls_attention(step.records[-2])
        images, tokens = attention.shape
        groups = principal_groups(step.features, max(1, step.keep // GROUP_SIZE)).to(attention.device)
        unit = normalize(step.features.double(), dim=-1).to(attention.device)
        with_cls = self.keep_cls and step.keep > 1
        stays = torch.zeros_like(attention, dtype=torch.bool)
        for image in range(images):
            similarity = unit[image] @ unit[image].T
            stays[image, of_groups(attention[image], similarity, groups[image], step.keep, with_cls)] = True
        if not with_cls:
            return Choice(stays.nonzero()[:, 1].view(images, -1), scores=attention)
        place = attention.masked_fill(stays, -1).argmax(1, keepdim=True)
        kept = stays.scatter(1, place, True).nonzero()[:, 1].view(images, -1)
        return Choice(kept, mixture=one_hot(kept.where(kept != place, tokens), tokens + 1), scores=attention)


def principal_groups(features: torch.Tensor, number: int) -> torch.Tensor:
    """Assign patches to the principal component on which they weigh most: int64 (I, k), from 0 to `number` - 1.

    Parameters
    ----------
    features : Tensor (I, k, D)
    number : int
        Components; at most k and D.
    """
    values = features.float().sigmoid().double()
    weights = torch.linalg.svd(values - values.mean(-1, keepdim=True), full_matrices=False)[0]
    return weights[..., :number].abs().argmax(-1)


def of_groups(
    attention: torch.Tensor, similarity: torch.Tensor, groups: torch.Tensor, keep: int, with_cls: bool
) -> torch.Tensor:
    """Choose the patches of one image: int64 (n,), where n is `keep`, less one `with_cls`.

    Parameters
    ----------
    attention : float32 Tensor (k,)
        Of CLS to each patch.
    similarity : float64 Tensor (k, k)
    groups : int64 Tensor (k,)
    keep : int
    with_cls : bool
    """
    tokens, number = len(attention), max(1, keep // GROUP_SIZE)
    pairs = tokens * (tokens - 1)
    mean = (similarity.sum() - similarity.diagonal().sum()) / pairs
    places = suppressed(attention, similarity > mean * keep / 32, groups, number)
    sizes = groups.bincount(minlength=number).tolist()
    picked = groups[places < tokens].bincount(minlength=number).tolist()
    counts = shares(sizes, picked, keep, keep - with_cls)
    # Picked patches in the order in which they were picked, then the others by attention.
    order = ranking(attention)
    order = order[places[order].sort(stable=True).indices]
    return torch.cat([order[groups[order] == group][:count] for group, count in enumerate(counts)])


def suppressed(attention: torch.Tensor, similar: torch.Tensor, groups: torch.Tensor, number: int) -> torch.Tensor:
    """Return the round in which each patch is picked inside its group, or k if it is suppressed: int64 (k,).

    Parameters
    ----------
    attention : float32 Tensor (k,)
    similar : bool Tensor (k, k)
        Whether the one, if picked, suppresses the other.
    groups : int64 Tensor (k,)
    number : int
        Groups.
    """
    tokens = len(attention)
    left = torch.zeros(number, tokens, dtype=attention.dtype, device=attention.device)
    left[groups, torch.arange(tokens, device=attention.device)] = attention
    places = torch.full_like(groups, tokens)
    for place in range(tokens):
        highest, at = left.max(-1)
        at = at[highest > 0]
        if not len(at):
            break
        places[at] = place
        left[groups[at]] = left[groups[at]].masked_fill(similar[at], 0)
        left[groups[at], at] = 0
    return places


def shares(sizes: list[int], picked: list[int], keep: int, patches: int) -> list[int]:
    """Share out a number of patches among the groups.

    Parameters
    ----------
    sizes, picked : list of int
        Patches of each group, and those of them that were not suppressed.
    keep : int
        Tokens of the budget.
    patches : int
        Patches to share out, at most `keep`.

    Examples
    --------
    >>> shares([10, 10, 4], [2, 6, 4], 12, 11)
    [2, 5, 4]
    """
    least = [min(1, size) for size in sizes]
    most = [min(5 * ceil(keep / 64), size, number) for size, number in zip(sizes, picked, strict=True)]
    while sum(most) < keep:
        most = [min(limit + 1, size) for limit, size in zip(most, sizes, strict=True)]
    others, total, before, so_far, counts = max(0, patches - sum(least)), sum(picked), 0, 0, []
    for at_least, at_most, number in zip(least, most, picked, strict=True):
        so_far += number
        end = round(so_far / total * others)
        counts.append(min(at_least + end - before, at_most))
        before = end
    for group in sorted(range(len(sizes)), key=lambda group: -picked[group]):
        missing = others + sum(least) - sum(counts)
        counts[group] += min(missing, most[group] - counts[group])
    return counts
