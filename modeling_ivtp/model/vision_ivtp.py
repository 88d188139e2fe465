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
    """What the pruned tower hands on.

    Attributes
    ----------
    features : Tensor (I, 1 + k, D)
        CLS and kept patches at the feature layer(s), several layers side by side.
    patches : int64 Tensor (I, k)
        Kept patches, 0 to N - 1 on the original grid, ascending.
    pooler_output : Tensor (I, d) or None
        The last layer's CLS after `post_layernorm`; None where nobody asked for it and the tower did not run that far.
    records : dict of int to AttentionRecord
        Of the layers that the pruner decoder_records.
    """

    features: torch.Tensor
    patches: torch.Tensor
    pooler_output: torch.Tensor | None
    records: Mapping[int, AttentionRecord]


class GroupedCLIPAttention(CLIPAttention):
    """CLIP's attention that also fills an `AttentionRecord` when one is passed; otherwise CLIP's own code runs."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
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
            # A CPU computes attention by way of its maps anyway: one that is made here is not made again for scoring.
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

    It keeps the name of the stock class, because accelerate is told by name which modules must not be split.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        between: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if between is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = between(hidden_states + attended)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


@dataclass
class _Pass:
    """One pass of images through the tower: which patches are left, and what was kept of them on the way.

    Attributes
    ----------
    pruner : Pruner
    patches : int64 Tensor (I, k)
    scores : list of GroupScores or None
    features : dict of int to Tensor (I, 1 + k, d)
        Hidden states that are to be handed on, by their number.
    sizes : float32 Tensor (I, k) or None
    records : list of AttentionRecord
        Of the group that is under way.
    """

    pruner: Pruner
    patches: torch.Tensor
    scores: list[GroupScores] | None
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: torch.Tensor | None = None
    records: list[AttentionRecord] = field(default_factory=list)

    def bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What attention adds so that a token counts as many times as the patches it stands for: (I, 1, 1, 1 + k)."""
        if self.sizes is None or not self.pruner.needs.proportional_attention:
            return None
        return nn.functional.pad(self.sizes.log(), (1, 0)).to(hidden.dtype)[:, None, None]

    def choose(self, group: Group) -> Choice:
        """Ask the pruner at the top of a group, and leave out of everything but the layer's output what it does."""
        with torch.no_grad(), full_precision(self.patches.device), label(CHOOSE):
            choice = self.pruner.in_tower(TowerStep(group, self.records, self.patches, self.sizes))
        for record in self.records:
            record.seal()
        self.records = []
        kept = self.patches.gather(1, choice.kept)
        if self.scores is not None:
            self.scores.append(GroupScores("tower", group, self.patches, choice.scores, kept, choice.mixture))
        self.patches, self.sizes = kept, choice.sizes
        self.features = {at: _left(feature, choice) for at, feature in self.features.items()}
        return choice

    def dropping(self, group: Group) -> Callable[[torch.Tensor], torch.Tensor]:
        """Asks the pruner when it is first called: gradient checkpointing calls it again in the backward pass."""
        made: list[Choice] = []

        def between(hidden: torch.Tensor) -> torch.Tensor:
            if not made:
                made.append(self.choose(group))
            return _left(hidden, made[0])

        return between


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
        **kwargs: Any,
    ) -> Any:
        """Encode images, dropping patches as a pruner says.

        Parameters
        ----------
        pixel_values : Tensor (I, 3, height, width)
        pruner : Pruner, optional
            None: the stock forward and output.
        plan : PruningPlan, optional
            What the pruner planned; needed with it.
        feature_layers : sequence of int, default (-2,)
            Which hidden states become features, counted as `hidden_states` does: 0 is the embedding output.
        to_the_top : bool, default True
            Whether CLIP's embedding of the image is needed; otherwise the tower ends where nothing above is.
        scores : list of GroupScores, optional
            Each group's decision is appended.

        Returns
        -------
        PrunedVisionOutput, or the stock output without a `pruner`.
        """
        if pruner is None or plan is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        hidden = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden = self.pre_layrnorm(hidden)
        layers = self.encoder.layers
        for layer in feature_layers:
            if not -len(layers) <= layer + 1 <= len(layers) + 1:
                raise ValueError(
                    f"vision_feature_layer={layer}; the tower has hidden states {-len(layers) - 1} to {len(layers)}."
                )
        wanted = {layer % (len(layers) + 1) for layer in feature_layers}
        patches = torch.arange(hidden.shape[1] - 1, device=hidden.device).expand(hidden.shape[0], -1)
        now = _Pass(pruner, patches, scores, {0: hidden} if 0 in wanted else {})
        before = (patches.shape[1], *(group.keep for group in plan.tower))
        tops = {group.last: group for group, tokens in zip(plan.tower, before, strict=False) if group.keep < tokens}
        members = {index: group for group in tops.values() for index in range(group.first, group.last + 1)}
        watched = {layer % len(layers): AttentionRecord(reference_only=True) for layer in pruner.needs.recorded_layers}
        end = len(layers) if to_the_top else max({*wanted, *(last + 1 for last in (*tops, *watched))})
        for index, layer in enumerate(layers[:end]):
            options: dict[str, Any] = {}
            if (group := members.get(index)) is not None:
                now.records.append(pruner.record(group, index))
                options["record"] = now.records[-1]
            elif index in watched:
                options["record"] = watched[index]
            top = tops.get(index)
            if top is not None and top.middle:
                options["between"] = now.dropping(top)
            hidden = layer(hidden, now.bias(hidden), **options, **kwargs)
            if top is not None and not top.middle:
                hidden = now.dropping(top)(hidden)
            if index + 1 in wanted:
                now.features[index + 1] = hidden
        ordered = [now.features[layer % (len(layers) + 1)] for layer in feature_layers]
        return PrunedVisionOutput(
            features=ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=-1),
            patches=now.patches,
            pooler_output=self.post_layernorm(hidden[:, 0]) if to_the_top else None,
            records={layer: watched[layer % len(layers)] for layer in pruner.needs.recorded_layers},
        )


def _left(hidden: torch.Tensor, choice: Choice) -> torch.Tensor:
    """CLS and what a choice leaves of patches: (I, 1 + k, d) to (I, 1 + k', d)."""
    if choice.mixture is None:
        index = nn.functional.pad(choice.kept.to(hidden.device) + 1, (1, 0))
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return torch.cat([hidden[:, :1], choice.of(hidden[:, 1:])], 1)
