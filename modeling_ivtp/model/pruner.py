"""Pruners, which choose the visual tokens that stay, and the steps at which the model asks them.

The model runs layers, gathers the tokens that stay, and keeps positions, masks and cache right. A *pruner* says which
tokens stay, or which are merged into which. It is asked at up to four steps, in this order: inside the vision tower, on
the features of an image, on a prompt before the decoder, and inside the decoder. IVTP is one pruner; the methods of
`modeling_ivtp.methods` are others.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_ivtp import IVTPPruningConfig
from .diversity import SHARPNESS, quality, spanned, spanning
from .rollout import (
    AttentionRecord,
    DecoderAttentionRecord,
    accumulate,
    aggregate,
    covered,
    keep_most_important,
    own_importance,
)
from .schedule import Group, PruningPlan, plan_pruning
from .visual_sequence import VisualSequence

STAGES = ("tower", "features", "prompt", "decoder")
"""The names of the four steps, in their order."""


@dataclass(frozen=True)
class Choice:
    """The tokens that stay of the k visual tokens of every image; leading dimensions are those of the step.

    Attributes
    ----------
    kept : int64 Tensor (..., k')
        Indices of the tokens, ascending. k stands for none, at the end, if an image keeps fewer than others.
    mixture : float32 Tensor (..., k', k or k + 1) or None
        What each of them becomes, as weights of the k tokens and, in the feature step, of the image's CLS after them.
        None: they stay as they are. In the feature step they are weights of projected features if the pruner read
        those, and of features before the projector if it did not.
    sizes : float32 Tensor (..., k') or None
        How many patches each of them stands for, if the pruner counts that.
    scores : float32 Tensor (..., k) or None
        The scores that were ranked, for traces.
    ragged : bool
        Whether images may keep different numbers of tokens.
    order : int64 Tensor (..., k') or None
        Indices of the k' tokens in the pruner's own order, for its next step.
    carried : float32 Tensor (..., k') or None
        What the pruner wants to know of each of them in its next step in the tower.
    """

    kept: torch.Tensor
    mixture: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    ragged: bool = False
    order: torch.Tensor | None = None
    carried: torch.Tensor | None = None

    def of(self, tokens: torch.Tensor, cls: torch.Tensor | None = None) -> torch.Tensor:
        """Take the tokens that stay: (..., k, d) to (..., k', d), with any values where `kept` stands for none.

        `cls` (..., d) is the image's CLS among the same states, for a mixture that may weight it.
        """
        if self.mixture is not None:
            if cls is not None and self.mixture.shape[-1] > tokens.shape[-2]:
                tokens = torch.cat([tokens, cls[..., None, :]], -2)
            return self.mixture.to(tokens.device, tokens.dtype) @ tokens
        index = self.kept.to(tokens.device).clamp_max(tokens.shape[-2] - 1)
        return tokens.gather(-2, index[..., None].expand(*index.shape, tokens.shape[-1]))


@dataclass
class TowerStep:
    """The top of a group of layers of the vision tower.

    Attributes
    ----------
    group : Group
    records : list of AttentionRecord
        Of the group's layers, lowest first; M is 1.
    hidden : Tensor (I, 1 + k, d)
        The group's output, CLS first.
    patches : int64 Tensor (I, k)
        The patches that the tokens are, or stand for.
    total : int
        Patches of a whole image, N.
    sizes : float32 Tensor (I, k) or None
    order : int64 Tensor (I, k) or None
    carried : float32 Tensor (I, k) or None
        The `Choice.sizes`, `Choice.order` and `Choice.carried` of the group before.
    """

    group: Group
    records: list[AttentionRecord]
    hidden: torch.Tensor
    patches: torch.Tensor
    total: int
    sizes: torch.Tensor | None = None
    order: torch.Tensor | None = None
    carried: torch.Tensor | None = None


@dataclass
class FeatureStep:
    """The features of images, before the projector.

    Attributes
    ----------
    keep : int
        Tokens of one image that are to stay.
    features : Tensor (I, k, D)
    cls : Tensor (I, D)
        The image's CLS at the feature layer.
    patches : int64 Tensor (I, k)
    records : dict of int to AttentionRecord
        Of the tower layers in `Needs.recorded_layers`.
    pixel_values : Tensor (I, 3, height, width)
    grid : (int, int)
        Rows and columns of patches of a whole image.
    project : callable
        The projector, from (I, any, D) to (I, any, d).
    """

    keep: int
    features: torch.Tensor
    cls: torch.Tensor
    patches: torch.Tensor
    records: Mapping[int, AttentionRecord]
    pixel_values: torch.Tensor
    grid: tuple[int, int]
    project: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    _projected: torch.Tensor | None = field(init=False, default=None, repr=False)

    @property
    def projected(self) -> torch.Tensor:
        """The features in the language model's space (I, k, d), computed once."""
        if self._projected is None:
            self._projected = self.project(self.features)
        return self._projected

    def apply(self, choice: Choice) -> torch.Tensor:
        """Return the chosen features in the language model's space: (I, k', d)."""
        if self._projected is not None:
            # The pruner read features without gradients; the model learns from these.
            return choice.of(self.project(self.features) if torch.is_grad_enabled() else self._projected)
        return self.project(choice.of(self.features, self.cls))


@dataclass
class PromptStep:
    """A prompt with its images, before the decoder.

    Attributes
    ----------
    keep : int
        Tokens of one image that are to stay.
    features : Tensor (B, M, k, d)
        In the language model's space.
    patch_embeds : Tensor (B, M, k, P) or None
        The patches in CLIP's space, if the pruner needs them.
    text_embeds : Tensor (B, W, P) or None
        CLIP's embedding of each window of the instruction, if the pruner needs them.
    windows : bool Tensor (B, W) or None
        Which windows a row has.
    """

    keep: int
    features: torch.Tensor
    patch_embeds: torch.Tensor | None
    text_embeds: torch.Tensor | None
    windows: torch.Tensor | None


@dataclass
class DecoderStep:
    """The top of a group of decoder layers.

    Attributes
    ----------
    group : Group
    records : list of AttentionRecord
        Of the group's layers, lowest first, if the pruner needs a pseudo-CLS token.
    decoder_records : list of DecoderAttentionRecord
        The same, if it does not.
    hidden : Tensor (B, n, d)
        The group's output.
    sequence : VisualSequence
        Where the visual tokens stand in it.
    sizes : float32 Tensor (B, M, k) or None
    order : int64 Tensor (B, M, k) or None
        The `Choice.sizes` and `Choice.order` of the group before.
    state : any
        The result of `Pruner.prepare` for this prompt.
    next_record : DecoderAttentionRecord or None
        Of the layer after the group, computed from the group's output, if the pruner needs it.
    pseudo_cls : Tensor (B, M, d) or None
        The group's output for the pseudo-CLS tokens, if the pruner needs them.
    instruction : bool Tensor (B, n) or None
        Which columns are words of the instruction, if the pruner needs it and the inputs say so.
    weights : Tensor (B, M, k) or None
        What earlier `Pruner.weigh` left of the visual tokens, where they are weighted and not dropped. None: all.
    """

    group: Group
    records: list[AttentionRecord]
    decoder_records: list[DecoderAttentionRecord]
    hidden: torch.Tensor
    sequence: VisualSequence
    sizes: torch.Tensor | None = None
    order: torch.Tensor | None = None
    state: Any = None
    next_record: DecoderAttentionRecord | None = None
    pseudo_cls: torch.Tensor | None = None
    instruction: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class GridPositions:
    """Two-dimensional RoPE positions: the patch in row r and column c of an image stands at (p + r, p + c).

    p is the position of the image's first token. Text has two equal positions.

    Attributes
    ----------
    rows, columns : int
        Of the grid.
    span : int
        How many positions an image takes of the text: the larger side of the grid, or as many as it has patches.
    """

    rows: int
    columns: int
    span: int

    @property
    def saved(self) -> int:
        """Return how many positions fewer an image takes than it has patches."""
        return self.rows * self.columns - self.span


@dataclass(frozen=True)
class Needs:
    """Needs of a pruner, which the model has to meet.

    Attributes
    ----------
    pseudo_cls : bool
        A pseudo-CLS token runs through the decoder's groups, made and aggregated as `options` say.
    options : IVTPPruningConfig or None
        The pruning options for the pseudo-CLS token.
    proportional_attention : bool
        The tower's attention counts a token as many times as the patches it stands for.
    recorded_layers : tuple of int
        Tower layers whose records the feature step gets; negative numbers count from the top.
    all_queries : bool
        Those records hold the queries of all tokens, not of CLS alone.
    patch_embeds : bool
        The prompt step gets patches and instruction in CLIP's space.
    image_embeds : bool
        The tower runs to its top, for CLIP's embedding of the image (Eq. 6).
    compact_positions : bool
        Kept tokens are renumbered without gaps.
    all_projected : bool
        The feature step reads projected features, so dropped ones are projected, too.
    next_record : bool
        The decoder step gets the queries and keys of the layer after the group.
    instruction : bool
        The decoder step gets the columns of the instruction's words.
    weights : bool
        The decoder drops nothing: it asks `Pruner.weigh`, with gradients, and counts keys by the answer.
    attention_gradient : bool
        With `weights`: the records of decoder layers have a gradient.
    grid_positions : GridPositions or None
        The decoder's positions are two-dimensional.
    """

    pseudo_cls: bool = False
    options: Any = None
    proportional_attention: bool = False
    recorded_layers: tuple[int, ...] = ()
    all_queries: bool = False
    patch_embeds: bool = False
    image_embeds: bool = False
    compact_positions: bool = False
    all_projected: bool = False
    next_record: bool = False
    instruction: bool = False
    weights: bool = False
    attention_gradient: bool = False
    grid_positions: GridPositions | None = None


class Pruner:
    """Base class of everything that chooses tokens. A pruner chooses at each step and changes nothing by itself."""

    @property
    def label(self) -> str:
        """Name that a reader knows it by."""
        return type(self).__name__

    @property
    def needs(self) -> Needs:
        """Needs that the model has to meet."""
        return Needs()

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan how many tokens stay after each step, for images of `patches` tokens; None: all of them.

        Raises
        ------
        ValueError
            If the pruner does not fit the model.
        """
        raise self._missing("plans")

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Make the record for a layer of a group of the tower, or of the decoder with a pseudo-CLS token."""
        return AttentionRecord(reference_only=True)

    def in_tower(self, step: TowerStep) -> Choice:
        """Choose at the top of a group of tower layers."""
        raise self._missing("chooses in the tower")

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose among the features of images."""
        raise self._missing("chooses on features")

    def in_prompt(self, step: PromptStep) -> Choice:
        """Choose among the features of images for a prompt."""
        raise self._missing("chooses on a prompt")

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """Derive from the prompt's input embeddings (B, n, d) what the decoder's steps need as `state`."""
        return None

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Choose at the top of a group of decoder layers."""
        raise self._missing("chooses in the decoder")

    def weigh(self, step: DecoderStep) -> torch.Tensor:
        """Weigh visual tokens at the top of a group of decoder layers, for training (`Needs.weights`).

        Returns
        -------
        Tensor (B, M, k)
            From 0, as if it were dropped, to 1, at most what `step.weights` left.
        """
        raise self._missing("weighs tokens")

    def _missing(self, action: str) -> TypeError:
        return TypeError(f"{type(self).__name__} never {action}.")


class PrunerWrapper(Pruner):
    """A pruner that passes every question on to another one; base class of those that only watch.

    Parameters
    ----------
    pruner : Pruner
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    @property
    def label(self) -> str:
        """The wrapped pruner's."""
        return self.pruner.label

    @property
    def needs(self) -> Needs:
        """The wrapped pruner's needs."""
        return self.pruner.needs

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Ask the wrapped pruner."""
        return self.pruner.plan(config, patches)

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Ask the wrapped pruner."""
        return self.pruner.record(group, layer)

    def in_tower(self, step: TowerStep) -> Choice:
        """Ask the wrapped pruner."""
        return self.pruner.in_tower(step)

    def in_features(self, step: FeatureStep) -> Choice:
        """Ask the wrapped pruner."""
        return self.pruner.in_features(step)

    def in_prompt(self, step: PromptStep) -> Choice:
        """Ask the wrapped pruner."""
        return self.pruner.in_prompt(step)

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """Ask the wrapped pruner."""
        return self.pruner.prepare(sequence, embeds)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Ask the wrapped pruner."""
        return self.pruner.in_decoder(step)

    def weigh(self, step: DecoderStep) -> torch.Tensor:
        """Ask the wrapped pruner."""
        return self.pruner.weigh(step)


@dataclass(frozen=True)
class IVTPPruner(Pruner):
    """IVTP with a model's pruning options: keeps what matters most to CLS, then to the pseudo-CLS token.

    By option it also remembers what mattered to earlier groups of the tower, and keeps tokens that differ.

    Attributes
    ----------
    options : IVTPPruningConfig
    """

    options: IVTPPruningConfig

    @property
    def label(self) -> str:
        """`"ivtp"`, or `"ivtp-extended"` with accumulated importance and a diverse choice."""
        both = self.options.importance == "accumulated" and self.options.choice == "diverse"
        return "ivtp-extended" if both else "ivtp"

    @property
    def needs(self) -> Needs:
        """A pseudo-CLS token, and CLIP's embedding of the image if words are compared with it (Eq. 6)."""
        return Needs(
            pseudo_cls=True,
            options=self.options,
            image_embeds=self.options.guidance == "clip",
            compact_positions=self.options.positions == "compact",
        )

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan groups of layers; see `plan_pruning`."""
        layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        return plan_pruning(self.options, patches, *layers)

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Make a record: rollout needs all tracked rows of each layer but the top one, other aggregations one row."""
        return AttentionRecord(reference_only=layer == group.last or self.options.aggregation != "rollout")

    def in_tower(self, step: TowerStep) -> Choice:
        """Keep the patches that matter most to CLS."""
        records, aggregation = step.records, self.options.aggregation
        accumulated = self.options.importance == "accumulated"
        if accumulated:
            scores = accumulate(aggregate(records, aggregation)[:, 0], len(records), step.total, step.carried)
        else:
            scores = own_importance(records, aggregation)[:, 0]
        kept, _ = self._choose(scores, lambda: records[-1].flat_patch_keys, step.group.keep)
        return Choice(kept, scores=scores, carried=scores.gather(1, kept) if accumulated else None)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Keep the visual tokens that matter most to the pseudo-CLS token."""
        scores, options, keep = own_importance(step.records, self.options.aggregation), self.options, step.group.keep
        coverage = options.coverage if step.group.last == options.decoder_layers - 1 else None
        kept, shares = self._choose(scores, lambda: step.sequence.visual(step.hidden), keep, coverage is not None)
        if coverage is not None and shares is not None:
            enough = ((shares < coverage).sum(-1, keepdim=True) + 1).clamp_min(min(options.fewest_tokens, keep))
            kept = kept.masked_fill(torch.arange(keep, device=kept.device) >= enough, scores.shape[-1])
            kept = kept.sort(-1).values
        return Choice(kept, scores=scores, ragged=coverage is not None)

    def _choose(
        self, scores: torch.Tensor, features: Callable[[], torch.Tensor], keep: int, adaptive: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose by scores (..., k) and, if the choice is diverse, by features (..., k, d): int64 (..., keep).

        Chosen tokens ascend; for an adaptive choice they come in the order in which they were picked, with the share
        that each and those before it cover (..., keep).
        """
        if self.options.choice == "top":
            if not adaptive:
                return keep_most_important(scores, keep), None
            order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
            return order, covered(scores, order)
        sharpness = SHARPNESS if self.options.sharpness is None else self.options.sharpness
        shape, scores = scores.shape[:-1], scores.flatten(0, -2)
        directions, weights = features().to(scores.device).flatten(0, -3), quality(scores, sharpness)
        picked = spanning(directions, weights, scores, keep)
        if not adaptive:
            return picked.unflatten(0, shape).sort(-1).values, None
        return picked.unflatten(0, shape), spanned(directions, weights, picked).unflatten(0, shape)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, whose fewer bits would change choices; meta tensors have no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
