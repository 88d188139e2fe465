"""LVPruning (Sun et al., 2025): cross-attention modules in the decoder decide which visual tokens stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..methods.method import groups_after, scaled_layers
from ..methods.selecting import best_for_decoder
from ..model.configuration_ivtp import is_number
from ..model.pruner import Choice, DecoderStep
from ..model.schedule import Group, PruningPlan
from .method import TrainedMethod

STEP = 0.2
"""Share of all tokens by which each module keeps less than the one before (Sec. 4.1)."""
LAYERS = (1, 8, 16)
"""The numbers of layers before each module, of 32 (Sec. 4.1)."""


class CrossAttentionBlock(nn.Module):
    """Visual tokens read the text (Eq. 1 to 3), and a feed-forward network follows (Sec. 4.1).

    The paper leaves open where the norms of the network stand to its residual, and whether there is an output
    projection. Here `y = O + FFN(O)`, and there is one: the FLOPs that Appendix B prints need it.

    Parameters
    ----------
    width : int
        C, the decoder's.
    heads : int
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.network = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, visual: torch.Tensor, text: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return the visual tokens (B, N, C) after reading the text (B, T, C), of which `present` (B, T) are tokens."""
        query = self.query(visual)
        # A row without text reads zeros, which add nothing.
        seen = present | ~present.any(-1, keepdim=True)
        read = nn.functional.scaled_dot_product_attention(
            self._by_head(query),
            self._by_head(self.key(text)),
            self._by_head(self.value(text)),
            attn_mask=seen[:, None, None],
        )
        output = self.output(read.transpose(1, 2).flatten(2)) + query
        return output + self.network(output)

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DecisionModule(nn.Module):
    """Scores for keeping and removing each visual token, from what it reads in the text (Sec. 3.1).

    Parameters
    ----------
    width : int
    heads, blocks : int
    """

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, heads) for _ in range(blocks))
        self.scores = nn.Linear(width, 2)

    def forward(self, visual: torch.Tensor, text: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return γ (Eq. 4), in float32 at least: (B, N, 2), index 0 for keeping.

        Parameters
        ----------
        visual : Tensor (B, N, C)
        text : Tensor (B, T, C)
        present : bool Tensor (B, T)
            Which text is there.
        """
        for block in self.blocks:
            visual = block(visual, text, present)
        scores = self.scores(visual)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


