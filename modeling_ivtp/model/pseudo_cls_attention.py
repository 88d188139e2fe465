"""Attention with pseudo-CLS tokens, which attend to others and are never attended to (IVTP Sec. 3.3).

Each image has one pseudo-CLS token. It runs through the pruned layers after the other tokens and attends to what stands
before the end of its image, and to itself. Nothing attends to it, and it enters neither the cache nor the output. Only
its own attention is computed apart, so the other tokens keep their fast causal kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward, repeat_kv

from .compat import one_cache
from .labels import SCORE, label
from .masked_attention import masked_attention
from .rollout import AttentionRecord, DecoderAttentionRecord
from .visual_sequence import VisualSequence


def visible_keys(sequence: VisualSequence, past: int, past_valid: torch.Tensor | None) -> torch.Tensor:
    """Mark the keys that each pseudo-CLS token, first, and its visual tokens attend to.

    Parameters
    ----------
    sequence : VisualSequence
    past : int
        Entries of the cache before the prompt.
    past_valid : bool Tensor (B, past) or None
        Which of them are tokens of their row. None: all.

    Returns
    -------
    bool Tensor (B, M, 1 + k, past + image_end + M)
        Keys of cache and sequence up to the end of the last image, then those of the pseudo-CLS tokens.
    """
    columns = sequence.columns
    last_key = past + torch.cat([columns[..., -1:], columns], 2)
    visible = torch.arange(past + sequence.image_end, device=columns.device) <= last_key[..., None]
    if past_valid is not None or sequence.valid is not None:
        valid = torch.ones(columns.shape[0], past + sequence.image_end, dtype=torch.bool, device=columns.device)
        if past_valid is not None:
            valid[:, :past] = past_valid
        if sequence.valid is not None:
            valid[:, past:] = sequence.valid[:, : sequence.image_end]
        visible = visible & valid[:, None, None]
    images = columns.shape[1]
    itself = torch.zeros(images, columns.shape[2] + 1, images, dtype=torch.bool, device=columns.device)
    itself[:, 0] = torch.eye(images, dtype=torch.bool, device=columns.device)
    return torch.cat([visible, itself.expand(columns.shape[0], -1, -1, -1)], 3)


@dataclass(frozen=True)
class PseudoCLSAttention:
    """A layer's attention for the pseudo-CLS tokens, which also fills the record that rollout needs.

    Their keys are the first `image_end` ones of cache and sequence, followed by their own.

    Attributes
    ----------
    image_end : int
        Keys of the cache and the sequence up to the end of the last image.
    visual_columns : int64 Tensor (B, M, k)
        The visual tokens' columns in the sequence.
    tracked_columns : int64 Tensor (B, M, 1 + k)
        Where each pseudo-CLS token, first, and its visual tokens stand among the keys.
    visible : bool Tensor (B, M, 1 + k, image_end + M)
        Which keys they attend to.
    record : AttentionRecord or None
        None where the group drops nothing.
    """

    image_end: int
    visual_columns: torch.Tensor
    tracked_columns: torch.Tensor
    visible: torch.Tensor
    record: AttentionRecord | None = None

    weights = None
    """Weights of keys: none, all count alike."""

    @classmethod
    def of(cls, sequence: VisualSequence, past: int, past_valid: torch.Tensor | None) -> "PseudoCLSAttention":
        """Make it for layers with `past` entries, those of which are tokens that `past_valid` (B, past) marks."""
        image_end, images = past + sequence.image_end, sequence.columns.shape[1]
        # An image that a row does not have stands after the end.
        columns = sequence.columns.clamp_max(sequence.size - 1)
        own = image_end + torch.arange(images, device=columns.device)
        tracked = torch.cat([own[None, :, None].expand(*columns.shape[:2], 1), past + columns], 2)
        tracked = tracked.clamp_max(image_end + images - 1)
        return cls(image_end, columns, tracked, visible_keys(sequence, past, past_valid))

    @property
    def count(self) -> int:
        """Pseudo-CLS tokens of a row, M."""
        return self.visual_columns.shape[1]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pseudo_cls: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        new_value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the pseudo-CLS tokens' attention output (B, M, H, dh) and fill the record.

        Parameters
        ----------
        query : Tensor (B, H, n, dh)
            Of the sequence.
        key, value : Tensor (B, H_kv, at least image_end, dh)
            Of cache and sequence.
        pseudo_cls : tuple of Tensor (B, H, M, dh), (B, H_kv, M, dh), (B, H_kv, M, dh)
            The pseudo-CLS tokens' query, key and value.
        new_value : Tensor (B, H_kv, n, dh)
            Values of the sequence alone.
        scale : float
            Factor of the products of queries and keys.
        """
        own_query, own_key, own_value = pseudo_cls
        keys = torch.cat([key[:, :, : self.image_end], own_key], 2)
        values = torch.cat([value[:, :, : self.image_end], own_value], 2)
        visible = self.visible.to(query.device)
        repeats = own_query.shape[1] // keys.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            own_query,
            repeat_kv(keys, repeats),
            repeat_kv(values, repeats),
            attn_mask=visible[:, None, :, 0],
            scale=scale,
        )
        if self.record is not None:
            with torch.no_grad():
                self._fill(self.record, query, keys, own_query, new_value, visible, scale)
        return output.transpose(1, 2)

    def _fill(
        self,
        record: AttentionRecord,
        query: torch.Tensor,
        keys: torch.Tensor,
        own_query: torch.Tensor,
        new_value: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
    ) -> None:
        columns = self.visual_columns.to(query.device)
        tracked = own_query[:, :, :, None]
        if not record.reference_only:
            index = columns.flatten(1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            visual = query.gather(2, index).unflatten(2, columns.shape[1:])
            tracked = torch.cat([tracked, visual], 3)
        record.fill(
            query=tracked,
            key=keys,
            visible=visible[:, :, : tracked.shape[3]],
            columns=self.tracked_columns.to(query.device),
            value=new_value,
            value_columns=columns,
            scale=scale,
        )


class GroupedAttention:
    """Mixin for attention of LLaMA's layout that also serves pseudo-CLS tokens, or fills a record."""

    def forward(
        self, *args: Any, record: PseudoCLSAttention | DecoderAttentionRecord | None = None, **kwargs: Any
    ) -> Any:
        """Run the stock attention, or with a `record` fill it and attend for the pseudo-CLS tokens, too."""
        # Every layer of every decoding step comes through here, so nothing else is checked.
        if record is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._attend_and_record(record, *args, **kwargs)

    def _attend_and_record(
        self,
        record: PseudoCLSAttention | DecoderAttentionRecord,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the attention on tokens (B, n + M, d), of which the last M are pseudo-CLS tokens."""
        attention: Any = self
        cache = one_cache(cache, past_key_values)
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        query = attention.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = attention.v_proj(hidden_states).view(shape).transpose(1, 2)
        if query.shape[1] != attention.config.num_attention_heads:
            raise ValueError(
                f"This layer has {query.shape[1]} of {attention.config.num_attention_heads} heads: pruning does not "
                'support tensor parallelism (tp_plan). Use device_map="auto", or model.pruning(enabled=False).'
            )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        tokens = query.shape[2] - record.count
        pseudo_cls = (query[:, :, tokens:], key[:, :, tokens:], value[:, :, tokens:])
        query, key, new_value = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
        value = new_value
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        if record.weights is not None:
            attend, kwargs = masked_attention, {"weights": record.weights}
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **kwargs,
        )
        with label(SCORE):
            pseudo_cls_output = record.attend(query, key, value, pseudo_cls, new_value, attention.scaling)
        if pseudo_cls_output is not None:
            output = torch.cat([output, pseudo_cls_output], 1)
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return attention.o_proj(output), weights
