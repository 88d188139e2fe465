"""Stage 1: CLIP's vision tower with group-wise token pruning (IVTP Sec. 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionModel, eager_attention_forward

from .group_rollout import AttentionRecord, GroupScores, decide
from .token_budget import Group


@dataclass
class PrunedVisionOutput:
    """What the pruned tower hands on.

    Attributes
    ----------
    features : Tensor (I, 1 + k, D)
        CLS and kept patches at the feature layer(s), several layers side by side.
    patches : int64 Tensor (I, k)
        Kept patches, 0 to N - 1 on the original grid, ascending.
    pooler_output : Tensor (I, d)
        The last layer's CLS after `post_layernorm`.
    """

    features: torch.Tensor
    patches: torch.Tensor
    pooler_output: torch.Tensor


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
            value_norm=value[:, None, :, 1:].float().square().sum((2, 4)).sqrt(),
            scale=self.scale,
        )
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


class GroupedCLIPVisionModel(CLIPVisionModel):
    """`CLIPVisionModel` that drops patches at the top of each group of layers.

    Its modules and weights are those of the stock class. Called without `groups` it is the stock class.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The class is changed in place: building the attention anew would allocate every weight a second time.
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = GroupedCLIPAttention

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        groups: tuple[Group, ...] | None = None,
        feature_layers: Sequence[int] = (-2,),
        aggregation: str = "rollout",
        scores: list[GroupScores] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images, dropping patches if `groups` are given.

        Parameters
        ----------
        pixel_values : Tensor (I, 3, height, width)
        groups : tuple of Group, optional
            None: the stock forward and output. Empty: nothing is dropped, but the output is the pruned one's.
        feature_layers : sequence of int, default (-2,)
            Which hidden states become features, counted as `hidden_states` does: 0 is the embedding output.
        aggregation : str, default "rollout"
            See `group_rollout.aggregate`.
        scores : list of GroupScores, optional
            Each group's decision is appended.

        Returns
        -------
        PrunedVisionOutput, or the stock output without `groups`.
        """
        if groups is None:
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
        features: dict[int, torch.Tensor] = {0: hidden} if 0 in wanted else {}
        before = (patches.shape[1], *(group.keep for group in groups))
        tops = {group.last: group for group, tokens in zip(groups, before, strict=False) if group.keep < tokens}
        members = {index: group for group in tops.values() for index in range(group.first, group.last + 1)}
        records: list[AttentionRecord] = []
        for index, layer in enumerate(layers):
            if (group := members.get(index)) is None:
                hidden = layer(hidden, None, **kwargs)
            else:
                records.append(AttentionRecord(reference_only=index == group.last or aggregation != "rollout"))
                hidden = layer(hidden, None, record=records[-1], **kwargs)
            if index + 1 in wanted:
                features[index + 1] = hidden
            if index not in tops:
                continue
            weights, kept = (decided[:, 0] for decided in decide(records, aggregation, tops[index].keep))
            if scores is not None:
                scores.append(GroupScores("tower", tops[index], patches, weights, patches.gather(1, kept)))
            records = []
            patches = patches.gather(1, kept)
            with_cls = nn.functional.pad(kept + 1, (1, 0))
            hidden = _take(hidden, with_cls)
            features = {at: _take(feature, with_cls) for at, feature in features.items()}
        ordered = [features[layer % (len(layers) + 1)] for layer in feature_layers]
        return PrunedVisionOutput(
            features=ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=-1),
            patches=patches,
            pooler_output=self.post_layernorm(hidden[:, 0]),
        )


def _take(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `hidden` (I, n, d) at `index` (I, k)."""
    return hidden.gather(1, index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
