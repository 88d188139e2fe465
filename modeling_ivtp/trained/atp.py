"""ATP-LLaVA (Ye et al., CVPR 2025): each image and layer has learned thresholds for what its tokens must score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..methods.atp import received_logits
from ..methods.method import scaled_layers
from ..methods.selecting import best_for_decoder, received
from ..model.configuration_ivtp import is_number, is_whole
from ..model.pruner import Choice, DecoderStep, GridPositions, Needs
from ..model.schedule import Group, PruningPlan
from .method import TrainedMethod, summed_over_processes

LAYERS = (4, 14, 24)
"""The numbers of layers before each module, of 32 (Table 2: 144 tokens on average; for 88 they are 1, 13, 25)."""
HIDDEN = 256
"""Width of z (Eq. 6), which the paper does not give."""
START = -2.0
"""The bias of both thresholds at the start: most tokens stay."""
SCORES = ("both", "redundancy", "spatial")
ATTENTION = ("both", "self", "cross")


class ThresholdModule(nn.Module):
    """Predicts both thresholds of an image from the scores of its tokens (Eq. 6 to 8).

    Parameters
    ----------
    patches : int
        N, of a whole image.
    """

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * patches, HIDDEN)
        self.redundancy, self.spatial = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)
        for head in (self.redundancy, self.spatial):
            nn.init.constant_(head.bias, START)

    def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return θ_r and θ_s, (..., 1) each, from self and cross scores on the whole grid, (..., 2 N)."""
        z = nn.functional.gelu(self.mix(scores))
        return self.redundancy(z).sigmoid(), self.spatial(z).sigmoid()


@dataclass(frozen=True)
class Scores:
    """The scores of an image's tokens after a layer.

    Attributes
    ----------
    own, cross : Tensor (B, M, k)
        What a token receives of visual tokens (Eq. 3) and of the text (Eq. 4), normalised if the method does.
    redundancy, spatial : Tensor (B, M, k)
        Their mean, and Eq. 5; -1 where an option leaves one out, which no threshold lets pass.
    """

    own: torch.Tensor
    cross: torch.Tensor
    redundancy: torch.Tensor
    spatial: torch.Tensor

    @property
    def larger(self) -> torch.Tensor:
        """The score by which fixed ratios rank: (B, M, k)."""
        return torch.maximum(self.redundancy, self.spatial)


