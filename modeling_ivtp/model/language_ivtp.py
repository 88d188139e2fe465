"""Stage 2: a decoder of LLaMA's kind that drops visual tokens under the eyes of a pseudo CLS (IVTP Sec. 3.3)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model

from .compat import CACHE, one_cache
from .labels import CHOOSE, labelled
from .pruned_cache import (
    CacheSpan,
    allocate,
    cache_spans,
    is_pruned,
    key_value_shape,
    layer_segments,
    padding_mask,
    prepare_layers,
    reading,
)
from .pseudo_cls_attention import GroupedAttention, PseudoCLSAttention
from .rollout import DecoderAttentionRecord
from .schedule import Group, PruningPlan
from .visual_prompt import HiddenStates, Numbering, PromptPass, VisualPrompt, image_starts
from .visual_sequence import VisualSequence


@dataclass
class PrunedDecoderOutput(BaseModelOutputWithPast):
    """The decoder's output, with the columns of the prompt that went through all layers.

    Attributes
    ----------
    kept_tokens : bool Tensor (B, S) or None
        None: all.
    """

    kept_tokens: torch.Tensor | None = None


class GroupedDecoder:
    """Mixin for decoder models of LLaMA's architecture that drops visual tokens at the top of each group of layers.

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
            As in transformers. With `visual`, `inputs_embeds` (B, n, d) holds the tokens of `visual.sequence`, while
            `position_ids` (B or 1, S) and the mask still cover the whole prompt.
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
        cache = self._cache_of_pass(cache, use_cache, visual)
        logical = inputs_embeds.shape[1] if visual is None else visual.sequence.length
        past = 0 if cache is None else cache.get_seq_length()
        self._check_window(past, logical)
        if position_ids is None:
            position_ids = (torch.arange(logical, device=inputs_embeds.device) + past)[None]
        states = HiddenStates(wanted, model.config.num_hidden_layers) if wanted else None
        inputs = (inputs_embeds, attention_mask, position_ids, cache)
        kept_tokens = None
        if visual is None:
            hidden = model.norm(self._continue(*inputs, states, kwargs))
        else:
            run = self._prune(*inputs, visual, states, kwargs)
            hidden, kept_tokens = run.sequence.restore(model.norm(run.tokens)), run.kept_tokens()
        return PrunedDecoderOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            hidden_states=None if states is None else states.with_last(hidden),
            kept_tokens=kept_tokens,
        )

    def _cache_of_pass(self, cache: Cache | None, use_cache: bool | None, visual: VisualPrompt | None) -> Cache | None:
        """Return the cache that a pass writes; gradient checkpointing takes none."""
        model: Any = self
        use_cache = model.config.use_cache if use_cache is None else use_cache
        if visual is not None and visual.pruner.needs.weights:
            self._refuse_with_weights(cache)
            return None
        if model.training and getattr(model, "gradient_checkpointing", False):
            if visual is None:
                raise ValueError(
                    "Gradient checkpointing runs without the cache that holds the start of this conversation: train on "
                    "whole conversations, or disable it with gradient_checkpointing_disable()."
                )
            return None  # as transformers does: the backward pass would write it again
        return DynamicCache(config=model.config) if use_cache and cache is None else cache

    def allocate(self, cache: Cache, plan: PruningPlan, sequence: VisualSequence) -> None:
        """Allocate an empty static cache for what a prompt keeps and for the answer; see `pruned_cache.allocate`.

        Parameters
        ----------
        cache : Cache
            A cache that is not static is left alone, and so is one of a model in several dtypes or on several devices:
            there each layer allocates when its first keys come.
        plan : PruningPlan
            With exact counts.
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
        """Build the 4D masks of a decoding step, keyed by the first of the layers that share each.

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
        states: HiddenStates | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Run tokens after a pruned prompt: nothing is dropped, but masks and positions differ between layers."""
        segments = layer_segments(cache)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self._masks(segments, hidden, attention_mask, cache)
        rotary, known_shift = None, None
        layers, options = self._layer_calls(cache, kwargs)
        for first, last in segments:
            shift = cache.layers[first].cache_index.position_shift
            if rotary is None or shift is not known_shift:
                positions = position_ids if shift is None else position_ids - shift.to(position_ids.device)
                rotary, known_shift = self.rotary_emb(hidden, position_ids=positions), shift  # type: ignore[attr-defined]
            for index, layer in enumerate(layers[first : last + 1], first):
                if states is not None:
                    states[index] = hidden
                hidden = layer(hidden, attention_mask=masks[first], position_embeddings=rotary, **options)
        return hidden

    def _prune(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        visual: VisualPrompt,
        states: HiddenStates | None,
        kwargs: dict[str, Any],
    ) -> PromptPass:
        """Run a prompt group after group, each on the tokens that the group before left."""
        run = self._begin(tokens, attention_mask, position_ids, cache, visual, states)
        self._run_stages(run, len(self.layers), cache, attention_mask, kwargs)  # type: ignore[attr-defined]
        return run

    @torch.no_grad()
    def choose(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        visual: VisualPrompt,
    ) -> VisualSequence:
        """Run the groups of a prompt alone, on a prompt that ends with its last image, and return what they left.

        No gradient comes through a choice, so none is kept. The cache is read and left as it is.

        Parameters
        ----------
        tokens : Tensor (B, n, d)
            Of `visual.sequence`.
        attention_mask, position_ids, cache
            As in `forward`.
        visual : VisualPrompt
        """
        config: Any = self.config  # type: ignore[attr-defined]
        if cache is not None:
            past = int(cache.get_seq_length())
            known = None if attention_mask is None or past == 0 else attention_mask[:, :past].bool()
            prepare_layers(cache, config.num_hidden_layers, known, visual.sequence.length)
            cache = reading(cache) if past else None
        run = self._begin(tokens, attention_mask, position_ids, cache, visual, None)
        self._run_stages(run, visual.groups[-1].last + 1, cache, attention_mask, {})
        return run.sequence

    def _run_stages(
        self,
        run: PromptPass,
        end: int,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Run the layers below `end`, and drop at the top of each group."""
        visual = run.visual
        layers, options = self._layer_calls(cache, kwargs)
        for first, last, group in visual.stages(end):
            drops = group is not None and (group.adaptive or group.keep < run.sequence.patches.shape[2])
            records: list[Any] = []
            joined: torch.Tensor | None = None
            for span in cache_spans(cache, first, last, attention_mask):
                with_pseudo_cls = group is not None and run.pseudo_cls is not None
                call, renumbered = self._call_of(run, span, cache, options, with_pseudo_cls)
                if group is not None and with_pseudo_cls:
                    joined = self._run_with_pseudo_cls(run, span, layers, call, group, drops, records, joined)
                else:
                    self._run_layers(run, span, layers, call, drops, records)
                span.end(run.sequence, renumbered)
            if group is not None and drops and visual.pruner.needs.weights:
                run.weigh(group, records)
            elif group is not None and drops:
                ahead = None
                if visual.pruner.needs.next_record:
                    ahead = self._record_ahead(run, layers, group.last + 1, cache, attention_mask)
                run.drop(group, records, ahead)

    @torch.no_grad()
    @labelled(CHOOSE)
    def _record_ahead(
        self, run: PromptPass, layers: list[Any], index: int, cache: Cache | None, attention_mask: torch.Tensor | None
    ) -> DecoderAttentionRecord:
        """Compute the queries and keys of a layer that has not run yet, from the tokens that it would get."""
        (span,) = cache_spans(cache, index, index, attention_mask)
        layer = layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(run.tokens)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        query, key = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
        positions, _, _ = run.numbering.of(run.sequence, span.cache_index.position_shift)
        rotary = self._rotary(normed, positions.to(normed.device))
        query, key = apply_rotary_pos_emb(query, key, *(part.to(query.device) for part in rotary))
        if span.entries:
            key = torch.cat([span.layers[0].keys[:, :, : span.entries].to(key.device), key], 2)
        record = DecoderAttentionRecord(span.entries, span.past_valid, run.sequence.valid)
        record.attend(query, key, key, None, None, attention.scaling)
        return record

    def _begin(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        visual: VisualPrompt,
        states: HiddenStates | None,
    ) -> PromptPass:
        """Prepare the cache and gather what belongs to one prompt's pass."""
        past, sequence, pseudo = 0, visual.sequence, visual.pseudo_cls
        if cache is not None:
            past = int(cache.get_seq_length())
            known = None if attention_mask is None or past == 0 else attention_mask[:, :past].bool()
            prepare_layers(cache, self.config.num_hidden_layers, known, sequence.length)  # type: ignore[attr-defined]
        grid = visual.pruner.needs.grid_positions
        numbering = Numbering(
            position_ids.expand(tokens.shape[0], -1),
            None if attention_mask is None else attention_mask[:, past : past + sequence.length],
            None if pseudo is None else pseudo.end_positions,
            visual.pruner.needs.compact_positions,
            grid,
            None if grid is None else image_starts(sequence),
        )
        embeds = None if pseudo is None else pseudo.embeds.to(tokens.dtype)
        return PromptPass(visual, tokens, sequence, numbering, embeds, states=states)

    def _call_of(
        self, run: PromptPass, span: CacheSpan, cache: Cache | None, options: dict[str, Any], with_pseudo_cls: bool
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return the arguments that all layers of a span get, and how far positions move down (B, 1)."""
        mask = self._causal_mask(run.tokens, span.begin(run.sequence), cache, span.first)
        positions, ends, renumbered = run.numbering.of(run.sequence, span.cache_index.position_shift)
        if with_pseudo_cls:
            assert ends is not None
            positions = torch.cat([positions, ends], 1)
        rotary = self._rotary(run.tokens, positions)
        return {"attention_mask": mask, "position_embeddings": rotary, **options}, renumbered

    def _rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RoPE's cosines and sines (B, n, dh) for positions (B, n), or for those of rows and columns (2, B, n).

        Of two, every other frequency turns with the row and the ones between with the column.
        """
        if positions.dim() == 2:
            return self.rotary_emb(hidden, position_ids=positions)  # type: ignore[attr-defined]
        rows, columns = (self.rotary_emb(hidden, position_ids=axis) for axis in positions)  # type: ignore[attr-defined]
        width = rows[0].shape[-1]
        by_row = torch.arange(width, device=rows[0].device) % (width // 2) % 2 == 0
        cos, sin = (torch.where(by_row, *parts) for parts in zip(rows, columns, strict=True))
        return cos, sin

    @staticmethod
    def _run_layers(
        run: PromptPass, span: CacheSpan, layers: list[Any], call: dict[str, Any], drops: bool, records: list[Any]
    ) -> None:
        """Run layers on the prompt alone; where tokens will be dropped, each leaves a record."""
        weights, differentiable = run.column_weights(), run.visual.pruner.needs.attention_gradient
        for index in range(span.first, span.last + 1):
            run.note_state(index)
            if drops or weights is not None:
                valid = run.sequence.valid
                record = DecoderAttentionRecord(span.entries, span.past_valid, valid, weights, differentiable)
                if drops:
                    records.append(record)
                else:
                    record.sealed = True  # it only carries the weights
                call["record"] = record
            run.tokens = layers[index](run.tokens, **call)

    @staticmethod
    def _run_with_pseudo_cls(
        run: PromptPass,
        span: CacheSpan,
        layers: list[Any],
        call: dict[str, Any],
        group: Group,
        drops: bool,
        records: list[Any],
        joined: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Run layers on prompt and pseudo-CLS tokens; `joined` are both as the group's last span left them."""
        attention = PseudoCLSAttention.of(run.sequence, span.entries, span.past_valid)
        assert run.visual.pseudo_cls is not None
        pools = run.visual.pseudo_cls.key_tokens is not None
        for index in range(span.first, span.last + 1):
            run.note_state(index)
            if drops:
                records.append(run.visual.pruner.record(group, index))
            if joined is None or pools or run.states is not None:
                joined = run.joined()
            record = replace(attention, record=records[-1] if drops else None)
            joined = layers[index](joined, record=record, **call)
            tokens = run.tokens.shape[1]
            run.tokens, run.pseudo_cls = joined.split([tokens, joined.shape[1] - tokens], 1)
        return joined

    def _layer_calls(self, cache: Cache | None, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the layers and the arguments they share; looked up once, since a decoding step takes little longer."""
        # No position_ids: gaps in them would be read as packed sequences by flash attention.
        options = {**kwargs, "position_ids": None, "use_cache": cache is not None, CACHE: cache}
        return list(self.layers), options  # type: ignore[attr-defined]

    def _causal_mask(self, hidden: torch.Tensor, padding: torch.Tensor | None, cache: Cache | None, layer: int) -> Any:
        """Build a layer's mask; None where the attention's own causal pattern, or no mask at all, is right."""
        config: Any = self.config  # type: ignore[attr-defined]
        new = hidden.shape[1]
        if padding is None:
            keys = new if cache is None else cache.layers[layer].get_mask_sizes(new)[0]
            filled = cache is None or not isinstance(cache.layers[layer], StaticLayer)
            if (new == 1 and filled) or (keys == new and config._attn_implementation != "eager"):
                return None
        elif config._attn_implementation == "sdpa" and (cache is None or not _waits(cache.layers[layer])):
            # transformers would check whether anything is padded, and wait for the device.
            dropped = 0 if cache is None else cache.layers[layer].cache_index.dropped
            present = padding[:, dropped:].to(hidden.device)
            keys = torch.arange(present.shape[1], device=hidden.device)
            return (keys <= keys[-new:, None]) & present[:, None, None]
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
        wanted = kwargs.get("output_attentions")
        if config.output_attentions if wanted is None else wanted:
            raise ValueError(
                "output_attentions=True: under pruning each layer's attention map has another size. Use "
                "model.explain(...) to see what was kept and why, or switch pruning off: model.pruning(enabled=False)."
            )
        refuse_flex_attention(config)

    def _refuse_with_weights(self, cache: Cache | None) -> None:
        """Refuse what has no gradient where tokens are weighted: a cache, and checkpoints that lose the weights."""
        if cache is not None:
            raise ValueError(
                "A pruner in training mode weighs tokens and drops none, so no cache can be pruned: call eval() on its "
                "modules to generate, or pass no cache."
            )
        for layer in self.layers:  # type: ignore[attr-defined]
            function = getattr(layer, "_gradient_checkpointing_func", None)
            options = getattr(function, "keywords", {}) if layer.gradient_checkpointing else {}
            if options.get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True: reentrant checkpoints lose the gradient of a learned pruner's weights; "
                    'allowed: gradient_checkpointing_enable({"use_reentrant": False}).'
                )

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
    """Return whether only the device knows how many entries a cache layer holds."""
    return isinstance(layer, StaticLayer) and not getattr(layer, "empty", False)


class GroupedLlamaAttention(GroupedAttention, LlamaAttention):
    """LLaMA's attention, which pseudo-CLS tokens can join."""


class GroupedLlamaModel(GroupedDecoder, LlamaModel):
    """`LlamaModel` with pruning."""

    attention_class = GroupedLlamaAttention


class GroupedMistralAttention(GroupedAttention, MistralAttention):
    """Mistral's attention, which pseudo-CLS tokens can join."""


class GroupedMistralModel(GroupedDecoder, MistralModel):
    """`MistralModel` with pruning."""

    attention_class = GroupedMistralAttention


class GroupedQwen2Attention(GroupedAttention, Qwen2Attention):
    """Qwen2's attention, which pseudo-CLS tokens can join."""


class GroupedQwen2Model(GroupedDecoder, Qwen2Model):
    """`Qwen2Model` with pruning."""

    attention_class = GroupedQwen2Attention


DECODERS: dict[str, Any] = {
    "llama": GroupedLlamaModel,
    "mistral": GroupedMistralModel,
    "qwen2": GroupedQwen2Model,
}


def refuse_flex_attention(config: Any) -> None:
    """Refuse a decoder that was set to flex attention, before the vision tower runs, too: there it fails on a CPU."""
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ValueError('attn_implementation="flex_attention" is not supported under pruning; use "sdpa".')


def check_architecture(config: Any) -> None:
    """Refuse towers that pruning cannot serve, before anything is built."""
    vision, text, clip = config.vision_config, config.text_config, config.clip_text_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"vision_config.model_type={vision.model_type!r}: pruning needs a vision tower with a CLS token; allowed: "
            "'clip_vision_model'."
        )
    if text.model_type not in DECODERS:
        raise ValueError(f"text_config.model_type={text.model_type!r}; allowed: {', '.join(sorted(DECODERS))}.")
    if clip is not None and clip.model_type != "clip_text_model":
        raise ValueError(f"clip_text_config.model_type={clip.model_type!r}; allowed: 'clip_text_model'.")
    layers = config.vision_feature_layer
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer={layer}; allowed: {-vision.num_hidden_layers - 1} to {vision.num_hidden_layers}."
            )
    config.check_connector()
    config.pruning_plan()
