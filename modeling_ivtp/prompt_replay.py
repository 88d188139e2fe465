"""Prompts as CUDA graphs: what of a model's forward is replayed, and under which conditions."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .cuda_graphs import Graphs
from .prompt_reading import PromptReading
from .pruned_cache import fill, prepare_layers
from .visual_sequence import RowCounts, locate_images

_HARMLESS = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "cache_position"}


class PromptReplay:
    """Mixin for the model that has both towers: replays images and prompts, when `capture_prompts` was called."""

    config: Any
    graphs: Graphs | None = None
    applied_policy: Any
    training: bool

    def replay_serves(self, inputs: Mapping[str, torch.Tensor | None], options: Mapping[str, Any]) -> bool:
        """Whether work on these inputs can be replayed; `options` are further keyword arguments of a forward."""
        if self.graphs is None or not self.graphs.limit or self.applied_policy is not None:
            return False
        if getattr(self.config.text_config, "output_hidden_states", False):
            return False
        asked = {name for name, value in options.items() if value is not None and value is not False}
        if asked - _HARMLESS or asked & {"output_attentions", "output_hidden_states"}:
            return False
        return self.graphs.serve(_given(inputs))

    def replay_images(self, encode: Any, pixel_values: torch.Tensor, what: Any) -> Any:
        """`encode(pixel_values=…)`, replayed; `what` is all it depends on besides."""
        assert self.graphs is not None
        return self.graphs.run(self, self._replayed("images", what), encode, {"pixel_values": pixel_values})

    def replay_prompt(
        self,
        run: Any,
        reading: PromptReading,
        encoded: Any,
        inputs: Mapping[str, torch.Tensor | None],
        cache: Cache | None,
    ) -> tuple[Any, Cache]:
        """A prompt's output, replayed, and the cache that holds it.

        Parameters
        ----------
        run : callable
            The forward, called with `inputs`, `encoded`, `reading` and `cache`.
        reading : PromptReading
            Of rows with as many images each.
        encoded : IVTPImageFeatures
            Of as many patches each.
        inputs : mapping of str to Tensor or None
        cache : DynamicCache or None
            An empty one; None makes one.
        """
        assert self.graphs is not None
        kind, text = type(encoded), self.config.text_config
        images = tuple(row.images for row in reading.sequence.rows)
        mask, length = inputs["attention_mask"], reading.sequence.length
        # A mask may speak of tokens that are to come.
        mask = None if mask is None or reading.sequence.valid is None else mask[:, :length]
        inputs = {**inputs, "attention_mask": mask}
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
            output = run(encoded=again, reading=self._unread(given, images), cache=held, use_cache=True, **given)
            layers = [(layer.keys, layer.values) for layer in held.layers]
            layouts = [layer.layout for layer in held.layers]
            shared = list({id(layout): layout for layout in layouts}.values())
            places = [next(place for place, one in enumerate(shared) if one is layout) for layout in layouts]
            return {
                "hidden": output.last_hidden_state,
                "kept_tokens": output.kept_tokens,
                "layers": layers,
                "layouts": [(one.stored, one.dropped, one.key_mask, one.position_shift) for one in shared],
                "places": places,
            }

        told = self.graphs.run(self, self._replayed("prompt", images), forward, _given({**inputs, **parts}))
        cache = DynamicCache(config=text) if cache is None else cache
        prepare_layers(cache, text.num_hidden_layers, None, reading.sequence.length)
        fill(cache, told["layers"], told["layouts"], told["places"], reading.sequence.tail)
        return told, cache

    def _replayed(self, kind: str, what: Any) -> Any:
        """What a recording depends on besides shapes and weights."""
        config = self.config
        attention = config.vision_config._attn_implementation, config.text_config._attn_implementation
        return kind, what, config.pruning, attention, self.training

    def _unread(self, given: Mapping[str, Any], images: tuple[int, ...]) -> PromptReading:
        """A prompt of which only shapes are known, as a graph is to serve all that have them."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        valid = None if mask is None else mask.bool()
        rows = tuple(RowCounts(ids.shape[1], count, 0, 0) for count in images)
        placeholders = ids == self.config.image_token_id
        return PromptReading(locate_images(placeholders, valid, rows, self.config.num_patches, counted=False))


class PromptCapture:
    """Mixin for the class that users load."""

    model: Any

    def capture_prompts(self, limit: int = 16) -> None:
        """From now on, replay images and prompts as CUDA graphs, when their shapes come a second time.

        For small batches on a fast GPU, where launching a prompt's work takes longer than doing it. What is not
        replayed runs as always: prompts on top of a cache, with rows of different numbers of images, with gradients,
        under autocast, with another system than IVTP. What was recorded is dropped once a weight is another tensor;
        call this again after adapters were added, merged or switched.

        Parameters
        ----------
        limit : int, default 16
            Recordings that are kept; each holds memory of the size of its prompt's KV cache. 0 switches it off.

        Raises
        ------
        ValueError
            If the limit is negative, or the model is not on one GPU.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit={limit!r}; allowed: a number of recordings, 0 for none.")
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        if limit and (len(devices) != 1 or not devices[0].startswith("cuda")):
            raise ValueError(f"CUDA graphs need the whole model on one GPU; it is on {', '.join(devices)}.")
        self.model.graphs = Graphs(limit) if limit else None


def _given(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if value is not None}
