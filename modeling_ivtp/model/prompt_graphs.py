"""Images and prompts replayed as CUDA graphs: what is replayed, and under which conditions.

A prompt is padded on the right to the next multiple of a few tokens, so that one graph serves prompts of many lengths.
Attention is causal: no token of the prompt sees the padding, and the padding is left out of the output and the cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .ahead import Prefix
from .compat import CACHE
from .cuda_graphs import Graphs
from .language_ivtp import PrunedDecoderOutput
from .prompt import PromptIndex, PromptInputs
from .pruned_cache import fill, key_value_shape, prepare_layers
from .visual_sequence import RowCounts, locate_images

STEP = 8
"""Lengths of captured prompts are multiples of it."""

MAX_GRAPHS = 32
"""Graphs that are kept unless the user sets another number."""

_HARMLESS = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "cache_position"}


class PromptGraphs:
    """The CUDA graphs of one model: replays its images and prompts on a GPU; see `capture_prompts`.

    Parameters
    ----------
    limit : int, default 32
        Graphs that are kept.
    automatic : bool, default True
        Whether nobody asked for them: then only small work of modules that compute from their weights is captured.
    """

    def __init__(self, limit: int = MAX_GRAPHS, automatic: bool = True) -> None:
        self.graphs = Graphs(limit, automatic=automatic)

    def replay_images(
        self,
        model: Any,
        encode: Callable[[torch.Tensor], Any],
        pixel_values: torch.Tensor,
        feature_layers: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> Any:
        """Replay `encode(pixel_values=...)`.

        Parameters
        ----------
        model : IVTPLlavaModel
        encode : callable
        pixel_values : Tensor (I, 3, height, width)
        feature_layers : tuple of int
            All that `encode` depends on besides the pixels and the model.
        options : mapping
            Further keyword arguments of `get_image_features`.

        Returns
        -------
        IVTPImageFeatures or None
            None: not replayed, or not yet.
        """
        if not self._serve(model, {"pixel_values": pixel_values}, options):
            return None
        tokens = pixel_values.shape[0] * (model.config.num_patches + 1)
        needed = layer_bytes(model.config.vision_config, tokens, pixel_values.dtype.itemsize, matrices=2)
        what = _depends_on(model, "images", feature_layers)
        return self.graphs.run(model, what, encode, {"pixel_values": pixel_values}, needed)

    def replay_prompt(
        self,
        model: Any,
        prompt: PromptInputs,
        index: PromptIndex,
        encoded: Any,
        cache: Cache | None,
        options: Mapping[str, Any],
    ) -> PrunedDecoderOutput | None:
        """Replay a prompt that runs by itself: on an empty dynamic cache, with as many images in every row.

        Parameters
        ----------
        model : IVTPLlavaModel
        prompt : PromptInputs
        index : PromptIndex
        encoded : IVTPImageFeatures
            Of as many patches for each image.
        cache : Cache or None
            None makes one.
        options : mapping
            Further keyword arguments of the model's forward.

        Returns
        -------
        PrunedDecoderOutput or None
            With the cache that holds the prompt. None: not replayed, or not yet.
        """
        if not (_runs_alone(prompt, index, cache, options) and self._serve(model, _tensors(prompt), options)):
            return None
        text, length = model.config.text_config, prompt.length
        mask = prompt.attention_mask
        if _asks_the_device(text, mask):
            return None
        # A mask may cover tokens that are to come.
        mask = None if mask is None or index.sequence.valid is None else mask[:, :length]
        # A prompt that ends on an image ends with the last patch that is left: nothing can stand after it.
        extra = -length % STEP if index.sequence.trailing_text else 0
        window = getattr(text, "sliding_window", None)
        extra = 0 if window is not None and length + extra > window else extra
        inputs = _tensors(_padded(replace(prompt, attention_mask=mask), extra)) | _image_tensors(encoded)
        if not self.graphs.can_replay(inputs):
            return None
        images = tuple(row.images for row in index.sequence.rows)
        needed = _prompt_bytes(model, images, length + extra, inputs["features"].dtype)
        work = _captured_forward(model, type(encoded), images)
        found = self.graphs.run(model, _depends_on(model, "prompt", images), work, inputs, needed)
        if found is None:
            return None
        cache = DynamicCache(config=text) if cache is None else cache
        prepare_layers(cache, text.num_hidden_layers, None, length)
        fill(cache, found["layers"], found["cache_indices"], found["places"], index.sequence.trailing_text, extra)
        return PrunedDecoderOutput(
            last_hidden_state=found["hidden"][:, :length],
            kept_tokens=found["kept_tokens"][:, :length],
            **{CACHE: cache},
        )

    def replay_choice(self, model: Any, prefix: Prefix) -> torch.Tensor | None:
        """Replay the choice ahead of the decoder.

        Parameters
        ----------
        model : IVTPLlavaModel
        prefix : Prefix
            Of a prompt on an empty cache.

        Returns
        -------
        int64 Tensor (B, M, k) or None
            The patches that stay. None: not replayed, or not yet.
        """
        text, inputs = model.config.text_config, prefix.tensors
        if not self._serve(model, inputs, {}) or _asks_the_device(text, None):
            return None
        tokens = inputs["tokens"]

        def choose(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"patches": prefix.choose(model.language_model, tensors)}

        needed = layer_bytes(text, tokens.shape[0] * tokens.shape[1], tokens.dtype.itemsize)
        variant = _depends_on(model, "choice", prefix.visual.sequence.rows)
        found = self.graphs.run(model, variant, choose, inputs, needed)
        return None if found is None else found["patches"]

    def _serve(self, model: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> bool:
        """Return whether work on these inputs can be replayed; `options` are further arguments of a forward."""
        if torch.compiler.is_compiling() or model.applied_pruner is not None or not self.graphs.limit:
            return False
        # In training a decoder leaves out the cache, and dropout has to draw anew every time.
        if model.training or getattr(model.config.text_config, "output_hidden_states", False):
            return False
        wanted = {name for name, value in options.items() if value is not None and value is not False}
        if wanted - _HARMLESS or wanted & {"output_attentions", "output_hidden_states"}:
            return False
        return self.graphs.can_replay(inputs)


def _runs_alone(prompt: PromptInputs, index: PromptIndex, cache: Cache | None, options: Mapping[str, Any]) -> bool:
    """Return whether nothing but the prompt's own tokens takes part in it."""
    plain = cache is None or (type(cache) is DynamicCache and not getattr(cache, "offloading", False))
    alone = plain and prompt.past == 0 and prompt.drafted == 0 and prompt.inputs_embeds is None
    return alone and bool(options.get("use_cache")) and index.sequence.order is None