@dataclass(frozen=True)
class LVPruning(TrainedMethod):
    """Keeps what decision modules after layers 1, 8 and 16 of 32 score highest: ρ, ρ − 0.2 and ρ − 0.4 of all tokens.

    One training serves any ratio: at inference the best by γ0 − γ1 stay, as many as asked for (Sec. 3.3). In training
    decisions are drawn by a straight-through Gumbel-softmax, and a loss draws their number to the ratios (Sec. 3.2).
    The base is frozen.

    Parameters
    ----------
    keep : int, optional
        Tokens in the end, (ρ − 0.4) N.
    ratio : float, optional
        In place of `keep`: ρ. The paper trains with 0.5 and answers with 0.6, 0.5 and 0.45.
    ratios : tuple of float, optional
        In place of both: the share of all tokens that each module keeps.
    layers : tuple of int, optional
        The number of layers before each module; default: 1, 8 and 16 of 32.
    heads, blocks : int
        Of each module; default: 8 and 2 (Sec. 4.1).
    temperature : float, default 1.0
        Of the Gumbel-softmax; the paper gives none.
    straight_through : bool, default True
        Decide by 0 or 1 in training. False leaves them soft.
    text : {"prompt", "all"}, default "prompt"
        What tokens read in training: the text as it is at inference, or answers too.
    ratio_loss : {"square", "huber"}, default "square"
        Eq. 11 is a square; the sentence after it names a Huber loss with β = 0.5.
    ratio_weight : float, default 2.0
        λ_ratio (Eq. 12), which the paper does not give, as λ_causal, 1; these are DynamicViT's.
    """

    ratio: float | None = field(default=None, kw_only=True)
    ratios: tuple[float, ...] | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    heads: int = field(default=8, kw_only=True)
    blocks: int = field(default=2, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    straight_through: bool = field(default=True, kw_only=True)
    text: str = field(default="prompt", kw_only=True)
    ratio_loss: str = field(default="square", kw_only=True)
    ratio_weight: float = field(default=2.0, kw_only=True)

    name: ClassVar[str] = "lvpruning"
    paper: ClassVar[str] = "LVPruning (Sun et al., 2025)"
    budgets: ClassVar[tuple[str, ...]] = ("keep", "average", "ratio", "ratios")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("heads", "blocks"):
            self.check_whole(option, 1)
        self.check_weight("ratio_weight")
        self.check_flag("straight_through")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"{self.name}: temperature={self.temperature!r}; allowed: a number above 0.")
        for option, allowed in (("text", ("prompt", "all")), ("ratio_loss", ("square", "huber"))):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{self.name}: {option}={getattr(self, option)!r}; allowed: {', '.join(allowed)}.")
        self.check_share("ratio", optional=True)
        ratios = self.ratios
        if ratios is None:
            return
        if not isinstance(ratios, tuple) or not all(is_number(ratio) and 0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"{self.name}: ratios={ratios!r}; allowed: numbers above 0, up to 1, as (0.5, 0.3, 0.1).")
        if list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"{self.name}: ratios={ratios!r}; allowed: none above the one before it.")

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Make one decision module for each drop."""
        width, depth = base["hidden_size"], base["num_hidden_layers"]
        if width % self.heads:
            raise ValueError(f"{self.name}: heads={self.heads}; allowed: divisors of the decoder's width, {width}.")
        layers = self.layers or scaled_layers(LAYERS, 32, depth)
        self.check_depth("layers", layers, depth)
        self._check_shares(len(layers))
        return nn.ModuleList(DecisionModule(width, self.heads, self.blocks) for _ in layers)

    def shares(self, patches: int, modules: int) -> tuple[float, ...]:
        """Return the share of all tokens that each module is to keep."""
        if self.ratios is not None:
            return self.ratios
        if self.ratio is not None:
            return tuple(self.ratio - STEP * module for module in range(modules))
        return tuple(min(1.0, self.keep / patches + STEP * above) for above in range(modules - 1, -1, -1))

    def _check_shares(self, modules: int) -> None:
        if self.ratios is not None and len(self.ratios) != modules:
            raise ValueError(f"{self.name}: ratios={self.ratios}; allowed: {modules} of them, one for each module.")
        least = STEP * (modules - 1)
        if self.ratio is not None and self.ratio <= least + 1e-9:
            raise ValueError(
                f"{self.name}: ratio={self.ratio} leaves nothing after {modules} modules, each of which keeps {STEP} "
                f"less; allowed: above {least:g}, up to 1, or ratios=(...)."
            )

    def final_tokens(self, config: Any, patches: int) -> int:
        """Return `keep`, the number for an `average`, or the one that the ratios lead to."""
        if self.ratio is None and self.ratios is None:
            return super().final_tokens(config, patches)
        return self._counts(config, patches)[-1]

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one drop after each module's layers; in training every one decides, though all may stay."""
        groups = groups_after(self.tops(config, LAYERS), self._counts(config, patches))
        if self.needs.weights:
            groups = tuple(replace(group, adaptive=True) for group in groups)
        return PruningPlan(patches, decoder=groups)

    def _counts(self, config: Any, patches: int) -> list[int]:
        modules = len(self.tops(config, LAYERS))
        self._check_shares(modules)
        return [max(1, min(patches, round(patches * share))) for share in self.shares(patches, modules)]

    def module_flops(self, visual: int, text: int) -> int:
        """Count one decision module; attention's own products are included, which the paper's counts leave out."""
        assert self.base is not None
        return decision_flops(self.base["hidden_size"], visual, text, self.blocks)

    def scores(self, step: DecoderStep) -> torch.Tensor:
        """Return γ of each visual token (Eq. 4): (B, M, k, 2)."""
        learned, hidden, sequence = self.modules_or_raise(), step.hidden, step.sequence
        assert isinstance(learned, nn.ModuleList)
        module = learned[self._place(step.group)]
        hidden = hidden.to(next(module.to(hidden.device).parameters()).dtype)
        text, present = gathered(hidden, self.text_columns(step).to(hidden.device))
        visual = sequence.visual(hidden)
        scores: torch.Tensor = module(visual.flatten(1, 2), text, present)
        return scores.unflatten(1, visual.shape[1:3])

    def text_columns(self, step: DecoderStep) -> torch.Tensor:
        """Mark the columns that visual tokens read, before and after the images: bool (B, n)."""
        return self.prompt_text(step.sequence, answers=self.text == "all")

    def _place(self, group: Group) -> int:
        """Return the number of the module that stands after a group."""
        assert self.base is not None
        layers = self.layers or scaled_layers(LAYERS, 32, self.base["num_hidden_layers"])
        return layers.index(group.last + 1)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Keep the tokens with the largest γ0 − γ1 (Eq. 13)."""
        scores = self.scores(step)
        return best_for_decoder(step, scores[..., 0] - scores[..., 1])

    def mask(self, step: DecoderStep) -> torch.Tensor:
        """Draw decisions by a straight-through Gumbel-softmax (Eq. 5, 6)."""
        drawn = nn.functional.gumbel_softmax(self.scores(step), self.temperature, hard=self.straight_through)
        return drawn[..., 0]

    def loss(self) -> torch.Tensor:
        """Return λ_ratio times the mean over modules and images of how far decisions are from the ratios (Eq. 11)."""
        learned, terms = self.modules_or_raise(), []
        # The number that an average leads to is the one that was planned.
        method = self if self.average is None else self.at(self.batch.weighed[-1].group.keep)
        assert isinstance(learned, nn.ModuleList)
        for weighed in self.batch.weighed:
            patches = weighed.weights.shape[-1]
            share = weighed.counts / patches
            goal = torch.full_like(share, method.shares(patches, len(learned))[self._place(weighed.group)])
            if self.ratio_loss == "huber":
                terms.append(nn.functional.huber_loss(share, goal, delta=0.5))
            else:
                terms.append(nn.functional.mse_loss(share, goal))
        return self.ratio_weight * torch.stack(terms).mean()


def decision_flops(width: int, visual: int, text: int, blocks: int = 2, *, products: bool = True) -> int:
    """Count a decision module: queries, output and network of visual tokens, keys and values of text tokens.

    `products=False` leaves out the products of queries with keys and of weights with values, as LVPruning's counts do.
    """
    block = 2 * visual * (2 * width**2 + 2 * width * 2 * width) + 2 * text * 2 * width**2
    attention = 4 * visual * text * width if products else 0
    return blocks * (block + attention) + 2 * visual * width * 2


def gathered(hidden: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the marked columns of each row, with zeros after the last one of a shorter row.

    Parameters
    ----------
    hidden : Tensor (B, n, C)
    text : bool Tensor (B, n)

    Returns
    -------
    Tensor (B, T, C)
        T is the largest number of marked columns, 1 at least.
    bool Tensor (B, T)
        Which of them are there.
    """
    most = max(1, int(text.sum(1).max()))
    present, index = text.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    present, index = present[:, :most].bool(), index[:, :most]
    states = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    return states.masked_fill(~present[..., None], 0), present
