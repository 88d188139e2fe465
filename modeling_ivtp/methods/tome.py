"""ToMe and ToMe+ (Bolya et al., ICLR 2023; IVTP Tables 1 and 7): similar tokens are merged, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, DecoderStep, Needs, TowerStep
from ..model.schedule import PruningPlan
from .method import Method, linear_schedule, single_layers
from .selecting import on_visual, patch_keys, ranking
from .two_stage import TwoStage


@dataclass(frozen=True)
class ToMe(Method):
    """Merges, between attention and MLP of every layer of the tower, the patches whose keys are most similar.

    It uses bipartite soft matching over the head-averaged keys: tokens alternate between two sets, and the most similar
    ones of the first set are merged into the second. A token is the mean of its patches, and attention counts it as
    many times as it has patches (proportional attention). CLS takes part in the alternation but is never merged.

    As in the authors' code, a layer's output is what is unmerged of the first set, then the second set, and the next
    layer alternates over that order. The decoder gets the tokens in spatial order.

    Parameters
    ----------
    spatial_order : bool, default False
        True: every layer alternates over the tokens in spatial order.
    """

    spatial_order: bool = field(default=False, kw_only=True)

    name: ClassVar[str] = "tome"
    stages: ClassVar[tuple[str, ...]] = ("tower",)
    requires: ClassVar[Needs] = Needs(proportional_attention=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("spatial_order")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan as many merges at every layer; near the end at most half of the tokens can be merged."""
        counts = halving_schedule(patches, self.keep, config.feature_depth)
        return PruningPlan(patches, tower=single_layers(counts, middle=True))

    def in_tower(self, step: TowerStep) -> Choice:
        """Match the patches' keys."""
        keys, order = patch_keys(step.records[-1]).float().mean(1), None if self.spatial_order else step.order
        return merge(keys, step.group.keep, step.sizes, order, first_goes=False)


@dataclass(frozen=True)
class ToMePlus(TwoStage, ToMe):
    """ToMe continued in the decoder's first layers, on the keys of the visual tokens, after whole layers.

    The decoder's attention is not proportional, so that its fast kernels and its cache serve merged tokens, too.
    """

    name: ClassVar[str] = "tome+"
    stages: ClassVar[tuple[str, ...]] = ("tower", "decoder")

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan as many merges at every layer of a stage."""
        handed_over = self.handed_over(patches)
        return PruningPlan(
            patches,
            tower=single_layers(halving_schedule(patches, handed_over, config.feature_depth), middle=True),
            decoder=single_layers(halving_schedule(handed_over, self.keep, self.depth(config))),
        )

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Match the visual tokens' keys; sizes and order start anew, since the tower's end with the features."""
        record = step.decoder_records[-1]
        keys = record.key[:, :, record.past :].float().mean(1)  # (B, n, dh)
        width = keys.shape[-1]
        images = step.sequence.columns.shape[1]
        keys = on_visual(keys.transpose(1, 2)[:, None].expand(-1, images, -1, -1), step.sequence).transpose(2, 3)
        sizes = None if step.sizes is None else step.sizes.flatten(0, 1)
        order = None if step.order is None or self.spatial_order else step.order.flatten(0, 1)
        merged = merge(keys.reshape(-1, keys.shape[2], width), step.group.keep, sizes, order, first_goes=True)
        shape = step.sequence.columns.shape[:2]
        assert merged.mixture is not None
        assert merged.sizes is not None
        assert merged.order is not None
        return Choice(
            merged.kept.unflatten(0, shape),
            mixture=merged.mixture.unflatten(0, shape),
            sizes=merged.sizes.unflatten(0, shape),
            order=merged.order.unflatten(0, shape),
        )


def halving_schedule(start: int, end: int, steps: int) -> tuple[int, ...]:
    """Return a `linear_schedule` in which no step takes more than half of the tokens.

    Raises
    ------
    ValueError
        If so many halvings do not reach `end`.

    Examples
    --------
    >>> halving_schedule(16, 2, 4)
    (12, 8, 4, 2)
    """
    counts = list(linear_schedule(start, end, steps))
    for step in range(steps - 2, -1, -1):
        counts[step] = min(counts[step], 2 * counts[step + 1])
    if start > 2 * counts[0]:
        raise ValueError(
            f"ToMe halves at most: {start} tokens cannot become {end} in {steps} layer(s); allowed: at least "
            f"{-(-start // 2**steps)}."
        )
    return tuple(counts)


def merge(
    metric: torch.Tensor, keep: int, sizes: torch.Tensor | None, order: torch.Tensor | None, *, first_goes: bool
) -> Choice:
    """Merge tokens by bipartite soft matching (Sec. 3.2).

    Tokens alternate between two sets. Those of the first set that are most similar to a token of the second are merged
    into it.

    Parameters
    ----------
    metric : float Tensor (I, k, d)
        Vectors whose cosine is the similarity.
    keep : int
    sizes : float32 Tensor (I, k) or None
        How many patches each token stands for; None: one.
    order : int64 Tensor (I, k) or None
        Tokens in the order over which they alternate; None: as they come.
    first_goes : bool
        Whether the first token belongs to the set that is merged away. It does not if CLS stands before it.

    Returns
    -------
    Choice
        A merged token takes the place of that of the second set. `order` lists what is unmerged of the first set, then
        the second set. The first part is in its old order after CLS, and without CLS from the most similar on, as in
        the authors' code.
    """
    images, tokens, _ = metric.shape
    index = torch.arange(tokens, device=metric.device).expand(images, -1)
    order = index if order is None else order.to(metric.device)
    go, stay = (slice(0, None, 2), slice(1, None, 2)) if first_goes else (slice(1, None, 2), slice(0, None, 2))
    first, second = order[:, go], order[:, stay]
    unit = normalize(metric.gather(1, order[..., None].expand_as(metric)), dim=-1)
    similarity, partner = (unit[:, go] @ unit[:, stay].transpose(1, 2)).max(-1)
    rank = ranking(similarity)
    gone, unmerged = rank[:, : tokens - keep], rank[:, tokens - keep :]
    target = index.scatter(1, first.gather(1, gone), second.gather(1, partner.gather(1, gone)))
    stays = target == index
    kept = index[stays].view(images, keep)
    number = stays.cumsum(1) - 1  # of each kept token among the kept
    row = number.gather(1, target)
    sizes = torch.ones(images, tokens, device=metric.device) if sizes is None else sizes
    mixture = torch.zeros(images, keep, tokens, device=metric.device).scatter_(1, row[:, None], sizes[:, None])
    total = mixture.sum(-1)
    unmerged = unmerged if first_goes else unmerged.sort(-1).values
    output = number.gather(1, torch.cat([first.gather(1, unmerged), second], 1))
    return Choice(kept, mixture=mixture / total[..., None], sizes=total, order=output)