@dataclass(frozen=True)
class ATPLLaVA(TrainedMethod):
    """Keeps tokens whose redundancy or spatial score is above a threshold that modules predict for each image.

    Modules stand before layers 4, 14 and 24 of 32 (from 0 on). A token's redundancy score is the mean of what visual
    tokens give it as logits and the text as attention, in the layer before. Its spatial score says on how coarse a
    regular grid it lies. In training masks are sigmoids that sharpen, and a loss draws the average number of tokens to
    `target`; at inference images keep different numbers, one at least. The paper trains the language model, too.

    Parameters
    ----------
    target : float, default 144
        N_target (Eq. 13): visual tokens per decoder layer, on average.
    layers : tuple of int, optional
        The number of layers before each module; default: 4, 14 and 24 of 32.
    ratios : tuple of float, optional
        In place of thresholds: the share of the tokens left that each module keeps, by the larger score (Table 2).
    scores : {"both", "redundancy", "spatial"}, default "both"
        Which score may keep a token (Table 4).
    attention : {"both", "self", "cross"}, default "both"
        What the redundancy score is made of (Table 5).
    rope : {"2d", "1d"}, default "2d"
        Positions of visual tokens: their row and column, every other frequency of RoPE for each, or those of the base.
        The former needs a language model that was trained with it.
    text_after : {"grid", "patches"}, default "grid"
        Under 2-D positions, how many an image takes of the text: its side, or as many as it has patches.
    score_norm : {"minmax", "none"}, default "minmax"
        Whether self and cross scores are scaled to 0 to 1 in each image; the paper does not say, but θ is in (0, 1).
    strides : tuple of int, default (2, 3, 4, 6, 8)
        Of the regular grids. A member of grid s scores 1 − 3 / s² (Eq. 5, λ_sample = 3), of several the highest.
    sample_scale : float, default 3.0
        λ_sample.
    temperature : tuple of float, default (10.0, 100.0)
        T (Eq. 9, 10) at the start and at the end of the training, geometric in between; the paper gives none.
    depth_weight, target_weight : float
        λ_ATP and λ_target (Eq. 14); default: 0.01, the lowest of the paper's range, and 0.2.
    """

    target: float = field(default=144.0, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    ratios: tuple[float, ...] | None = field(default=None, kw_only=True)
    scores: str = field(default="both", kw_only=True)
    attention: str = field(default="both", kw_only=True)
    rope: str = field(default="2d", kw_only=True)
    text_after: str = field(default="grid", kw_only=True)
    score_norm: str = field(default="minmax", kw_only=True)
    strides: tuple[int, ...] = field(default=(2, 3, 4, 6, 8), kw_only=True)
    sample_scale: float = field(default=3.0, kw_only=True)
    temperature: tuple[float, float] = field(default=(10.0, 100.0), kw_only=True)
    depth_weight: float = field(default=0.01, kw_only=True)
    target_weight: float = field(default=0.2, kw_only=True)

    name: ClassVar[str] = "atp-llava"
    paper: ClassVar[str] = "ATP-LLaVA (Ye et al., CVPR 2025)"
    budgets: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ("language_model", "multi_modal_projector", "lm_head")

    def __post_init__(self) -> None:
        super().__post_init__()
        choices: dict[str, tuple[str, ...]] = {
            "scores": SCORES,
            "attention": ATTENTION,
            "rope": ("2d", "1d"),
            "text_after": ("grid", "patches"),
            "score_norm": ("minmax", "none"),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise ValueError(f"{self.name}: {option}={getattr(self, option)!r}; allowed: {', '.join(allowed)}.")
        for option in ("sample_scale", "depth_weight", "target_weight"):
            self.check_weight(option)
        if not is_number(self.target) or self.target < 1:
            raise ValueError(f"{self.name}: target={self.target!r}; allowed: a number of at least 1.")
        if self.rope == "2d" and self.positions == "compact":
            raise ValueError(f'{self.name}: positions="compact" with rope="2d"; allowed: original, or rope="1d".')
        self._check_each(
            "ratios", lambda value: is_number(value) and 0 < value <= 1, "shares above 0, up to 1, or None"
        )
        self._check_each("strides", lambda value: is_whole(value) and value > 1, "whole numbers above 1")
        self._check_each("temperature", lambda value: is_number(value) and value > 0, "two numbers above 0", 2)

    def _check_each(self, option: str, fits: Callable[[Any], bool], allowed: str, count: int | None = None) -> None:
        values = getattr(self, option)
        if values is None and option == "ratios":
            return
        there = isinstance(values, tuple) and 0 < len(values) == (count or len(values))
        if not there or not all(fits(value) for value in values):
            raise ValueError(f"{self.name}: {option}={values!r}; allowed: {allowed}.")

    def _check_budget(self) -> None:
        for option in ("keep", "average"):
            if getattr(self, option) is not None:
                raise ValueError(
                    f"{self.name}: {option}={getattr(self, option)!r}; allowed: None, for thresholds decide how many "
                    "stay. Train for another target=."
                )
        object.__setattr__(self, "_found", {})

    @property
    def needs(self) -> Needs:
        """Ask for what any trained method needs, with 2-D positions; fixed ratios drop in training, too."""
        needs, grid = super().needs, None
        if self.rope == "2d":
            assert self.base is not None
            side = round(self.base["patches"] ** 0.5)
            grid = GridPositions(side, side, side if self.text_after == "grid" else side * side)
        return replace(needs, weights=needs.weights and self.ratios is None, grid_positions=grid)

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Make one threshold module for each drop; fixed ratios need none."""
        layers = self._layers(base["num_hidden_layers"])
        self.check_depth("layers", layers, base["num_hidden_layers"])
        self._check_ratios(len(layers))
        self._check_target(layers[0], base["num_hidden_layers"], base["patches"])
        return nn.ModuleList() if self.ratios else nn.ModuleList(ThresholdModule(base["patches"]) for _ in layers)

    def _layers(self, depth: int) -> tuple[int, ...]:
        return self.layers or scaled_layers(LAYERS, 32, depth)

    def _check_target(self, before: int, depth: int, patches: int) -> None:
        """Refuse an average that no thresholds reach: all tokens are in the layers before the first module."""
        least = (before * patches + depth - before) / depth
        if self.ratios is None and not least <= self.target <= patches:
            raise ValueError(
                f"{self.name}: target={self.target} tokens on average cannot be reached; allowed: {least:.1f} to "
                f"{patches}, as the first {before} of {depth} layers get all tokens and one stays at least. Earlier "
                "layers= reach lower."
            )

    def _check_ratios(self, modules: int) -> None:
        if self.ratios is not None and len(self.ratios) != modules:
            raise ValueError(f"{self.name}: ratios={self.ratios}; allowed: {modules} of them, one for each module.")

    def final_tokens(self, config: Any, patches: int) -> int:
        """Return how many tokens an image keeps in the end, at most."""
        return self.schedule(config, patches).final_tokens

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan drops of unknown size, or those of `ratios`; None if these keep all."""
        plan = self.schedule(config, patches)
        return plan if plan.drops else None

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one drop before each of the layers."""
        tops = self.tops(config, LAYERS)
        self._check_ratios(len(tops))
        if self.ratios is None:
            groups = tuple(Group(top, top, patches, adaptive=True) for top in tops)
            return PruningPlan(patches, decoder=groups, exact=False)
        dropping: list[Group] = []
        left = patches
        for top, ratio in zip(tops, self.ratios, strict=True):
            left = max(1, round(left * ratio))
            # Two-dimensional positions hold, too, if all tokens stay.
            dropping.append(Group(top, top, left, adaptive=self.rope == "2d"))
        return PruningPlan(patches, decoder=tuple(dropping))

    def module_flops(self, visual: int, text: int) -> int:
        """Count one threshold module and the products of both scores; fixed ratios have no module."""
        assert self.base is not None
        patches, width = self.base["patches"], self.base["hidden_size"]
        # The visual tokens' mean query with their keys, and the text's queries with all keys and, by head, weights.
        heads = self.base["num_attention_heads"]
        scores = 4 * (visual + text) * width + 2 * text * (visual + text) * (width + heads)
        return scores if self.ratios is not None else scores + 2 * (2 * patches * HIDDEN + 2 * HIDDEN)

    def score(self, step: DecoderStep) -> Scores:
        """Compute all scores of the visual tokens after a layer, without a gradient.

        Tokens that are gone, or weighted, give and receive as much less; they are left out of the scaling.
        """
        with torch.no_grad():
            record, sequence = step.decoder_records[-1], step.sequence
            there = self._there(step)
            own = received_logits(record, sequence, step.weights)
            # Before answers there may be words anywhere.
            first = None if self.batch.prompt is None else 0
            cross = received(record, sequence, self.readers_of(sequence), first)
            if self.score_norm == "minmax":
                own, cross = scaled(own, there), scaled(cross, there)
            if self.attention != "both":
                own = torch.zeros_like(own) if self.attention == "cross" else own
                cross = torch.zeros_like(cross) if self.attention == "self" else cross
            redundancy = own + cross if self.attention != "both" else (own + cross) / 2
            spatial = self.spatial_scores().to(own.device, own.dtype)[sequence.patches.to(own.device).clamp_min(0)]
            nothing = torch.full_like(own, -1)
            return Scores(
                own,
                cross,
                nothing if self.scores == "spatial" else redundancy,
                nothing if self.scores == "redundancy" else spatial,
            )

    def _there(self, step: DecoderStep) -> torch.Tensor:
        """Mark the visual tokens that are left: bool (B, M, k)."""
        present = step.sequence.token_present
        if step.weights is None:
            return present
        return present.to(step.weights.device) & (step.weights.detach() > 0.5)

    def spatial_scores(self) -> torch.Tensor:
        """Return Eq. 5 for every patch of the grid: float32 (N,); 0 for members of no grid."""
        assert self.base is not None
        side = round(self.base["patches"] ** 0.5)
        place = torch.arange(side)
        scores = torch.zeros(side, side)
        for stride in self.strides:
            member = place % stride == 0
            score = 1 - self.sample_scale / stride**2
            scores = torch.where(member[:, None] & member, scores.clamp_min(score), scores)
        return scores.flatten()

    def thresholds(self, step: DecoderStep, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict θ_r and θ_s of each image (Eq. 6 to 8): (B, M, 1) each."""
        assert self.base is not None
        learned, patches = self.modules_or_raise(), step.sequence.patches.to(scores.own.device)
        assert isinstance(learned, nn.ModuleList)
        module = learned[self._layers(self.base["num_hidden_layers"]).index(step.group.last + 1)]
        there = self._there(step).to(scores.own.device)
        size = self.base["patches"]
        # What is gone goes to a place of its own, after the grid.
        index = patches.masked_fill(~there, size)
        grids = [
            scores.own.new_zeros(*index.shape[:2], size + 1).scatter(2, index, part * there)[..., :-1]
            for part in (scores.own, scores.cross)
        ]
        joined = torch.cat(grids, -1)
        return module(joined.to(next(module.to(joined.device).parameters()).dtype))

    def margins(self, step: DecoderStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how far each token's scores are above the thresholds, and its larger score: (B, M, k) each."""
        scores = self.score(step)
        redundancy, spatial = self.thresholds(step, scores)
        margin = torch.maximum(scores.redundancy - redundancy, scores.spatial - spatial)
        return margin, scores.larger

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Keep every token with a score above its threshold; if there is none, the nearest one."""
        if self.ratios is not None:
            scores = self.score(step)
            return best_for_decoder(step, scores.larger)
        margin, larger = self.margins(step)
        kept = self.passes(margin, step.sequence.token_present.to(margin.device))
        size = margin.shape[-1]
        most = max(1, int(kept.sum(-1).max()))
        index = torch.arange(size, device=kept.device).expand_as(kept).masked_fill(~kept, size)
        return Choice(index.sort(-1).values[..., :most], scores=larger, ragged=True)

    @staticmethod
    def passes(margin: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Mark the tokens that stay, at least one of every image that is there: bool (B, M, k)."""
        margin = margin.masked_fill(~there, float("-inf"))
        nearest = torch.zeros_like(there).scatter(2, margin.argmax(-1, keepdim=True), True) & there
        return (margin > 0) | (nearest & ~(margin > 0).any(-1, keepdim=True))

    def mask(self, step: DecoderStep) -> torch.Tensor:
        """Return the larger of both soft masks (Eq. 9 to 11)."""
        margin, _ = self.margins(step)
        start, end = self.temperature
        # The larger of two sigmoids is the sigmoid of the larger.
        return (margin * start * (end / start) ** self.batch.progress).sigmoid()

    def loss(self) -> torch.Tensor:
        """Return λ_ATP times Eq. 12 and λ_target times Eq. 13, over the images of the batch.

        The distance of Eq. 13 is that of the average over the batches of all processes, as if they were one.
        """
        if not self.batch.weighed:
            return torch.zeros(())  # fixed ratios: nothing is weighed
        assert self.base is not None
        depth, size = self.base["num_hidden_layers"], self.batch.weighed[0].weights.shape[-1]
        counts = [weighed.counts.mean() for weighed in self.batch.weighed]
        tops = [weighed.group.last + 1 for weighed in self.batch.weighed]
        deep = torch.stack([count / size * top for count, top in zip(counts, tops, strict=True)]).sum()
        spans = [after - top for top, after in zip(tops, [*tops[1:], depth], strict=True)]
        total = size * tops[0] + torch.stack([count * span for count, span in zip(counts, spans, strict=True)]).sum()
        images = self.batch.weighed[0].counts.new_tensor(len(self.batch.weighed[0].counts))
        average = summed_over_processes(total / depth * images) / summed_over_processes(images)
        return self.depth_weight * deep + self.target_weight * (average - self.target).abs()


def scaled(values: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Scale the values of each image (B, M, k) to 0 to 1, over the tokens that are there (bool (B, M, k))."""
    there = there.to(values.device)
    low = values.masked_fill(~there, float("inf")).amin(-1, keepdim=True)
    high = values.masked_fill(~there, float("-inf")).amax(-1, keepdim=True)
    width = (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    return ((values - low) / width).masked_fill(~there, 0)