def _captured_forward(model: Any, kind: type, images: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
    """Return the function that is captured: from a prompt's tensors to hidden states and the cache's content."""

    def forward(
        features: torch.Tensor,
        kept_patches: torch.Tensor,
        cls_features: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        **tensors: Any,
    ) -> dict[str, Any]:
        encoded = kind(
            pooler_output=list(features),
            kept_patches=kept_patches,
            cls_features=cls_features,
            image_embeds=image_embeds,
        )
        prompt, cache = PromptInputs(**tensors), DynamicCache(config=model.config.text_config)
        index = _index_by_shape(model, prompt, images)
        output = model.decode_prompt(prompt, index, encoded, cache, use_cache=True)
        layers: Any = cache.layers
        shared = list({id(layer.cache_index): layer.cache_index for layer in layers}.values())
        places = [next(at for at, index in enumerate(shared) if index is layer.cache_index) for layer in layers]
        return {
            "hidden": output.last_hidden_state,
            "kept_tokens": output.kept_tokens,
            "layers": [(layer.keys, layer.values) for layer in layers],
            "cache_indices": [(one.stored, one.dropped, one.key_mask, one.position_shift) for one in shared],
            "places": places,
        }

    return forward


def _index_by_shape(model: Any, prompt: PromptInputs, images: tuple[int, ...]) -> PromptIndex:
    """Index a prompt of which only shapes are known, since a graph serves all prompts that have them."""
    assert prompt.input_ids is not None
    valid = None if prompt.attention_mask is None else prompt.attention_mask.bool()
    rows = tuple(RowCounts(prompt.length, count, 0, 0) for count in images)
    placeholders = prompt.input_ids == model.config.image_token_id
    return PromptIndex(locate_images(placeholders, valid, rows, model.config.num_patches, counted=False))


def _prompt_bytes(model: Any, images: tuple[int, ...], length: int, dtype: torch.dtype) -> int:
    """Estimate what a prompt takes: one layer's work, the KV cache, and hidden states of the prompt's length."""
    text, plan, most = model.config.text_config, model.plan(), max(images)
    words = length - most * plan.patches
    tokens = [words + most * left for left in plan.decoder_layer_tokens(text.num_hidden_layers)]
    heads, width = key_value_shape(text)
    held = 2 * heads * width * sum(tokens) + text.hidden_size * length
    return layer_bytes(text, len(images) * tokens[0], dtype.itemsize) + len(images) * held * dtype.itemsize


def _depends_on(model: Any, kind: str, what: Any) -> Any:
    """Return everything besides shapes and weights that a graph depends on."""
    config = model.config
    attention = config.vision_config._attn_implementation, config.text_config._attn_implementation
    return kind, what, config.pruning, attention, model.has_text_tower, config.image_token_id, config.num_patches


def _asks_the_device(config: Any, mask: torch.Tensor | None) -> bool:
    """Return whether a decoder waits for values during a prompt, which a graph cannot.

    Flash attention takes the padding out, and some rotary embeddings look how long the sequence is.
    """
    attention = config._attn_implementation
    flash = mask is not None and attention not in ("sdpa", "eager")
    rotary = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    return flash or "dynamic" in rotary or rotary == "longrope"


def layer_bytes(config: Any, tokens: int, value_bytes: int, matrices: int = 3) -> int:
    """Estimate the bytes that one layer, with an MLP of so many `matrices`, holds at a time for so many tokens."""
    return tokens * (4 * config.hidden_size + matrices * config.intermediate_size) * value_bytes


def _padded(prompt: PromptInputs, extra: int) -> PromptInputs:
    """Repeat the last token of a prompt `extra` times."""
    ids, mask, positions = prompt.input_ids, prompt.attention_mask, prompt.position_ids
    spans = prompt.clip_spans
    if not extra:
        return prompt
    assert ids is not None
    if positions is not None:
        further = torch.arange(1, extra + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + further], 1)
    return replace(
        prompt,
        input_ids=torch.cat([ids, ids[:, -1:].expand(-1, extra)], 1),
        attention_mask=None if mask is None else nn.functional.pad(mask, (0, extra), value=1),
        position_ids=positions,
        clip_spans=None if spans is None else nn.functional.pad(spans, (0, 0, 0, extra)),
    )


def _tensors(prompt: PromptInputs) -> dict[str, torch.Tensor]:
    """Return the tensors of a prompt by name, those that there are."""
    values = {field.name: getattr(prompt, field.name) for field in fields(prompt)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _image_tensors(encoded: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of encoded images by name, those that there are."""
    tensors = {"features": torch.stack(list(encoded.pooler_output)), "kept_patches": encoded.kept_patches}
    tensors |= {"cls_features": encoded.cls_features, "image_embeds": encoded.image_embeds}
    return {name: value for name, value in tensors.items() if value is not None}
