"""SparseVLM (Zhang et al., ICML 2025): text raters, three drops, and recycling of dropped tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, DecoderStep
from ..model.schedule import PruningPlan, geometric_schedule
from ..model.visual_sequence import VisualSequence
from .method import Method, groups_after
from .selecting import after_images, first_reader, join_choices, on_visual, one_hot, ranking, received

PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""The tokens that stay by rank after each drop, in the authors' code for LLaVA-1.5, by the average in their tables."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """Drops after three decoder layers the visual tokens that the text about the image attends to least.

    *Raters* are the text tokens after an image whose similarity with its visual tokens, before the decoder, is at least
    the mean. The upper part of the dropped tokens is clustered by density peaks. Each cluster's mean stays, in the
    place of its centre. The authors' code adds noise to the densities, so that none are equal; here the earlier of
    equal ones counts as denser.

    As in the authors' code, the counts after each drop are the same for every image, and of n dropped tokens
    int(0.3 n) + 1 are recycled.

    Parameters
    ----------
    keep : int, optional
        Tokens in the end, recycled ones included; each drop has the same ratio.
    layers : tuple of int, optional
        The number of layers before each drop; default: 3, 7 and 16 of 32.
    adaptive : bool, default False
        True: the paper's rule. Of L tokens N = λ (L − rank) are dropped, where rank is that of the raters' attention
        map. The paper tunes λ. Here λ leads to the step's count when the rank is the number of raters, so raters who
        agree leave fewer.
    recycle : bool, default True
        False: dropped tokens are not recycled.
    published : {192, 128, 64}, optional
        In place of `keep`: the counts of the authors' code for LLaVA-1.5, see `PUBLISHED`. The number is their average
        over layers, in which a layer that drops counts with what it passes on.
    """

    layers: tuple[int, ...] | None = None
    adaptive: bool = False
    recycle: bool = True
    published: int | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "sparsevlm"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)
    budgets: ClassVar[tuple[str, ...]] = ("keep", "average", "published")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("adaptive")
        self.check_flag("recycle")
        if self.published is not None and self.published not in PUBLISHED:
            allowed = ", ".join(map(str, PUBLISHED))
            raise ValueError(f"{self.name}: published={self.published!r}; allowed: {allowed} or None.")

    def final_tokens(self, config: Any, patches: int) -> int:
        """Return `keep`, the number for an `average`, or the one that the published counts lead to."""
        return super().final_tokens(config, patches) if self.published is None else self.published_counts(patches)[-1]

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one ratio for every drop, or the published counts."""
        tops = self.tops(config, (3, 7, 16))
        counts = geometric_schedule(patches, self.keep, len(tops))
        if self.published is not None:
            counts = self.published_counts(patches)
            if len(tops) != len(counts):
                raise ValueError(f"{self.name}: layers={self.layers}; allowed: {len(counts)} layers with published.")
        return PruningPlan(patches, decoder=groups_after(tops, counts), exact=not self.adaptive)

    def published_counts(self, patches: int) -> tuple[int, ...]:
        """Return the tokens after each drop of the authors' code, recycled ones included."""
        counts, tokens = [], patches
        for count in PUBLISHED[self.published or 64]:
            stays = min(count, tokens - 1)
            tokens = stays + (clusters_of(recycled_of(tokens - stays)) if self.recycle else 0)
            counts.append(tokens)
        return tuple(counts)

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> torch.Tensor:
        """Mark the raters by logical column: bool (B, M, S)."""
        raters = text_raters(sequence, embeds)
        full = torch.zeros(*raters.shape[:2], sequence.length + 1, dtype=torch.bool, device=raters.device)
        slots = sequence.slots[:, None].expand(-1, raters.shape[1], -1)
        return full.scatter(2, slots, raters)[..., :-1]

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rate, count, and recycle, image by image."""
        sequence, record = step.sequence, step.decoder_records[-1]
        raters = sequence.at_slots(step.state)
        if sequence.valid is not None:
            raters = raters & sequence.valid[:, None]
        scores = received(record, sequence, raters)
        hidden = sequence.visual(step.hidden).float()
        first = first_reader(sequence)
        attention = None
        if self.adaptive:
            rows = record.attention_map(first)
            attention = on_visual(rows[:, None].expand(-1, sequence.columns.shape[1], -1, -1), sequence)
        present, tokens = sequence.token_present, sequence.columns.shape[2]
        whole = not sequence.ragged and bool(sequence.image_present.all())
        chosen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for row in range(scores.shape[0]):
            for image in range(scores.shape[1]):
                count = tokens if whole else int(present[row, image].sum())
                if count == 0:
                    chosen.append((torch.zeros(0, dtype=torch.int64, device=scores.device), None))
                    continue
                keep = min(step.group.keep, count)
                if attention is not None:
                    rated = attention[row, image][raters[row, image, first:].to(attention.device)][:, :count]
                    keep = adapted(keep, count, rank_of(rated), len(rated))
                kept, mixture = sparsify(scores[row, image, :count], hidden[row, image, :count], keep, self.recycle)
                if mixture is not None:
                    mixture = torch.nn.functional.pad(mixture, (0, tokens - count))
                chosen.append((kept, mixture))
        return join_choices(chosen, tokens, scores.shape[:2])


def text_raters(sequence: VisualSequence, embeds: torch.Tensor) -> torch.Tensor:
    """Mark text tokens after each image whose similarity to its visual tokens is at least the mean: bool (B, M, n).

    Similarity is the softmax over the text of the products with each visual token, averaged over the visual tokens.
    """
    after = after_images(sequence)
    visual = sequence.visual(embeds).float()
    logits = torch.einsum("bmkd,bnd->bmkn", visual, embeds.float())
    share = logits.masked_fill(~after[:, :, None], float("-inf")).softmax(-1)
    present = sequence.token_present[..., None].to(share.device)
    similarity = (share.nan_to_num(0) * present).sum(2) / present.sum(2).clamp_min(1)
    mean = similarity.sum(-1, keepdim=True) / after.sum(-1, keepdim=True)
    return after & (similarity >= mean)


def rank_of(attention: torch.Tensor) -> int:
    """Return the rank of the raters' attention map (T, L), computed in float64."""
    return int(torch.linalg.matrix_rank(attention.double()))


