"""Attention with observers: the pseudo CLS looks on without being seen (IVTP Sec. 3.3).

An *observer* is one more token per image that runs through the pruned layers after the others. It attends to what
stands before the end of its image and to itself; nothing attends to it, and it enters neither cache nor output. Only
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
from .rollout import AttentionRecord, DecoderAttentionRecord
from .visual_sequence import VisualSequence


def visibility(sequence: VisualSequence, past: int, past_mask: torch.Tensor | None) -> torch.Tensor:
    """What observers and visual tokens see: bool (B, M, 1 + k, past + reach + M)."""
    columns = sequence.columns
    last_seen = past + torch.cat([columns[..., -1:], columns], 2)
    visible = torch.arange(past + sequence.reach, device=columns.device) <= last_seen[..., None]
    if past_mask is not None or sequence.valid is not None:
        known = torch.ones(columns.shape[0], past + sequence.reach, dtype=torch.bool, device=columns.device)
        if past_mask is not None:
            known[:, :past] = past_mask
        if sequence.valid is not None:
            known[:, past:] = sequence.valid[:, : sequence.reach]
        visible = visible & known[:, None, None]
    observers = columns.shape[1]
    itself = torch.zeros(observers, columns.shape[2] + 1, observers, dtype=torch.bool, device=columns.device)
    itself[:, 0] = torch.eye(observers, dtype=torch.bool, device=columns.device)
    return torch.cat([visible, itself.expand(columns.shape[0], -1, -1, -1)], 3)


@dataclass(frozen=True)
class PseudoCLSAttention:
    """What the attention of a layer needs for the observers, and where it leaves what rollout needs.

    The observers see, and are counted among, the first `reach` keys followed by the observers themselves.

    Attributes
    ----------
    reach : int
        Keys of the cache and the sequence up to the end of the last image.
    columns : int64 Tensor (B, M, k)
        The visual tokens' columns in the sequence.
    places : int64 Tensor (B, M, 1 + k)
        Where each observer, first, and its visual tokens are among the keys.
    visible : bool Tensor (B, M, 1 + k, reach + M)
        What they see.
    record : AttentionRecord or None
        None where the group drops nothing.
    """

    reach: int
    columns: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor
    record: AttentionRecord | None = None

    @classmethod
    def of(cls, sequence: VisualSequence, past: int, past_mask: torch.Tensor | None) -> "PseudoCLSAttention":
        """For layers that have `past` entries of which `past_mask` (bool (B, past) or None: all) are tokens."""
        reach, observers = past + sequence.reach, sequence.columns.shape[1]
        # An image that a row does not have stands after the end.
        there = sequence.columns.clamp_max(sequence.size - 1)
        own = reach + torch.arange(observers, device=there.device)
        places = torch.cat([own[None, :, None].expand(*there.shape[:2], 1), past + there], 2)
        return cls(reach, there, places.clamp_max(reach + observers - 1), visibility(sequence, past, past_mask))

    @property
    def count(self) -> int:
        """Observers of a row, M."""
        return self.columns.shape[1]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        observer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        new_value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The observers' attention output (B, M, H, dh); fills the record on the way.

        Parameters
        ----------
        query : Tensor (B, H, n, dh)
            Of the sequence.
        key, value : Tensor (B, H_kv, at least reach, dh)
            Of cache and sequence.
        observer : tuple of Tensor (B, H, M, dh), (B, H_kv, M, dh), (B, H_kv, M, dh)
            The observers' own query, key and value.
        new_value : Tensor (B, H_kv, n, dh)
            Values of the sequence alone.
        scale : float
        """
        own_query, own_key, own_value = observer
        keys = torch.cat([key[:, :, : self.reach], own_key], 2)
        values = torch.cat([value[:, :, : self.reach], own_value], 2)
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
                self._fill(query, keys, own_query, new_value, visible, scale)
        return output.transpose(1, 2)

    def _fill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        own_query: torch.Tensor,
        new_value: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
    ) -> None:
        assert self.record is not None
        columns = self.columns.to(query.device)
        tracked = own_query[:, :, :, None]
        if not self.record.reference_only:
            index = columns.flatten(1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            visual = query.gather(2, index).unflatten(2, columns.shape[1:])
            tracked = torch.cat([tracked, visual], 3)
        self.record.fill(
            query=tracked,
            key=keys,
            visible=visible[:, :, : tracked.shape[3]],
            columns=self.places.to(query.device),
            value=new_value,
            value_columns=columns,
            scale=scale,
        )


class GroupedAttention:
    """Mixin for attention of LLaMA's layout: also serves pseudo-CLS tokens or a record when one is passed."""

    def forward(
        self, *args: Any, record: PseudoCLSAttention | DecoderAttentionRecord | None = None, **kwargs: Any
    ) -> Any:
        """As the stock attention; with an `record`, which is filled, for the observers too."""
        # Every layer of every decoding step comes through here, so that nothing else is looked at.
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
        observer = (query[:, :, tokens:], key[:, :, tokens:], value[:, :, tokens:])
        query, key, new_value = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
        value = new_value
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
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
            observed = record.attend(query, key, value, observer, new_value, attention.scaling)
        if observed is not None:
            output = torch.cat([output, observed], 1)
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return attention.o_proj(output), weights
