"""What `generate()` has to know about pruning: masks of a static cache, beams, what cannot be combined with it."""

import inspect
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .pruned_cache import is_pruned


class PrunedGeneration:
    """Mixin for the class that has `generate()`; the model's forward does the rest."""

    config: Any
    model: Any

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what only a prompt needs does not follow into the decoding steps."""
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            for name in ("mm_encoder_outputs", "clip_input_ids", "clip_spans"):
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Masks that `generate` prepares for a static cache; a prompt that is pruned makes its own, layer by layer."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if not is_pruned(cache):
            if kwargs.get("is_first_iteration") and self.config.pruning_plan() is not None:
                return mask
            return create_masks_for_generate(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            return mask
        return self.model.language_model.masks_for_pruned_cache(kwargs["inputs_embeds"], mask, cache)

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        images = model_kwargs.get("pixel_values") is not None or bool(model_kwargs.get("mm_encoder_outputs") or {})
        if generation_config.prefill_chunk_size is not None and images and self.config.pruning_plan() is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: pruning looks at the whole prompt, so it "
                "cannot be prefilled in chunks. Use prefill_chunk_size=None, or model.pruning(enabled=False)."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Repeat rows for beams; the images of a row stay together and in order."""
        images: dict[str, Any] = {}
        if expand_size > 1:
            images = {
                name: model_kwargs.pop(name)
                for name in ("pixel_values", "mm_encoder_outputs")
                if model_kwargs.get(name) is not None
            }
        order = self._image_order(expand_size, input_ids, images, model_kwargs) if images else None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        for name, value in images.items():
            if name == "pixel_values":
                value = value[torch.tensor(order, device=value.device)]
            else:
                value = {kind: _take_images(output, order) for kind, output in value.items()}
            model_kwargs[name] = value
        return input_ids, model_kwargs

    def _image_order(
        self, repeats: int, input_ids: torch.Tensor | None, images: dict[str, Any], model_kwargs: dict[str, Any]
    ) -> list[int]:
        """Which image stands where once every row is repeated."""
        embeds = model_kwargs.get("inputs_embeds")
        marks = self.model.placeholders(None if embeds is not None else input_ids, embeds)
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = model_kwargs.get("attention_mask")
        total = marks.shape[1] if mask is None else mask.shape[1]
        if past and total == marks.shape[1]:
            marks = marks[:, past:]
        if mask is not None:
            marks = marks & mask[:, total - marks.shape[1] :].bool()
        first, order = 0, []
        for count in (marks.sum(1) // self.config.num_patches).tolist():
            order += list(range(first, first + count)) * repeats
            first += count
        return order

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Leave out what an assistant that is a plain language model would not take."""
        assistant, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if assistant is not None and given is not None:
            taken = inspect.signature(assistant.forward).parameters
            ours = {"clip_input_ids", "clip_spans", "pixel_values"} - set(taken)
            kwargs["model_kwargs"] = {name: value for name, value in given.items() if name not in ours}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]


def _take_images(output: Any, order: list[int] | None) -> Any:
    """The same encoder output for images in another order."""
    if output is None or order is None or getattr(output, "pooler_output", None) is None:
        return output
    chosen: dict[str, Any] = {"pooler_output": [output.pooler_output[image] for image in order]}
    for name in ("kept_patches", "cls_features", "image_embeds"):
        if (value := getattr(output, name, None)) is not None:
            chosen[name] = value[torch.tensor(order, device=value.device)]
    return type(output)(**chosen)
