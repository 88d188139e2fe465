"""HiPrune (Liu et al., ACL Findings 2026): anchors of a middle layer, their neighbours, and registers of a deep one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .method import Method
from .selecting import best, mean_attention, ranking


@dataclass(frozen=True)
class HiPrune(Method):
    """Keeps the patches that all tokens of the tower attend to, in a middle layer and in a deep one.

    Middle layers attend to objects, deep ones to the whole (arXiv 2508.00553). *Anchors* receive the most attention in
    the object layer. *Buffers* are their four neighbours in the grid. *Registers* receive the most attention among the
    others in the last layer but one, and fill the budget. Attention is averaged over heads and over all tokens, so the
    method needs no CLS.

    As in the authors' code (Danielement321/HiPrune), a share `alpha` of the budget is for anchors and buffers, in
    fives: at 64 tokens one anchor, and below 25 tokens none. Buffers are found by index: the left neighbour of a row's
    first patch is the last patch of the row above. Here anchors are never more than a fifth of the budget.

    Parameters
    ----------
    alpha : float, default 0.1
        Share of anchors and buffers.
    object_layer : int, optional
        The number of the tower's middle layer, from 1 on; default: 9 of 24.
    wrap : bool, default True
        False: buffers are neighbours in the grid alone, as in the paper's figures.
    """

    alpha: float = field(default=0.1, kw_only=True)
    object_layer: int | None = field(default=None, kw_only=True)
    wrap: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "hiprune"
    stages: ClassVar[tuple[str, ...]] = ("features",)
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,), all_queries=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("alpha")
        self.check_whole("object_layer", 1, optional=True)
        self.check_flag("wrap")

    @property
    def needs(self) -> Needs:
        """The records of the object layer and of the last layer but one, with the queries of all tokens."""
        middle = () if self.object_layer is None else (self.object_layer - 1,)
        return replace(super().needs, recorded_layers=(*middle, -2))

    def bind(self, config: Any) -> HiPrune:
        """Return the method with the object layer of this tower."""
        return replace(self, object_layer=self.tower_layer("object_layer", 9, config))

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Keep anchors, buffers and registers."""
        assert self.object_layer is not None
        middle, deep = (mean_attention(step.records[layer]) for layer in (self.object_layer - 1, -2))
        number = min(round(step.keep * self.alpha / 5), step.keep // 5)
        near = neighbourhood(ranking(middle)[:, :number], step.grid, self.wrap)
        first = torch.zeros_like(deep, dtype=torch.bool).scatter(1, near, True)
        return replace(best(deep.masked_fill(first, float("inf")), step.keep), scores=deep)


def neighbourhood(patches: torch.Tensor, grid: tuple[int, int], wrap: bool) -> torch.Tensor:
    """Return patches (I, n) and their neighbours to the left and right, above and below: int64 (I, 5n).

    A neighbour outside of the image is the patch itself or, with `wrap`, the nearest index.
    """
    rows, columns = grid
    near = torch.stack([patches, patches - 1, patches + 1, patches - columns, patches + columns])
    if not wrap:
        column = patches % columns
        inside = torch.stack([column >= 0, column > 0, column < columns - 1, near[3] >= 0, near[4] < rows * columns])
        near = near.where(inside, patches)
    return near.clamp(0, rows * columns - 1).movedim(0, 1).flatten(1)