def adapted(keep: int, tokens: int, rank: int, raters: int) -> int:
    """Return L − λ (L − rank), with the λ that leaves `keep` tokens at full rank."""
    if rank >= raters or tokens <= raters:
        return keep
    scale = (tokens - keep) / (tokens - raters)
    return max(1, tokens - round(scale * (tokens - rank)))


def sparsify(
    scores: torch.Tensor, hidden: torch.Tensor, keep: int, recycle: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose for one image: indices (k',), ascending, and their mixture (k', k) or None.

    Parameters
    ----------
    scores : float32 Tensor (k,)
    hidden : float32 Tensor (k, d)
    keep : int
        Tokens that stay, recycled ones included.
    recycle : bool
    """
    tokens = len(scores)
    order = ranking(scores)
    clusters = recycled_tokens(tokens, keep) if recycle else 0
    if not clusters:
        return order[:keep].sort().values, None
    stays = order[: keep - clusters]
    pool = order[keep - clusters :][: recycled_of(tokens - keep + clusters)].sort().values
    centres, member = density_peaks(hidden[pool], clusters)
    kept = torch.cat([stays, pool[centres]])
    averages = torch.zeros(clusters, tokens, device=scores.device)
    averages[member, pool] = 1.0
    mixture = torch.cat([one_hot(stays, tokens), averages / averages.sum(1, keepdim=True)])
    ascending = kept.argsort()
    return kept[ascending], mixture[ascending]


def recycled_tokens(tokens: int, keep: int) -> int:
    """Return how many of `keep` tokens are clusters of recycled ones: the fewest that come out; 0 if none fits."""
    for clusters in range(1, keep):
        recycled = recycled_of(tokens - keep + clusters)
        if recycled < clusters:
            return 0
        if clusters_of(recycled) <= clusters:
            return clusters
    return 0


def recycled_of(dropped: int) -> int:
    """Return how many of the dropped tokens are recycled."""
    return int(0.3 * dropped) + 1


def clusters_of(recycled: int) -> int:
    """Return how many clusters the recycled tokens form."""
    return int(recycled / 10) + 1


def density_peaks(points: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster by density peaks with nearest neighbours: centres (clusters,), and the cluster of each point (n,).

    A point is dense if its nearest neighbours, itself among them, are near. Centres are dense and far from all denser
    points. Of equal densities the earlier point counts as denser.
    """
    number, width = points.shape
    distance = torch.cdist(points, points) / width**0.5
    nearest = distance.topk(clusters, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    order = torch.arange(number, device=points.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (order < order[:, None]))
    apart = torch.where(denser, distance, distance.max()).amin(-1)
    centres = ranking(apart * density)[:clusters]
    member = distance[centres].argmin(0)
    member[centres] = torch.arange(clusters, device=points.device)
    return centres, member
