"""What a pruning method decides, and the steps at which the towers ask it.

The towers run layers, gather what stays, and keep positions, masks and cache right; a *pruner* says what stays, or what
is merged into what. It is asked at up to four steps, in this order: inside the vision tower, on the features of an
image, on a prompt before the decoder, and inside the decoder. IVTP is one pruner, `modeling_ivtp.methods` has others.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_ivtp import IVTPPruningConfig
from .rollout import AttentionRecord, DecoderAttentionRecord, decide
from .schedule import Group, PruningPlan, plan_pruning
from .visual_sequence import VisualSequence

STAGES = ("tower", "features", "prompt", "decoder")
"""The steps, in their order."""


@dataclass(frozen=True)
class Choice:
    """What stays of the k visual tokens of every image; leading dimensions are those of the step.

    Attributes
    ----------
    kept : int64 Tensor (..., k')
        Which tokens, ascending. k stands for none, at the end, where an image keeps fewer than others.
    mixture : float32 Tensor (..., k', k) or None
        What each of them becomes: weights of the tokens that stood before. None: they stay as they are.
    sizes : float32 Tensor (..., k') or None
        How many patches each of them stands for, where a method counts that.
    scores : float32 Tensor (..., k) or None
        What was ranked; only to be looked at.
    ragged : bool
        Whether images may keep different numbers of tokens.
    """

    kept: torch.Tensor
    mixture: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    ragged: bool = False

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens that stay: (..., k, d) to (..., k', d). In the place of none stands any."""
        if self.mixture is not None:
            return self.mixture.to(tokens.device, tokens.dtype) @ tokens
        index = self.kept.to(tokens.device).clamp_max(tokens.shape[-2] - 1)
        return tokens.gather(-2, index[..., None].expand(*index.shape, tokens.shape[-1]))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves autocast, whose fewer bits would decide what stays; there is none for tensors without data."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@dataclass
class TowerStep:
    """The top of a group of layers of the vision tower.

    Attributes
    ----------
    group : Group
    records : list of AttentionRecord
        Of the group's layers, lowest first; M is 1.
    patches : int64 Tensor (I, k)
        Which patches the tokens are, or stand for.
    sizes : float32 Tensor (I, k) or None
        What `Choice.sizes` said last.
    """

    group: Group
    records: list[AttentionRecord]
    patches: torch.Tensor
    sizes: torch.Tensor | None


@dataclass
class FeatureStep:
    """The features of images, before the projector.

    Attributes
    ----------
    keep : int
        Tokens of one image that are to stay.
    features : Tensor (I, k, D)
    patches : int64 Tensor (I, k)
    records : dict of int to AttentionRecord
        Of the tower layers that the pruner decoder_records.
    pixel_values : Tensor (I, 3, height, width)
    grid : (int, int)
        Rows and columns of patches of a whole image.
    """

    keep: int
    features: torch.Tensor
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
        """What the language model gets: (I, k', d)."""
        if choice.mixture is None and self._projected is not None:
            return choice.of(self._projected)
        return self.project(choice.of(self.features))


@dataclass
class PromptStep:
    """A prompt with its images before the decoder.

    Attributes
    ----------
    keep : int
        Tokens of one image that are to stay.
    features : Tensor (B, M, k, d)
        Projected.
    patch_embeds : Tensor (B, M, k, P) or None
        The patches in CLIP's space, for a pruner that asks for them.
    text_embeds : Tensor (B, W, P) or None
        CLIP's embedding of each window of the instruction; None where no instruction came.
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
        Of the group's layers, lowest first, where the pruner `observes`.
    decoder_records : list of DecoderAttentionRecord
        The same, where it does not.
    hidden : Tensor (B, n, d)
        The group's output.
    sequence : VisualSequence
        Where the visual tokens stand.
    sizes : float32 Tensor (B, M, k) or None
        What `Choice.sizes` said last.
    state : any
        What `Pruner.prepare` made of the prompt.
    """

    group: Group
    records: list[AttentionRecord]
    decoder_records: list[DecoderAttentionRecord]
    hidden: torch.Tensor
    sequence: VisualSequence
    sizes: torch.Tensor | None
    state: Any


class Pruner:
    """Base class of pruning methods: says what each step keeps. A pruner changes nothing by itself.

    Attributes
    ----------
    observes : bool
        Whether a pseudo CLS travels through the decoder's groups; `options` then says how it is made and aggregated.
    options : IVTPPruningConfig or None
    proportional : bool
        Whether the tower's attention counts a token as many times as the patches it stands for.
    recorded_layers : tuple of int
        Tower layers that the features' step gets records of; negative ones count from the top.
    compares_patches : bool
        Whether the prompt's step needs patches and instruction in CLIP's space.
    embeds_image : bool
        Whether CLIP's embedding of the image is needed, for which the tower runs to its top.
    compact : bool
        Whether positions are renumbered without gaps.
    projects_all : bool
        Whether the features' step looks at projected features, so that those that go are projected, too.
    """

    observes: bool = False
    options: Any = None
    proportional: bool = False
    recorded_layers: tuple[int, ...] = ()
    compares_patches: bool = False
    embeds_image: bool = False
    compact: bool = False
    projects_all: bool = False

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """What stays where, for images of `patches` tokens; None: everything.

        Raises
        ------
        ValueError
            If the pruner does not fit the model.
        """
        raise self._silent("plans")

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """What a layer of a group of the tower, or of the decoder under observers, is to leave behind."""
        return AttentionRecord(reference_only=True)

    def in_tower(self, step: TowerStep) -> Choice:
        """Choose at the top of a group of tower layers."""
        raise self._silent("chooses in the tower")

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose among the features of images."""
        raise self._silent("chooses on features")

    def in_prompt(self, step: PromptStep) -> Choice:
        """Choose among the features of images for a prompt."""
        raise self._silent("chooses on a prompt")

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """What the decoder's steps are to know of the prompt's input embeddings (B, n, d)."""
        return None

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Choose at the top of a group of decoder layers."""
        raise self._silent("chooses in the decoder")

    def _silent(self, does: str) -> TypeError:
        return TypeError(f"{type(self).__name__} never {does}.")


class Wrapped(Pruner):
    """A pruner that is as another one says; base of those that look on.

    Parameters
    ----------
    pruner : Pruner
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.observes, self.options, self.compact = pruner.observes, pruner.options, pruner.compact
        self.proportional, self.recorded_layers = pruner.proportional, pruner.recorded_layers
        self.compares_patches, self.embeds_image = pruner.compares_patches, pruner.embeds_image
        self.projects_all = pruner.projects_all

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """The other's."""
        return self.pruner.plan(config, patches)

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """The other's."""
        return self.pruner.record(group, layer)

    def in_tower(self, step: TowerStep) -> Choice:
        """The other's."""
        return self.pruner.in_tower(step)

    def in_features(self, step: FeatureStep) -> Choice:
        """The other's."""
        return self.pruner.in_features(step)

    def in_prompt(self, step: PromptStep) -> Choice:
        """The other's."""
        return self.pruner.in_prompt(step)

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """The other's."""
        return self.pruner.prepare(sequence, embeds)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """The other's."""
        return self.pruner.in_decoder(step)


@dataclass(frozen=True)
class IVTPPruner(Pruner):
    """What the pruning options of a model say.

    Attributes
    ----------
    options : IVTPPruningConfig
    """

    options: IVTPPruningConfig

    observes = True

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether positions are renumbered without gaps."""
        return self.options.positions == "compact"

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """See `plan_pruning`."""
        layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        return plan_pruning(self.options, patches, *layers)

    @property
    def embeds_image(self) -> bool:  # type: ignore[override]
        """Relevance compares words with CLIP's embedding of the image (Eq. 6)."""
        return self.options.guidance == "clip"

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Rollout goes down through all tokens' rows; the top layer gives one row, and so does every other options."""
        return AttentionRecord(reference_only=layer == group.last or self.options.aggregation != "rollout")

    def in_tower(self, step: TowerStep) -> Choice:
        """The patches that matter most to CLS."""
        scores, kept = decide(step.records, self.options.aggregation, step.group.keep)
        return Choice(kept[:, 0], scores=scores[:, 0])

    def in_decoder(self, step: DecoderStep) -> Choice:
        """The visual tokens that matter most to the pseudo CLS."""
        scores, kept = decide(step.records, self.options.aggregation, step.group.keep)
        return Choice(kept, scores=scores)
