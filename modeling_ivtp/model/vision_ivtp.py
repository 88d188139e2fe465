"""Stage 1: CLIP's vision tower with group-wise token pruning (IVTP Sec. 3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionModel, eager_attention_forward

from .attention_maps import attend_with_map
from .labels import CHOOSE, label
from .pruner import Choice, Pruner, TowerStep, full_precision
from .rollout import AttentionRecord, GroupScores
from .schedule import Group, PruningPlan


@dataclass
class PrunedVisionOutput:
    """The output of the pruned tower.

    Attributes
    ----------
    features : Tensor (I, 1 + k, D)
        CLS and kept patches at the feature layer(s), several layers side by side.
    patches : int64 Tensor (I, k)
        Kept patches, 0 to N - 1 on the original grid, ascending.
    pooler_output : Tensor (I, d) or None
        The last layer's CLS after `post_layernorm`; None if the tower did not run to its top.
    records : dict of int to AttentionRecord
        Of the layers in `Needs.recorded_layers`.
    last_hidden_state : Tensor (I, 1 + k, d)
        The output of the last layer that ran.
    hidden_states : tuple of Tensor (I, 1 + k', d) or None
        The embeddings and every layer's output, each with the patches that were left there.
    """

    features: torch.Tensor
    patches: torch.Tensor
    pooler_output: torch.Tensor | None
    records: Mapping[int, AttentionRecord]
    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


class GroupedCLIPAttention(CLIPAttention):
    """CLIP's attention that also fills an `AttentionRecord` when one is passed; otherwise CLIP's own code runs."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run CLIP's attention; a `record` is filled."""
        if record is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        record.fill(
            query=query[:, :, None, :1] if record.reference_only else query[:, :, None],
            key=key,
            value=value,
            scale=self.scale,
        )
        plain = attention_mask is None and not torch.is_grad_enabled()
        if plain and hidden_states.device.type == "cpu" and not record.reference_only:
            # A CPU computes attention from its maps anyway; scoring reuses them.
            output, averaged = attend_with_map(query, key, value, self.scale)
            record.fill(averaged_map=averaged)
            return self.out_proj(output.flatten(2)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.out_proj(output), weights


class CLIPEncoderLayer(modeling_clip.CLIPEncoderLayer):
    """CLIP's layer that lets tokens be dropped between attention and MLP.

    It keeps the name of the stock class, by which accelerate finds the modules that must not be split.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        between: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run CLIP's layer; `between` maps hidden states between attention and MLP."""
        if between is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = between(hidden_states + attended)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


@dataclass
class _Pass:
    """One pass of images through the tower.

    Attributes
    ----------
    pruner : Pruner
    patches : int64 Tensor (I, k)
        The patches that are left.
    total : int
        Patches of a whole image, N.
    scores : list of GroupScores or None
        Each group's decision is appended.
    features : dict of int to Tensor (I, 1 + k, d)
        Hidden states of the feature layers, by their number.
    sizes : float32 Tensor (I, k) or None
    order : int64 Tensor (I, k) or None
    carried : float32 Tensor (I, k) or None
        The last `Choice.sizes`, `Choice.order` and `Choice.carried`.
    records : list of AttentionRecord
        Of the current group's layers.
    """

    pruner: Pruner
    patches: torch.Tensor
    total: int
    scores: list[GroupScores] | None
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: torch.Tensor | None = None
    order: torch.Tensor | None = None
    carried: torch.Tensor | None = None
    records: list[AttentionRecord] = field(default_factory=list)

    def bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return the attention bias that counts a token as often as its patches: (I, 1, 1, 1 + k), or None."""
        if self.sizes is None or not self.pruner.needs.proportional_attention:
            return None
        return nn.functional.pad(self.sizes.log(), (1, 0)).to(hidden.dtype)[:, None, None]

    def record(self, group: Group, layer: int) -> AttentionRecord:
        """Start the record of a layer of the current group."""
        self.records.append(self.pruner.record(group, layer))
        return self.records[-1]

    def choose(self, group: Group, hidden: torch.Tensor) -> Choice:
        """Ask the pruner at the top of a group, and drop from everything but the hidden states."""
        with torch.no_grad(), full_precision(self.patches.device), label(CHOOSE):
            choice = self.pruner.in_tower(
                TowerStep(
                    group,
                    self.records,
                    hidden,
                    self.patches,
                    self.total,
                    sizes=self.sizes,
                    order=self.order,
                    carried=self.carried,
                )
            )
        for record in self.records:
            record.seal()
        self.records = []
        kept = self.patches.gather(1, choice.kept)
        if self.scores is not None:
            self.scores.append(GroupScores("tower", group, self.patches, choice.scores, kept, choice.mixture))
        self.patches, self.sizes, self.order, self.carried = kept, choice.sizes, choice.order, choice.carried
        self.features = {number: _apply(choice, feature) for number, feature in self.features.items()}
        return choice

    def drop(self, group: Group) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that drops from hidden states at the top of a group.

        The first call asks the pruner. Gradient checkpointing calls it again in the backward pass.
        """
        choice: Choice | None = None

        def drop_hidden(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal choice
            if choice is None:
                choice = self.choose(group, hidden)
            return _apply(choice, hidden)

        return drop_hidden


class GroupedCLIPVisionModel(CLIPVisionModel):
    """`CLIPVisionModel` that drops patches at the top of groups of layers.

    Its modules and weights are those of the stock class. Called without a `pruner` it is the stock class.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Classes are changed in place: building the layers anew would allocate every weight a second time.
        for layer in self.encoder.layers:
            layer.__class__, layer.self_attn.__class__ = CLIPEncoderLayer, GroupedCLIPAttention

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        pruner: Pruner | None = None,
        plan: PruningPlan | None = None,
        feature_layers: Sequence[int] = (-2,),
        to_the_top: bool = True,
        scores: list[GroupScores] | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode images, dropping the patches that a pruner does not keep.

        Parameters
        ----------
        pixel_values : Tensor (I, 3, height, width)
        pruner : Pruner, optional
            None: the stock forward and output.
        plan : PruningPlan, optional
            The pruner's plan; needed with it.
        feature_layers : sequence of int, default (-2,)
            Which hidden states become features, counted as `hidden_states` does: 0 is the embedding output.
        to_the_top : bool, default True
            Whether CLIP's embedding of the image is needed; otherwise the tower ends at the last layer that is.
        scores : list of GroupScores, optional
            Each group's decision is appended.
        output_hidden_states : bool, default False
            Whether to return the output of every layer; the tower then runs to its top.

        Returns
        -------
        PrunedVisionOutput, or the stock output without a `pruner`.

        Raises
        ------
        ValueError
            For a feature layer that the tower does not have.
        """
        if pruner is None or plan is None:
            if output_hidden_states:  # by default, the configuration decides
                kwargs["output_hidden_states"] = output_hidden_states
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        layers = self.encoder.layers
        feature_numbers = [self._hidden_state(layer) for layer in feature_layers]
        hidden = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden = self.pre_layrnorm(hidden)
        patches = torch.arange(hidden.shape[1] - 1, device=hidden.device).expand(hidden.shape[0], -1)
        images = _Pass(pruner, patches, patches.shape[1], scores, {0: hidden} if 0 in feature_numbers else {})
        tops, group_of = _dropping_groups(plan, patches.shape[1])
        of_cls = not pruner.needs.all_queries
        recorded = {layer % len(layers): AttentionRecord(of_cls) for layer in pruner.needs.recorded_layers}
        states = [hidden] if output_hidden_states else []
        whole = to_the_top or output_hidden_states
        end = len(layers) if whole else max([*feature_numbers, *(last + 1 for last in (*tops, *recorded))])
        for index, layer in enumerate(layers[:end]):
            options: dict[str, Any] = {}
            if index in group_of:
                options["record"] = images.record(group_of[index], index)
            elif index in recorded:
                options["record"] = recorded[index]
            top = tops.get(index)
            if top is not None and top.middle:
                options["between"] = images.drop(top)
            hidden = layer(hidden, images.bias(hidden), **options, **kwargs)
            if top is not None and not top.middle:
                hidden = images.drop(top)(hidden)
            if index + 1 in feature_numbers:
                images.features[index + 1] = hidden
            if output_hidden_states:
                states.append(hidden)
        features = [images.features[number] for number in feature_numbers]
        return PrunedVisionOutput(
            features=features[0] if len(features) == 1 else torch.cat(features, dim=-1),
            patches=images.patches,
            pooler_output=self.post_layernorm(hidden[:, 0]) if to_the_top else None,
            records={layer: recorded[layer % len(layers)] for layer in pruner.needs.recorded_layers},
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _hidden_state(self, layer: int) -> int:
        """Return a hidden state's number, counted from 0, or refuse one that the tower does not have."""
        layers = len(self.encoder.layers)
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"vision_feature_layer={layer}; the tower has hidden states {-layers - 1} to {layers}.")
        return layer % (layers + 1)


def _dropping_groups(plan: PruningPlan, patches: int) -> tuple[dict[int, Group], dict[int, Group]]:
    """Return the groups of the tower that drop anything, by their last layer, and by each of their layers."""
    tokens = (patches, *(group.keep for group in plan.tower))
    tops = {group.last: group for group, before in zip(plan.tower, tokens, strict=False) if group.keep < before}
    group_of = {layer: group for group in tops.values() for layer in range(group.first, group.last + 1)}
    return tops, group_of


def _apply(choice: Choice, hidden: torch.Tensor) -> torch.Tensor:
    """Keep CLS and the chosen patches: (I, 1 + k, d) to (I, 1 + k', d)."""
    if choice.mixture is None:
        index = nn.functional.pad(choice.kept.to(hidden.device) + 1, (1, 0))
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return torch.cat([hidden[:, :1], choice.of(hidden[:, 1:])], 1)
