"""Stage 2: a decoder of LLaMA's cache_index that drops visual tokens under the eyes of a pseudo CLS (IVTP Sec. 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model

from .compat import CACHE, one_cache
from .labels import CHOOSE, label
from .pruned_cache import (
    allocate,
    cache_spans,
    is_pruned,
    key_value_shape,
    layer_segments,
    padding_mask,
    prepare_layers,
)
from .pruner import DecoderStep, Pruner, full_precision
from .pseudo_cls_attention import GroupedAttention, PseudoCLSAttention
from .rollout import AttentionRecord, DecoderAttentionRecord, GroupScores
from .schedule import Group, PruningPlan
from .text_relevance import pseudo_cls
from .visual_sequence import VisualSequence


@dataclass
class VisualPrompt:
    """The visual tokens of a prompt and how the decoder is to prune them.

    Attributes
    ----------
    sequence : VisualSequence
        The prompt as it comes to the decoder.
    pruner : Pruner
        What chooses.
    groups : tuple of Group
        At the tops of which it is asked.
    state : any
        What the pruner prepared.
    scores : list of GroupScores or None
        Each group's decision is appended.
    reference : Tensor (B, M, d) or None
        The pseudo CLS of each image, an input embedding (Eq. 8), where the pruner observes.
    end_positions : int64 Tensor (B, M) or None
        RoPE position of the first token after each image, likewise.
    key_tokens : bool Tensor (B, M, S) or None
        For pooling anew at each layer: the logical columns to pool. None: the pseudo CLS propagates.
    """

    sequence: VisualSequence
    pruner: Pruner
    groups: tuple[Group, ...]
    state: Any = None
    scores: list[GroupScores] | None = None
    reference: torch.Tensor | None = None
    end_positions: torch.Tensor | None = None
    key_tokens: torch.Tensor | None = None

    def stages(self, layers: int) -> Iterator[tuple[int, int, Group | None]]:
        """All layers of the decoder: the groups, and without one what lies between and above them."""
        start = 0
        for group in self.groups:
            if start < group.first:
                yield start, group.first - 1, None
            yield group.first, group.last, group
            start = group.last + 1
        yield start, layers - 1, None


@dataclass
class PrunedDecoderOutput(BaseModelOutputWithPast):
    """The decoder's output, and which columns of the prompt went through all of it.

    Attributes
    ----------
    kept_tokens : bool Tensor (B, S) or None
        None: all did.
    """

    kept_tokens: torch.Tensor | None = None


@dataclass
class Numbering:
    """RoPE positions of what is left of a prompt.

    Attributes
    ----------
    position_ids : int64 Tensor (B, S)
        Of the whole prompt.
    valid : Tensor (B, S) or None
        The 2D mask of the prompt.
    ends : int64 Tensor (B, M) or None
        Position of the first token after each image, where observers need it.
    compact : bool
        Renumber without gaps.
    """

    position_ids: torch.Tensor
    valid: torch.Tensor | None
    ends: torch.Tensor | None
    compact: bool

    def of(
        self, sequence: VisualSequence, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Positions of the sequence (B, n) and of its observers (B, M), and how far the row's end moved down (B, 1).

        `shift` (B, 1) is what earlier turns moved it down.
        """
        positions, ends = sequence.at_slots(self.position_ids), self.ends
        if shift is not None:
            positions = positions - shift.to(positions.device)
            ends = None if ends is None else ends - shift.to(ends.device)
        if not self.compact:
            return positions.clamp_min(0), ends, None
        there = torch.ones_like(self.position_ids) if self.valid is None else self.valid.long()
        given = there.cumsum(1) - 1
        now = torch.arange(sequence.size, device=positions.device).expand_as(positions)
        if sequence.valid is not None:
            now = sequence.valid.long().cumsum(1) - 1
        positions = (positions - (sequence.at_slots(given) - now)).clamp_min(0)
        if ends is not None:
            ends = positions.gather(1, sequence.columns[..., -1].clamp_max(sequence.size - 1)) + 1
        return positions, ends, given[:, -1:] - now[:, -1:]


