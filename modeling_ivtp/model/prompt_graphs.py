"""Prompts as CUDA graphs: what of a model's forward is replayed, and under which conditions.

A prompt is filled up on the right to the next of a few lengths, so that one recording serves prompts of many. Attention
is causal: nothing of the prompt sees what follows, and what follows is left out of the output and the cache.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .compat import CACHE
from .cuda_graphs import Graphs
from .language_ivtp import PrunedDecoderOutput
from .prompt import PromptIndex
from .pruned_cache import fill, key_value_shape, prepare_layers
from .visual_sequence import RowCounts, locate_images

STEP = 8
"""Lengths of recorded prompts are multiples of it."""

MAX_GRAPHS = 32
"""Kept unless somebody asks for another number."""

_HARMLESS = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "cache_position"}


class PromptReplay:
    """Mixin for the model that has both towers: replays images and prompts on a GPU; see `capture_prompts`."""

    config: Any
    graphs: Graphs
    applied_pruner: Any
    plan: Callable[[], Any]
    training: bool

    def replay_serves(self, inputs: Mapping[str, torch.Tensor | None], options: Mapping[str, Any]) -> bool:
        """Whether work on these inputs can be replayed; `options` are further keyword arguments of a forward."""
        if torch.compiler.is_compiling() or self.applied_pruner is not None or not self.graphs.limit:
            return False
        # In training a decoder leaves out the cache, and what is dropped at random is to be another every time.
        if self.training:
            return False
        if getattr(self.config.text_config, "output_hidden_states", False):
            return False
        asked = {name for name, value in options.items() if value is not None and value is not False}
        if asked - _HARMLESS or asked & {"output_attentions", "output_hidden_states"}:
            return False
        return self.graphs.serve(_given(inputs))

    def replay_images(self, encode: Any, pixel_values: torch.Tensor, what: Any) -> Any:
        """`encode(pixel_values=…)`, replayed; `what` is all it depends on besides. None: not replayed, or not yet."""
        tokens = pixel_values.shape[0] * (self.config.num_patches + 1)
        taken = layer_bytes(self.config.vision_config, tokens, pixel_values.dtype.itemsize, matrices=2)
        what = self._replayed("images", what)
        return self.graphs.run(self, what, encode, {"pixel_values": pixel_values}, taken)

    def replay_prompt(
        self,
        run: Any,
        prompt_index: PromptIndex,
        encoded: Any,
        inputs: Mapping[str, torch.Tensor | None],
        cache: Cache | None,
    ) -> PrunedDecoderOutput | None:
        """A prompt's output, replayed, with the cache that holds it. None: it is not replayed, or not yet.

        Parameters
        ----------
        run : callable
            The forward, called with `inputs`, `encoded`, `prompt_index` and `cache`.
        prompt_index : PromptIndex
            Of rows with as many images each.
        encoded : IVTPImageFeatures
            Of as many patches each.
        inputs : mapping of str to Tensor or None
        cache : DynamicCache or None
            An empty one; None makes one.
        """
        kind, text = type(encoded), self.config.text_config
        images = tuple(row.images for row in prompt_index.sequence.rows)
        mask, length = inputs["attention_mask"], prompt_index.sequence.length
        if _asks_the_device(text, mask):
            return None
        # A mask may speak of tokens that are to come.
        mask = None if mask is None or prompt_index.sequence.valid is None else mask[:, :length]
        # A prompt that ends on an image ends with the last patch that is left: nothing can stand after it.
        extra = -length % STEP if prompt_index.sequence.tail else 0
        window = getattr(text, "sliding_window", None)
        extra = 0 if window is not None and length + extra > window else extra
        inputs = _longer({**inputs, "attention_mask": mask}, extra)
        parts = {"features": torch.stack(list(encoded.pooler_output)), "kept_patches": encoded.kept_patches}
        parts |= {"cls_features": encoded.cls_features, "image_embeds": encoded.image_embeds}

        def forward(features: torch.Tensor, kept_patches: Any, cls_features: Any, **given: Any) -> Any:
            again = kind(
                pooler_output=list(features),
                kept_patches=kept_patches,
                cls_features=cls_features,
                image_embeds=given.pop("image_embeds", None),
            )
            held = DynamicCache(config=text)
            output = run(encoded=again, prompt_index=self._unread(given, images), cache=held, use_cache=True, **given)
            layers = [(layer.keys, layer.values) for layer in held.layers]
            cache_indices = [layer.cache_index for layer in held.layers]
            shared = list({id(cache_index): cache_index for cache_index in cache_indices}.values())
            places = [
                next(place for place, one in enumerate(shared) if one is cache_index) for cache_index in cache_indices
            ]
            return {
                "hidden": output.last_hidden_state,
                "kept_tokens": output.kept_tokens,
                "layers": layers,
                "cache_indices": [(one.stored, one.dropped, one.key_mask, one.position_shift) for one in shared],
                "places": places,
            }

        given = _given({**inputs, **parts})
        if not self.graphs.serve(given):
            return None
        taken = self._prompt_bytes(len(images), max(images), length + extra, parts["features"].dtype)
        told = self.graphs.run(self, self._replayed("prompt", images), forward, given, taken)
        if told is None:
            return None
        cache = DynamicCache(config=text) if cache is None else cache
        prepare_layers(cache, text.num_hidden_layers, None, length)
        fill(cache, told["layers"], told["cache_indices"], told["places"], prompt_index.sequence.tail, extra)
        return PrunedDecoderOutput(
            last_hidden_state=told["hidden"][:, :length], kept_tokens=told["kept_tokens"][:, :length], **{CACHE: cache}
        )

    def _prompt_bytes(self, rows: int, images: int, length: int, dtype: torch.dtype) -> int:
        """About what a prompt takes: a layer's work, the KV cache, and hidden states as long as the prompt was."""
        text, plan = self.config.text_config, self.plan()
        words = length - images * plan.patches
        tokens = [words + images * left for left in plan.decoder_layer_tokens(text.num_hidden_layers)]
        heads, width = key_value_shape(text)
        held = 2 * heads * width * sum(tokens) + text.hidden_size * length
        return layer_bytes(text, rows * tokens[0], dtype.itemsize) + rows * held * dtype.itemsize

    def _replayed(self, kind: str, what: Any) -> Any:
        """What a recording depends on besides shapes and weights."""
        config = self.config
        attention = config.vision_config._attn_implementation, config.text_config._attn_implementation
        words = getattr(self, "has_text_tower", False)
        return kind, what, config.pruning, attention, words, config.image_token_id, config.num_patches

    def _unread(self, given: Mapping[str, Any], images: tuple[int, ...]) -> PromptIndex:
        """A prompt of which only shapes are known, as a graph is to serve all that have them."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        valid = None if mask is None else mask.bool()
        rows = tuple(RowCounts(ids.shape[1], count, 0, 0) for count in images)
        placeholders = ids == self.config.image_token_id
        return PromptIndex(locate_images(placeholders, valid, rows, self.config.num_patches, counted=False))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Moved or cast: nothing that was recorded is valid, and what it held is wanted back now.
        if (graphs := getattr(self, "graphs", None)) is not None:
            graphs.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


class PromptCapture:
    """Mixin for the class that users load."""

    model: Any

    def capture_prompts(self, limit: int = MAX_GRAPHS, automatic: bool = False) -> None:
        """Replay images and prompts of any size as CUDA graphs when their shapes come a second time, or never.

        On a fast GPU, launching the work of a small batch takes longer than doing it. So unasked, a model replays it
        where that is safe and small: one whose weights alone decide what it computes (no adapters, no quantised
        layers), and work that takes at most 1/64 of the GPU's memory with what it puts out, mostly the prompt's KV
        cache. This lifts both conditions, or with 0 switches replaying off.

        What cannot be replayed runs as always: prompts on top of a cache, with rows of different numbers of images,
        padded ones under FlashAttention's package, with gradients, in training mode, under autocast, with hooks, with
        another system than IVTP. What was recorded is dropped once a weight is another tensor; call this again after
        adapters were added, merged or switched. While something is recorded, another thread must not synchronise the
        whole device.

        Parameters
        ----------
        limit : int, default 32
            Recordings that are kept. They share one piece of memory for what they work on and one for what they put
            out, each as large as the largest needs, and half of the latter again. 0 switches replaying off.
        automatic : bool, default False
            True keeps both conditions, as a model has them that nobody asked.

        Raises
        ------
        ValueError
            If the limit is negative, or the model is not on one GPU.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit={limit!r}; allowed: a number of recordings, 0 for none.")
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        if limit and not automatic and (len(devices) != 1 or not devices[0].startswith("cuda")):
            raise ValueError(f"CUDA graphs need the whole model on one GPU; it is on {', '.join(devices)}.")
        self.model.graphs = Graphs(limit, automatic=automatic)


