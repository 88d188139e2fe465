"""Stage 2: a decoder of LLaMA's layout that drops visual tokens under the eyes of a pseudo CLS (IVTP Sec. 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model

from .group_rollout import AttentionRecord, GroupScores, decide
from .observed_attention import Observation, ObservedAttention, visibility
from .pruned_cache import is_pruned, layer_segments, padding_mask, padding_mask_with, past_valid, prepare_layers
from .token_budget import Group
from .visual_sequence import VisualSequence


@dataclass
class VisualPrompt:
    """The visual tokens of a prompt and how the decoder is to prune them.

    Attributes
    ----------
    sequence : VisualSequence
        The prompt as it comes from the vision tower; after the forward pass, what was left in the end.
    reference : Tensor (B, M, d)
        The pseudo CLS of each image, an input embedding (Eq. 8).
    end_positions : int64 Tensor (B, M)
        RoPE position of the first token after each image.
    key_tokens : bool Tensor (B, M, S) or None
        For pooling anew at each layer: the logical columns to pool. None: the pseudo CLS propagates.
    groups : tuple of Group
    aggregation : str
        See `group_rollout.aggregate`.
    compact : bool
        Renumber positions without gaps.
    scores : list of GroupScores or None
        Each group's decision is appended.
    """

    sequence: VisualSequence
    reference: torch.Tensor
    end_positions: torch.Tensor
    key_tokens: torch.Tensor | None
    groups: tuple[Group, ...]
    aggregation: str = "rollout"
    compact: bool = False
    scores: list[GroupScores] | None = None


class GroupedDecoder:
    """Mixin for decoder models of LLaMA's layout that drops visual tokens at the top of each group of layers.

    Modules and weights are those of the stock class. Without a `visual` prompt and with an unpruned cache, the stock
    forward runs.
    """

    attention_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        # The class is changed in place: building the attention anew would allocate every weight a second time.
        for layer in self.layers:  # type: ignore[attr-defined]
            layer.self_attn.__class__ = self.attention_class

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        visual: VisualPrompt | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder, dropping visual tokens if a `visual` prompt is given.

        Parameters
        ----------
        input_ids, inputs_embeds, position_ids, past_key_values, use_cache
            As in transformers. With `visual`, `inputs_embeds` (B, n, d) holds the tokens that `visual.sequence` left,
            while `position_ids` (B or 1, S) and the mask still speak of the whole prompt.
        attention_mask : Tensor (B, past + S), dict or None
            With a pruned cache also the masks that `masks_for_pruned_cache` made.
        visual : VisualPrompt, optional

        Returns
        -------
        BaseModelOutputWithPast
            `last_hidden_state` (B, S, d): zero where a token was dropped.

        Raises
        ------
        ValueError
            For what pruning cannot serve: a 4D mask, `output_attentions`, a cache of another kind, a sliding window
            shorter than the sequence.
        """
        if visual is None and not is_pruned(past_key_values):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        model: Any = self
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = model.embed_tokens(input_ids)
        assert inputs_embeds is not None
        self._refuse(attention_mask, kwargs)
        wanted = kwargs.pop("output_hidden_states", None)
        wanted = getattr(model.config, "output_hidden_states", False) if wanted is None else wanted
        use_cache = model.config.use_cache if use_cache is None else use_cache
        if model.training and getattr(model, "gradient_checkpointing", False):
            use_cache, past_key_values = False, None  # as transformers does: the backward pass would write it again
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=model.config)
        logical = inputs_embeds.shape[1] if visual is None else visual.sequence.length
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self._check_window(past, logical)
        if position_ids is None:
            position_ids = (torch.arange(logical, device=inputs_embeds.device) + past)[None]
        states: list[torch.Tensor] | None = [] if wanted else None
        if visual is None:
            hidden = self._continue(inputs_embeds, attention_mask, position_ids, past_key_values, states, kwargs)
        else:
            hidden = self._prune(inputs_embeds, attention_mask, position_ids, past_key_values, visual, states, kwargs)
        hidden = model.norm(hidden)
        if visual is not None:
            hidden = visual.sequence.restore(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=None if states is None else (*states, hidden),
        )

    def masks_for_pruned_cache(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
    ) -> dict[int, Any]:
        """The 4D masks of a decoding step, keyed by the first layer of each run of layers that share one.

        Parameters
        ----------
        inputs_embeds : Tensor (B, q, any)
            For its shape, dtype and device.
        attention_mask : Tensor (B, logical length) or None
        cache : Cache
            A pruned one.
        """
        return {
            first: self._causal_mask(
                inputs_embeds, padding_mask(cache.layers[first], attention_mask, inputs_embeds.shape[1]), cache, first
            )
            for first, _ in layer_segments(cache)
        }

    def _continue(
        self,
        hidden: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor,
        cache: Any,
        states: list[torch.Tensor] | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Tokens behind a pruned prompt: nothing is dropped, but masks and positions differ between layers."""
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.masks_for_pruned_cache(hidden, attention_mask, cache)
        rotary, known_shift = None, None
        for first, last in layer_segments(cache):
            shift = cache.layers[first].layout.position_shift
            if rotary is None or shift is not known_shift:
                positions = position_ids if shift is None else position_ids - shift.to(position_ids.device)
                rotary, known_shift = self.rotary_emb(hidden, position_ids=positions), shift  # type: ignore[attr-defined]
            for index in range(first, last + 1):
                if states is not None:
                    states.append(hidden)
                hidden = self._layer(index, hidden, masks[first], rotary, cache, kwargs)
        return hidden

    def _prune(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        visual: VisualPrompt,
        states: list[torch.Tensor] | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The prompt: group after group, each on what the one before left."""
        model: Any = self
        if cache is not None:
            past = int(cache.get_seq_length())
            known = None if attention_mask is None or past == 0 else attention_mask[:, :past].bool()
            prepare_layers(cache, len(model.layers), known)
        position_ids = position_ids.expand(tokens.shape[0], -1)
        valid = None if attention_mask is None else attention_mask[:, -visual.sequence.length :]
        observers = visual.reference.to(tokens.dtype)
        pruned = visual.groups[-1].last + 1 if visual.groups else 0
        spans: list[tuple[int, int, Group | None]] = [(group.first, group.last, group) for group in visual.groups]
        spans.append((pruned, len(model.layers) - 1, None))
        for first, last, group in spans:
            sequence = visual.sequence
            drops = group is not None and group.keep < sequence.patches.shape[2]
            records: list[AttentionRecord] = []
            for start, stop in _segments(cache, first, last):
                layout = None if cache is None else cache.layers[start].layout
                layer: Any = None if cache is None else cache.layers[start]
                entries = 0 if layer is None else layer.entries
                before = None if layer is None else past_valid(layer, attention_mask)
                for index in range(start, stop + 1) if cache is not None else ():
                    cache.layers[index].leave_out(sequence.length - sequence.size)  # type: ignore[union-attr]
                positions, ends, fewer = _positions(visual, position_ids, valid, layout)
                padding = sequence.valid
                if layer is not None:
                    padding = padding_mask_with(layer, before, sequence.valid, sequence.size)
                mask = self._causal_mask(tokens, padding, cache, start)
                seen = None
                if group is not None:
                    positions = torch.cat([positions, ends], 1)
                    seen = visibility(sequence, entries, before)
                rotary = model.rotary_emb(tokens, position_ids=positions)
                for index in range(start, stop + 1):
                    if states is not None:
                        states.append(sequence.restore(tokens))
                    if group is None:
                        tokens = self._layer(index, tokens, mask, rotary, cache, kwargs)
                        continue
                    if visual.key_tokens is not None:
                        observers = _pooled(tokens, observers, visual.key_tokens, sequence)
                    record = None
                    if drops:
                        top = index == last or visual.aggregation != "rollout"
                        record = AttentionRecord(reference_only=top)
                        records.append(record)
                    observation = Observation(entries + sequence.reach, entries, sequence.columns, seen, record)  # type: ignore[arg-type]
                    observers = observers.to(tokens.device)
                    both = torch.cat([tokens, observers], 1)
                    both = self._layer(index, both, mask, rotary, cache, kwargs | {"observation": observation})
                    tokens, observers = both.split([tokens.shape[1], observers.shape[1]], 1)
                if cache is not None:
                    grown = layout.extended(  # type: ignore[union-attr]
                        entries, before, sequence.length, sequence.valid, sequence.tail, sequence.size, fewer
                    )
                    for index in range(start, stop + 1):
                        cache.layers[index].layout = grown
            if drops:
                assert group is not None
                tokens = _drop(tokens, visual, group, records)
        return tokens

    def _layer(
        self, index: int, hidden: torch.Tensor, mask: Any, rotary: Any, cache: Cache | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # No position_ids: gaps in them would be read as packed sequences by flash attention.
        return self.layers[index](  # type: ignore[attr-defined]
            hidden,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=None,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )

    def _causal_mask(self, hidden: torch.Tensor, padding: torch.Tensor | None, cache: Cache | None, layer: int) -> Any:
        return create_causal_mask(
            config=self.config,  # type: ignore[attr-defined]
            inputs_embeds=hidden,
            attention_mask=padding,
            past_key_values=cache,
            position_ids=None,
            layer_idx=layer,
        )

    def _refuse(self, attention_mask: Any, kwargs: dict[str, Any]) -> None:
        config: Any = self.config  # type: ignore[attr-defined]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                f"Pruning changes which keys a layer has, so attention_mask must be 2D (batch, length), not "
                f"{attention_mask.dim()}D; pass the 2D mask, or switch pruning off for a custom mask."
            )
        asked = kwargs.get("output_attentions")
        if config.output_attentions if asked is None else asked:
            raise ValueError(
                "output_attentions=True: under pruning each layer's attention map has another size. Use "
                "model.explain(...) to see what was kept and why, or switch pruning off: model.pruning(enabled=False)."
            )
        if getattr(config, "_attn_implementation", None) == "flex_attention":
            raise ValueError('attn_implementation="flex_attention" is not supported under pruning; use "sdpa".')

    def _check_window(self, past: Any, new: int) -> None:
        window = getattr(self.config, "sliding_window", None)  # type: ignore[attr-defined]
        if window is not None and isinstance(past, int) and past + new > window:
            raise ValueError(
                f"The sequence has {past + new} tokens and the decoder's sliding window {window}: pruning supports "
                "sequences up to the window. Shorten the prompt, or switch pruning off: model.pruning(enabled=False)."
            )


def _segments(cache: Cache | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Layers `first` to `last`, cut where the layout changes: an earlier turn may have been pruned otherwise."""
    if cache is None:
        yield from [(first, last)] if first <= last else []
        return
    start = first
    for index in range(first, last + 1):
        if index == last or cache.layers[index + 1].layout is not cache.layers[start].layout:
            yield start, index
            start = index + 1


def _positions(
    visual: VisualPrompt, position_ids: torch.Tensor, valid: torch.Tensor | None, layout: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """RoPE positions of the sequence (B, n) and the observers (B, M), and how many tokens each row lost (B, 1)."""
    sequence = visual.sequence
    positions = sequence.at_slots(position_ids)
    if not visual.compact:
        return positions, visual.end_positions, None
    there = torch.ones_like(position_ids) if valid is None else valid.long().expand_as(position_ids)
    given = there.cumsum(1) - 1
    now = torch.arange(sequence.size, device=positions.device).expand_as(positions)
    if sequence.valid is not None:
        now = sequence.valid.long().cumsum(1) - 1
    positions = positions - (sequence.at_slots(given) - now)
    if layout is not None and layout.position_shift is not None:
        positions = positions - layout.position_shift.to(positions.device)
    positions = positions.clamp_min(0)
    last_patch = sequence.columns[..., -1].clamp_max(sequence.size - 1)
    return positions, positions.gather(1, last_patch) + 1, given[:, -1:] - now[:, -1:]


def _pooled(
    tokens: torch.Tensor, observers: torch.Tensor, key_tokens: torch.Tensor, sequence: VisualSequence
) -> torch.Tensor:
    """The mean of the key tokens' hidden states, (B, M, d); an image without key tokens keeps its observer."""
    chosen = sequence.at_slots(key_tokens)
    if sequence.valid is not None:
        chosen = chosen & sequence.valid[:, None]
    chosen = chosen.to(tokens.device)
    weight = chosen.float() / chosen.sum(-1, keepdim=True).clamp_min(1)
    pooled = (weight @ tokens.float()).to(tokens.dtype)
    return torch.where(chosen.any(-1, keepdim=True), pooled, observers.to(tokens.device))


def _drop(tokens: torch.Tensor, visual: VisualPrompt, group: Group, records: list[AttentionRecord]) -> torch.Tensor:
    """Score a group, and leave the tokens (B, n', d) that stay; `visual.sequence` moves along."""
    sequence = visual.sequence
    weights, kept = decide(records, visual.aggregation, group.keep)
    kept = kept.to(sequence.patches.device)
    if visual.scores is not None:
        chosen = sequence.patches.gather(2, kept)
        visual.scores.append(GroupScores("decoder", group, sequence.patches, weights, chosen))
    visual.sequence, index = sequence.keep(kept)
    return tokens.gather(1, index.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1]))


class ObservedLlamaAttention(ObservedAttention, LlamaAttention):
    """LLaMA's attention with observers."""


class GroupedLlamaModel(GroupedDecoder, LlamaModel):
    """`LlamaModel` with pruning."""

    attention_class = ObservedLlamaAttention


class ObservedMistralAttention(ObservedAttention, MistralAttention):
    """Mistral's attention with observers."""


class GroupedMistralModel(GroupedDecoder, MistralModel):
    """`MistralModel` with pruning."""

    attention_class = ObservedMistralAttention


class ObservedQwen2Attention(ObservedAttention, Qwen2Attention):
    """Qwen2's attention with observers."""


class GroupedQwen2Model(GroupedDecoder, Qwen2Model):
    """`Qwen2Model` with pruning."""

    attention_class = ObservedQwen2Attention


DECODERS: dict[str, Any] = {
    "llama": GroupedLlamaModel,
    "mistral": GroupedMistralModel,
    "qwen2": GroupedQwen2Model,
}
