"""Text-to-visual attention with learned layer weights, fine-tuned with a term for sparse scores.

A widespread summary describes it as the fine-tuned version of what it calls IVTP; see `methods.text_attention`. It is
not IVTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..methods.selecting import image_tokens, ranking, received
from ..methods.text_attention import TextAttention, fused
from ..model.pruner import DecoderStep, Needs
from .method import TrainedMethod

FUSIONS = ("learned", "fixed")
SPARSITIES = ("l1", "entropy", "l1_over_l2", "none")
_LEAST = 1e-8
"""No threshold is below: that far the share of a token that receives nothing has a gradient of use."""


class LayerWeights(nn.Module):
    """Weights of a drop's layers, above 0 and of sum 1.

    Parameters
    ----------
    start : sequence of float
        The weights at first, up to a factor, lowest layer first.
    """

    def __init__(self, start: tuple[float, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(start).log())

    def forward(self) -> torch.Tensor:
        """Return w_l: (layers,)."""
        return self.logits.softmax(0)


@dataclass(frozen=True)
class SparseAttention(TrainedMethod, TextAttention):
    """Ranks visual tokens by the attention of the instruction, fused over layers with weights that are learned.

    S_i = Σ_l w_l · mean over heads and instruction tokens of the attention paid to token i. In training a drop keeps
    the same tokens as at inference, the best by S, and passes the gradient of the soft share S_i / (S_i + θ), with θ
    midway between the last score that stays and the first that goes. The loss is L_LM + λ‖S‖₁. Projector and language
    model train, too. The summary prints the term, the fusion and the ratios r₁ and r₂, and neither λ nor how weights
    are learned.

    Parameters
    ----------
    keep, layers, fuse, weights, readers, ratios
        As in `TextAttention`. Learned layer weights begin at `weights`.
    fusion : {"learned", "fixed"}, default "learned"
        Whether the layers' weights are learned.
    sparsity : {"l1", "entropy", "l1_over_l2", "none"}, default "l1"
        Of the scores of the tokens that are there before each drop. `"l1"` is the term as printed, Σ S_i: scores are at
        least 0, so that this is the share of attention that goes to the image, and less of it makes nothing sparse.
        The others are of p = S / Σ S: the entropy −Σ p ln p, and Σ p / √Σ p².
    sparsity_weight : float, default 0.01
        λ.
    straight_through : bool, default True
        Decide by 0 or 1 in training. False leaves the shares soft.
    """

    fusion: str = field(default="learned", kw_only=True)
    sparsity: str = field(default="l1", kw_only=True)
    sparsity_weight: float = field(default=0.01, kw_only=True)
    straight_through: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "sparse-attention"
    paper: ClassVar[str] = "a summary that goes by the name of IVTP, and is not it"
    trains: ClassVar[tuple[str, ...]] = ("language_model", "multi_modal_projector", "lm_head")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in (("fusion", FUSIONS), ("sparsity", SPARSITIES)):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{self.name}: {option}={getattr(self, option)!r}; allowed: {', '.join(allowed)}.")
        self.check_weight("sparsity_weight")
        self.check_flag("straight_through")
        if self.fusion == "learned" and self.weights is not None and min(self.weights) <= 0:
            raise ValueError(
                f'{self.name}: weights={self.weights}; allowed: numbers above 0, or fusion="fixed": a weight of 0 '
                "cannot learn."
            )

    @property
    def needs(self) -> Needs:
        """Ask for what any trained method needs; in training scores have a gradient."""
        needs = super().needs
        return replace(needs, attention_gradient=needs.weights)

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Make the weights of each drop's layers; fixed ones need no module."""
        spans = self.spans(base["num_hidden_layers"])
        if self.ratios is not None and len(self.ratios) != len(spans):
            raise ValueError(f"{self.name}: ratios={self.ratios}; allowed: {len(spans)} of them, one for each drop.")
        if self.fusion == "fixed":
            return nn.ModuleList()
        return nn.ModuleList(LayerWeights(self.weights or (1.0,) * (last + 1 - first)) for first, last in spans)

    def module_flops(self, visual: int, text: int) -> int:
        """Count the scores of one drop: the readers' queries with all keys, and their mean, in each fused layer."""
        assert self.base is not None
        first, last = self.spans(self.base["num_hidden_layers"])[-1]
        readers = visual if self.readers == "vision" else text
        each = 2 * readers * (visual + text) * (self.base["hidden_size"] + self.base["num_attention_heads"])
        return (last + 1 - first) * each

    def layer_weights(self, step: DecoderStep) -> tuple[float, ...] | torch.Tensor | None:
        """Return the weights of the layers of a drop, lowest first."""
        if self.fusion == "fixed":
            return self.weights
        assert self.base is not None
        learned = self.modules_or_raise()
        assert isinstance(learned, nn.ModuleList)
        drops = [last for _, last in self.spans(self.base["num_hidden_layers"])]
        weights: torch.Tensor = learned[drops.index(step.group.last)]()
        return weights

    def score(self, step: DecoderStep) -> torch.Tensor:
        """Return S of each visual token: float32 (B, M, k). The answers of a training batch do not read."""
        readers, first = self.readers_at(step), None
        if self.batch.prompt is not None or self.readers == "vision":
            reads = readers.flatten(0, 1).any(0)
            first = int(reads.to(torch.uint8).argmax())
        rows = [received(record, step.sequence, readers, first) for record in step.decoder_records]
        return fused(rows, self.layer_weights(step))

    def readers_at(self, step: DecoderStep) -> torch.Tensor:
        """Mark the tokens that read each image: bool (B, M, n)."""
        if self.readers != "vision":
            return self.instructed(step, self.readers_of(step.sequence))
        return image_tokens(step.sequence, self.candidates(step))

    def candidates(self, step: DecoderStep) -> torch.Tensor:
        """Mark the visual tokens that are left before a drop: bool (B, M, k)."""
        present = step.sequence.token_present
        return present if step.weights is None else present.to(step.weights.device) & (step.weights.detach() > 0)

    def mask(self, step: DecoderStep) -> torch.Tensor:
        """Keep the best by S, as at inference, with the gradient of their soft shares."""
        scores = self.score(step)
        there = self.candidates(step).to(scores.device)
        scores = scores.masked_fill(~there, 0.0)
        self.batch.scores.append(scores)
        return chosen(scores, there, step.group.keep, hard=self.straight_through)

    def loss(self) -> torch.Tensor:
        """Return λ times the term, averaged over drops and images."""
        if self.sparsity == "none" or not self.batch.scores:
            return torch.zeros(())
        terms = [sparsity_of(self._of_images(drop), self.sparsity).mean() for drop in range(len(self.batch.scores))]
        return self.sparsity_weight * torch.stack(terms).mean()

    def _of_images(self, drop: int) -> torch.Tensor:
        """Return the scores before a drop, 0 for tokens that are gone: (I, k), images in their order."""
        return self.batch.scores[drop][self.batch.weighed[drop].present.any(-1)]

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Return the share of attention that the image gets and the entropy of the scores, averaged over drops."""
        drops = [self._of_images(drop) for drop in range(len(self.batch.scores))]
        if not drops:
            return {}
        names = {"attention_mass": "l1", "attention_entropy": "entropy"}
        return {
            name: float(torch.stack([sparsity_of(scores, term).mean() for scores in drops]).mean())
            for name, term in names.items()
        }


def chosen(scores: torch.Tensor, there: torch.Tensor, keep: int, *, hard: bool) -> torch.Tensor:
    """Weigh tokens by scores of at least 0: 1 for the `keep` best, or soft, with the same gradient.

    The soft share is S / (S + θ), a sigmoid of ln S − ln θ. It does not change if all scores are scaled.

    Parameters
    ----------
    scores : float Tensor (B, M, k)
        0 where there is no token.
    there : bool Tensor (B, M, k)
    keep : int
    hard : bool

    Returns
    -------
    Tensor (B, M, k)
    """
    order = ranking(scores.detach().masked_fill(~there, -1.0))
    if keep >= scores.shape[-1]:
        return there.to(scores.dtype)
    edge = scores.gather(-1, order[..., keep - 1 : keep + 1]).mean(-1, keepdim=True).clamp_min(_LEAST)
    soft = scores / (scores + edge) * there
    if not hard:
        return soft
    kept = torch.zeros_like(there).scatter(-1, order[..., :keep], True) & there
    return kept + (soft - soft.detach())  # exactly 0 or 1


def sparsity_of(scores: torch.Tensor, term: str) -> torch.Tensor:
    """Return the term of each image's scores (I, k), which are at least 0: (I,).

    Parameters
    ----------
    term : {"l1", "entropy", "l1_over_l2"}
    """
    total = scores.sum(-1)
    if term == "l1":
        return total
    shares = scores / total[..., None].clamp_min(torch.finfo(scores.dtype).tiny)
    if term == "l1_over_l2":
        return 1 / shares.square().sum(-1).clamp_min(torch.finfo(scores.dtype).tiny).sqrt()
    return -torch.special.xlogy(shares, shares.clamp_min(torch.finfo(scores.dtype).tiny)).sum(-1)
