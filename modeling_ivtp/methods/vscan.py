"""VScan (Zhang et al., TMLR 2026): a global and a local scan of the image with merging, and a drop in mid-decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from ..model.pruner import Choice, DecoderStep, FeatureStep, Needs
from ..model.schedule import PruningPlan
from .fastv import received_from_last
from .method import Method, groups_after, scaled_layers
from .selecting import best, best_for_decoder, cls_attention, one_hot


@dataclass(frozen=True)
class VScan(Method):
    """Keeps what CLS attends to in a shallow layer, window by window, and in a deep one, over the whole image.

    Half of the tokens before the decoder are *local* (arXiv 2505.22654, Sec. 4.1, Eq. 3): of each of 4 × 4 windows as
    many, by the attention of CLS in a shallow layer. The others are *global* (Eq. 2), by its attention in the tower's
    last layer but one. Every other patch is merged into the kept one with the most similar projected feature: a token
    is the mean of its patches (Eq. 4). In the middle of the decoder the visual tokens stay that the instruction's last
    token attends to most (Sec. 4.2, Eq. 5), by the layer after the drop, as in PyramidDrop.

    The paper and the authors' scripts (Tencent/SelfEvolvingAgent) give the rules, layers and counts. That local tokens
    are chosen first, that there are 4 × 4 windows, and that features are projected before they are merged is read from
    public code that builds on theirs. What windows cannot share evenly is global here, so that the number is always
    reached.

    Parameters
    ----------
    keep : int, optional
        Tokens after the drop in the decoder.
    tower_tokens : int, optional
        Tokens before the decoder; default: three times `keep`, as in the authors' scripts (96 and 32).
    layer : int, optional
        The number of decoder layers before the drop; default: 16 of 32.
    local_layer : int, optional
        The number of the tower's shallow layer, from 1 on; default: 6 of 24.
    local_ratio : float, default 0.5
        Share of the local tokens, rounded down.
    windows : int, default 4
        Windows in each direction.
    """

    tower_tokens: int | None = None
    layer: int | None = None
    local_layer: int | None = field(default=None, kw_only=True)
    local_ratio: float = field(default=0.5, kw_only=True)
    windows: int = field(default=4, kw_only=True)

    name: ClassVar[str] = "vscan"
    stages: ClassVar[tuple[str, ...]] = ("features", "decoder")
    requires: ClassVar[Needs] = Needs(recorded_layers=(-2,), all_projected=True, next_record=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("tower_tokens", self.keep or 1, optional=True)
        self.check_whole("layer", 1, optional=True)
        self.check_whole("local_layer", 1, optional=True)
        self.check_share("local_ratio")
        self.check_whole("windows", 1)

    @property
    def needs(self) -> Needs:
        """The records of the shallow layer and of the last layer but one."""
        shallow = () if self.local_layer is None else (self.local_layer - 1,)
        return replace(super().needs, recorded_layers=(*shallow, -2))

    def bind(self, config: Any) -> VScan:
        """Return the method with the shallow layer of this tower."""
        return replace(self, local_layer=self.tower_layer("local_layer", 6, config))

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan a choice before the decoder and one drop in it."""
        self.check_whole("tower_tokens", self.keep, optional=True)
        depth = config.text_config.num_hidden_layers
        layer = self.layer or scaled_layers((16,), 32, depth)[0]
        if layer > depth - 1:
            raise ValueError(
                f"{self.name}: layer={layer}; allowed: 1 to {depth - 1}, because the next layer of this decoder ranks."
            )
        encoded = min(patches, self.tower_tokens or 3 * self.keep)
        return PruningPlan(patches, features=encoded, decoder=groups_after((layer - 1,), (self.keep,)))

    def in_features(self, step: FeatureStep) -> Choice:
        """Scan locally and globally, and merge what is not kept."""
        assert self.local_layer is not None
        shallow, deep = (cls_attention(step.records[layer]) for layer in (self.local_layer - 1, -2))
        local = scanned(shallow, step.grid, self.windows, int(step.keep * self.local_ratio))
        kept = best(deep.masked_fill(local, float("inf")), step.keep).kept
        unit = normalize(step.projected.double(), dim=-1).to(kept.device)
        return Choice(kept, mixture=merged_into(unit @ unit.transpose(1, 2), kept), scores=deep)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Rank by the last token's attention."""
        assert step.next_record is not None
        return best_for_decoder(step, received_from_last(step.next_record, step.sequence))


def scanned(attention: torch.Tensor, grid: tuple[int, int], windows: int, keep: int) -> torch.Tensor:
    """Mark the patches with the most attention in each window, as many in each and at most `keep`: bool (I, k).

    Parameters
    ----------
    attention : float32 Tensor (I, k)
    grid : (int, int)
        Rows and columns of patches.
    windows : int
        Windows in each direction, at most one for each row and column. Window i of n over R rows covers floor(i R / n)
        to floor((i + 1) R / n).
    keep : int
    """
    rows, columns = grid
    down, right = min(windows, rows), min(windows, columns)
    patch = torch.arange(rows * columns, device=attention.device)
    # The last window that starts at a row or before it.
    tall = ((patch // columns + 1) * down - 1) // rows
    wide = ((patch % columns + 1) * right - 1) // columns
    number = tall * right + wide
    chosen = torch.zeros_like(attention, dtype=torch.bool)
    for window in range(down * right):
        inside = (number == window).nonzero()[:, 0]
        kept = best(attention[:, inside], keep // (down * right)).kept
        chosen.scatter_(1, inside[kept], True)
    return chosen


def merged_into(similarity: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the mixture that merges each other token into the most similar kept one: float32 (I, k', k).

    A token becomes the mean of itself and of those that are merged into it. Of equally similar ones the earlier takes.

    Parameters
    ----------
    similarity : Tensor (I, k, k)
    kept : int64 Tensor (I, k')
    """
    number, tokens = kept.shape[1], similarity.shape[-1]
    nearest = similarity.gather(2, kept[:, None].expand(-1, tokens, -1)).argmax(-1)
    nearest.scatter_(1, kept, torch.arange(number, device=kept.device).expand_as(kept))
    members = one_hot(nearest, number).transpose(1, 2)
    return members / members.sum(-1, keepdim=True)