class GroupedDecoder:
    """Mixin for decoder models of LLaMA's cache_index that drops visual tokens at the top of each group of layers.

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
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        visual: VisualPrompt | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder, dropping visual tokens if a `visual` prompt is given.

        Parameters
        ----------
        input_ids, inputs_embeds, position_ids, cache (or past_key_values), use_cache
            As in transformers. With `visual`, `inputs_embeds` (B, n, d) holds the tokens that `visual.sequence` left,
            while `position_ids` (B or 1, S) and the mask still speak of the whole prompt.
        attention_mask : Tensor (B, past + S), dict or None
            With a pruned cache also the masks that `masks_for_pruned_cache` made.
        visual : VisualPrompt, optional

        Returns
        -------
        PrunedDecoderOutput
            `last_hidden_state` (B, S, d), as `VisualSequence.restore` puts it back. Stock output on the stock path.

        Raises
        ------
        ValueError
            For what pruning cannot serve: a 4D mask, `output_attentions`, a cache of another kind, a sliding window
            shorter than the sequence.
        """
        cache = one_cache(cache, past_key_values)
        if visual is None and not is_pruned(cache):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: cache},
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
            if visual is None:
                raise ValueError(
                    "Gradient checkpointing leaves out the cache, and what this prompt is about is in there: train on "
                    "whole conversations, or disable it with gradient_checkpointing_disable()."
                )
            use_cache, cache = False, None  # as transformers does: the backward pass would write it again
        if use_cache and cache is None:
            cache = DynamicCache(config=model.config)
        logical = inputs_embeds.shape[1] if visual is None else visual.sequence.length
        past = 0 if cache is None else cache.get_seq_length()
        self._check_window(past, logical)
        if position_ids is None:
            position_ids = (torch.arange(logical, device=inputs_embeds.device) + past)[None]
        states: list[torch.Tensor] | None = [] if wanted else None
        given = (inputs_embeds, attention_mask, position_ids, cache)
        kept_tokens = None
        if visual is None:
            hidden = model.norm(self._continue(*given, states, kwargs))
        else:
            hidden, sequence = self._prune(*given, visual, states, kwargs)
            hidden, kept_tokens = sequence.restore(model.norm(hidden)), sequence.kept_tokens()
        return PrunedDecoderOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            hidden_states=None if states is None else (*states, hidden),
            kept_tokens=kept_tokens,
        )

    def allocate(self, cache: Cache, plan: PruningPlan, sequence: VisualSequence) -> None:
        """Give an empty static cache the memory that a prompt and what follows it will need; see `allocate`.

        Parameters
        ----------
        cache : Cache
            One that is not static is left alone, and one of a model in several types or places: there a layer finds
            out with its first keys what it has to hold.
        plan : PruningPlan
            One that keeps exact numbers.
        sequence : VisualSequence
            The prompt before anything is dropped.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        held = getattr(cache, "layers", ())
        if not held or not all(isinstance(layer, StaticLayer) for layer in held) or getattr(cache, "offloading", False):
            return
        weights = list(self.parameters())  # type: ignore[attr-defined]
        devices = {weight.device for weight in weights}
        types = {weight.dtype for weight in weights if weight.is_floating_point()}
        if len(devices) != 1 or len(types) != 1:
            return
        device, dtype = devices.pop(), types.pop()
        if device.type == "meta" or torch.is_autocast_enabled(device.type):
            return
        layers = config.num_hidden_layers
        prepare_layers(cache, layers, None, sequence.length)
        entries = [
            max(row.tokens - row.images * (plan.patches - tokens) for row in sequence.rows)
            for tokens in plan.decoder_layer_tokens(layers)
        ]
        heads, head_dim = key_value_shape(config)
        allocate(
            cache,
            entries,
            length=sequence.length,
            heads=heads,
            head_dim=head_dim,
            like=torch.empty(sequence.slots.shape[0], dtype=dtype, device=device),
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
        return self._masks(layer_segments(cache), inputs_embeds, attention_mask, cache)

    def _masks(
        self, segments: list[tuple[int, int]], hidden: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
    ) -> dict[int, Any]:
        new = hidden.shape[1]
        return {
            first: self._causal_mask(hidden, padding_mask(cache.layers[first], attention_mask, new), cache, first)
            for first, _ in segments
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
        """Tokens after a pruned prompt: nothing is dropped, but masks and positions differ between layers."""
        segments = layer_segments(cache)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self._masks(segments, hidden, attention_mask, cache)
        rotary, known_shift = None, None
        layers, options = self._steps(cache, kwargs)
        for first, last in segments:
            shift = cache.layers[first].cache_index.position_shift
            if rotary is None or shift is not known_shift:
                positions = position_ids if shift is None else position_ids - shift.to(position_ids.device)
                rotary, known_shift = self.rotary_emb(hidden, position_ids=positions), shift  # type: ignore[attr-defined]
            for layer in layers[first : last + 1]:
                if states is not None:
                    states.append(hidden)
                hidden = layer(hidden, attention_mask=masks[first], position_embeddings=rotary, **options)
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
    ) -> tuple[torch.Tensor, VisualSequence]:
        """The prompt: group after group, each on what the one before left."""
        model: Any = self
        past = 0
        if cache is not None:
            past = int(cache.get_seq_length())
            known = None if attention_mask is None or past == 0 else attention_mask[:, :past].bool()
            prepare_layers(cache, len(model.layers), known, visual.sequence.length)
        sequence, pruner = visual.sequence, visual.pruner
        observers = None if visual.reference is None else visual.reference.to(tokens.dtype)
        sizes = None
        numbering = Numbering(
            position_ids.expand(tokens.shape[0], -1),
            None if attention_mask is None else attention_mask[:, past : past + sequence.length],
            visual.end_positions,
            pruner.needs.compact_positions,
        )
        layers, options = self._steps(cache, kwargs)
        for first, last, group in visual.stages(len(layers)):
            drops = group is not None and group.keep < sequence.patches.shape[2]
            observed = group is not None and observers is not None
            records: list[AttentionRecord] = []
            decoder_records: list[DecoderAttentionRecord] = []
            both: torch.Tensor | None = None
            for run in cache_spans(cache, first, last, attention_mask):
                mask = self._causal_mask(tokens, run.begin(sequence), cache, run.first)
                positions, ends, renumbered = numbering.of(sequence, run.cache_index.position_shift)
                if observed:
                    assert ends is not None
                    positions = torch.cat([positions, ends], 1)
                rotary = model.rotary_emb(tokens, position_ids=positions)
                seen = PseudoCLSAttention.of(sequence, run.entries, run.past_valid) if observed else None
                where = {"attention_mask": mask, "position_embeddings": rotary, **options}
                for index in range(run.first, run.last + 1):
                    if states is not None:
                        states.append(sequence.restore(tokens))
                    if seen is None:
                        if drops:
                            decoder_records.append(DecoderAttentionRecord(run.entries, run.past_valid, sequence.valid))
                            where["record"] = decoder_records[-1]
                        tokens = layers[index](tokens, **where)
                        continue
                    assert group is not None
                    assert observers is not None
                    if drops:
                        records.append(pruner.record(group, index))
                    record = replace(seen, record=records[-1] if drops else None)
                    if both is None or visual.key_tokens is not None:
                        observers = self._observers(observers, tokens, visual.key_tokens, sequence)
                        both = torch.cat([tokens, observers], 1)
                    both = layers[index](both, record=record, **where)
                    tokens, observers = both.split([tokens.shape[1], observers.shape[1]], 1)
                run.end(sequence, renumbered)
            if drops:
                assert group is not None
                with torch.no_grad(), full_precision(tokens.device), label(CHOOSE):
                    choice = pruner.in_decoder(
                        DecoderStep(group, records, decoder_records, tokens, sequence, sizes, visual.state)
                    )
                watched: list[Any] = [*records, *decoder_records]
                for layer in watched:
                    layer.seal()
                before, sizes = sequence, choice.sizes
                sequence, index_kept = before.keep(choice.kept, choice.ragged)
                if visual.scores is not None:
                    told = before.patches, choice.scores, sequence.patches, choice.mixture
                    visual.scores.append(GroupScores("decoder", group, *told))
                index_kept = index_kept.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1])
                merged = None if choice.mixture is None else choice.of(before.visual(tokens))
                tokens = tokens.gather(1, index_kept)
                if merged is not None:
                    tokens = sequence.with_visual(tokens, merged)
        return tokens, sequence

    @staticmethod
    def _observers(
        observers: torch.Tensor, tokens: torch.Tensor, key_tokens: torch.Tensor | None, sequence: VisualSequence
    ) -> torch.Tensor:
        """What the observers enter a layer as: their own last output, or the key tokens pooled anew (B, M, d)."""
        observers = observers.to(tokens.device)
        if key_tokens is None:
            return observers
        keys = sequence.at_slots(key_tokens)
        if sequence.valid is not None:
            keys = keys & sequence.valid[:, None]
        return pseudo_cls(tokens, keys.to(tokens.device), observers)

    def _steps(self, cache: Cache | None, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The layers, and what all of them are called with: looked up once, as a decoding step takes little longer."""
        # No position_ids: gaps in them would be read as packed sequences by flash attention.
        options = {**kwargs, "position_ids": None, "use_cache": cache is not None, CACHE: cache}
        return list(self.layers), options  # type: ignore[attr-defined]

    def _causal_mask(self, hidden: torch.Tensor, padding: torch.Tensor | None, cache: Cache | None, layer: int) -> Any:
        """The mask of a layer, None where the attention's own causal pattern, or no pattern at all, is right."""
        config: Any = self.config  # type: ignore[attr-defined]
        new = hidden.shape[1]
        if padding is None:
            keys = new if cache is None else cache.layers[layer].get_mask_sizes(new)[0]
            filled = cache is None or not isinstance(cache.layers[layer], StaticLayer)
            if (new == 1 and filled) or (keys == new and config._attn_implementation != "eager"):
                return None
        elif config._attn_implementation == "sdpa" and (cache is None or not _waits(cache.layers[layer])):
            # transformers would look whether anything is padded at all, and wait for the device.
            dropped = 0 if cache is None else cache.layers[layer].cache_index.dropped
            there = padding[:, dropped:].to(hidden.device)
            keys = torch.arange(there.shape[1], device=hidden.device)
            return (keys <= keys[-new:, None]) & there[:, None, None]
        return create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=padding,
            position_ids=None,
            layer_idx=layer,
            **{CACHE: cache},
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
        if window is None or torch.compiler.is_compiling():
            return
        past = int(past)
        if past + new > window:
            raise ValueError(
                f"The sequence has {past + new} tokens and the decoder's sliding window {window}: pruning supports "
                "sequences up to the window. Shorten the prompt, or switch pruning off: model.pruning(enabled=False)."
            )


def _waits(layer: Any) -> bool:
    """Whether only the device knows how many entries a cache layer holds."""
    return isinstance(layer, StaticLayer) and not getattr(layer, "empty", False)


class GroupedLlamaAttention(GroupedAttention, LlamaAttention):
    """LLaMA's attention with observers."""


class GroupedLlamaModel(GroupedDecoder, LlamaModel):
    """`LlamaModel` with pruning."""

    attention_class = GroupedLlamaAttention


class GroupedMistralAttention(GroupedAttention, MistralAttention):
    """Mistral's attention with observers."""


class GroupedMistralModel(GroupedDecoder, MistralModel):
    """`MistralModel` with pruning."""

    attention_class = GroupedMistralAttention


class GroupedQwen2Attention(GroupedAttention, Qwen2Attention):
    """Qwen2's attention with observers."""


class GroupedQwen2Model(GroupedDecoder, Qwen2Model):
    """`Qwen2Model` with pruning."""

    attention_class = GroupedQwen2Attention


DECODERS: dict[str, Any] = {
    "llama": GroupedLlamaModel,
    "mistral": GroupedMistralModel,
    "qwen2": GroupedQwen2Model,
}