def _asks_the_device(config: Any, mask: torch.Tensor | None) -> bool:
    """Whether a decoder waits for values during a prompt, which a recording cannot: flash attention takes the padding
    out, and some rotary embeddings look how long the sequence is."""
    attention = config._attn_implementation
    flash = mask is not None and attention not in ("sdpa", "eager")
    rotary = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    return flash or "dynamic" in rotary or rotary == "longrope"


def layer_bytes(config: Any, tokens: int, value_bytes: int, matrices: int = 3) -> int:
    """About what a layer with an MLP of so many `matrices` holds at a time of so many tokens."""
    return tokens * (4 * config.hidden_size + matrices * config.intermediate_size) * value_bytes


def _longer(inputs: Mapping[str, torch.Tensor | None], extra: int) -> dict[str, torch.Tensor | None]:
    """The inputs of a prompt with its last token repeated `extra` times."""
    if not extra:
        return dict(inputs)
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    spans = inputs["clip_spans"]
    assert ids is not None
    if positions is not None:
        further = torch.arange(1, extra + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + further], 1)
    return {
        **inputs,
        "input_ids": torch.cat([ids, ids[:, -1:].expand(-1, extra)], 1),
        "attention_mask": None if mask is None else nn.functional.pad(mask, (0, extra), value=1),
        "position_ids": positions,
        "clip_spans": None if spans is None else nn.functional.pad(spans, (0, 0, 0, extra)),
    }


def _given(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if value is not None}
