"""Pruning inside `generate()`: masks of a static cache, beams, images of earlier turns."""

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from .compat import CACHE
from .outputs import take_images
from .placeholders import features_of_image
from .prompt import PromptInputs
from .pruned_cache import is_pruned, release

_IMAGES = ("pixel_values", "mm_encoder_outputs", "image_sizes")
_MOVED = {
    "num_beam_groups": "group beam search",
    "diversity_penalty": "group beam search",
    "force_words_ids": "constrained beam search",
    "constraints": "constrained beam search",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
}
"""Options of decoding strategies that transformers 5 moved out of the library."""
_DRAFTED_FROM: ContextVar[Any] = ContextVar("drafted_from", default=None)
"""The images of a call of `generate` as its assistant's own tower encodes them."""


class PrunedGeneration:
    """Overrides of transformers' `GenerationMixin`; the model's forward does the rest."""

    config: Any
    model: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; see `GenerationMixin.generate`.

        Raises
        ------
        ValueError
            For a decoding strategy that is code of its own on the Hub, unless `custom_generate` asks for it.
        """
        # An input without a value is an input that did not come.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in _IMAGES}
        moved = [name for name in _MOVED if kwargs.get(name) not in (None, 1, 0.0)]
        if moved and kwargs.get("custom_generate") is None:
            raise ValueError(
                f"{moved[0]}={kwargs[moved[0]]!r}: {_MOVED[moved[0]]} is no part of transformers 5. Allowed: greedy "
                "search, sampling and beams (num_beams), prompt lookup and assisted decoding."
            )
        before = _DRAFTED_FROM.set(_encoded_for_assistant(kwargs))
        try:
            self._connect_ahead(args, kwargs)
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _DRAFTED_FROM.reset(before)

    @torch.no_grad()
    def _connect_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Encode images for a connector that reads the question, which transformers would encode without it."""
        pixels, connector = kwargs.get("pixel_values"), self.config.connector
        if pixels is None or connector is None or not connector.reads_question:
            return
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        prompt = PromptInputs(
            input_ids=ids if embeds is None else None,
            inputs_embeds=embeds,
            attention_mask=mask,
            clip_input_ids=kwargs.pop("clip_input_ids", None),
        )
        question = self.model.read_question(prompt, len(pixels))
        encoded = self.model.get_image_features(kwargs.pop("pixel_values"), question=question, return_dict=True)
        kwargs["mm_encoder_outputs"] = {"image": encoded}
        kwargs.pop("clip_spans", None)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Prepare a forward's inputs as transformers does; what only a prompt needs is left out of decoding steps."""
        prompt = kwargs.pop("prompt_length", None)
        cache = kwargs.get(CACHE)
        if next_sequence_length != 1 and cache is not None and kwargs.get("mm_encoder_outputs") is not None:
            # transformers never calls an assistant's pass the first one, and would leave the images out of its prompt.
            is_first_iteration = is_first_iteration or int(cache.get_seq_length()) == 0
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("mm_encoder_outputs", "clip_input_ids", "clip_spans"):
                kwargs.pop(name, None)
        elif inputs_embeds is None:
            if (spans := kwargs.get("clip_spans")) is not None:
                # Tokens after the prompt, such as an assistant's candidates, are no words of the person.
                later = input_ids.shape[1] - (spans.shape[1] if prompt is None else prompt)
                kwargs["clip_spans"] = nn.functional.pad(spans, (0, 0, 0, later))
            if prompt is not None and input_ids.shape[1] > prompt:
                kwargs["drafted"] = input_ids.shape[1] - prompt
            if next_sequence_length is not None and next_sequence_length < input_ids.shape[1]:
                self._leave_seen_images(input_ids, next_sequence_length, kwargs)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        mask = kwargs.get("attention_mask")
        if is_first_iteration:
            self._index_ahead(inputs, mask)
            if cache is not None:
                pruned = "prompt_index" in inputs or is_pruned(cache)
                cache.rows_are_whole = pruned and (mask is None or bool(mask.all()))
        elif _needs_no_mask(cache) and getattr(inputs.get("attention_mask"), "ndim", 0) == 2:
            inputs["attention_mask"] = None
        return inputs

    def _index_ahead(self, inputs: dict[str, Any], mask: torch.Tensor | None) -> None:
        """Index the prompt and allocate a static cache before the device has work."""
        cache = inputs.get(CACHE)
        release(cache)
        plan = self.model.plan() if _count_images(inputs) else None
        if plan is None:
            return
        prompt = PromptInputs(
            input_ids=inputs.get("input_ids"),
            inputs_embeds=inputs.get("inputs_embeds"),
            attention_mask=mask,
            clip_input_ids=inputs.get("clip_input_ids"),
            clip_spans=inputs.get("clip_spans"),
            past=0 if cache is None else int(cache.get_seq_length()),
            drafted=inputs.get("drafted", 0),
        )
        prompt, index = self.model.prepare_prompt(prompt, plan, _count_images(inputs))
        inputs |= {"clip_input_ids": prompt.clip_input_ids, "clip_spans": prompt.clip_spans, "prompt_index": index}
        if cache is not None and prompt.past == 0 and plan.exact:
            self.model.language_model.allocate(cache, plan, index.sequence)

    def _leave_seen_images(self, input_ids: torch.Tensor, new: int, kwargs: dict[str, Any]) -> None:
        """Keep only the images of the `new` last tokens of a conversation: the others are in the cache."""
        marks = input_ids == self.config.image_token_id
        counts, fresh = self._images_of(marks), self._images_of(marks[:, marks.shape[1] - new :])
        images = _count_images(kwargs)
        if images != sum(counts) or images == sum(fresh):
            return
        last = 0
        order: list[int] = []
        for count, kept in zip(counts, fresh, strict=True):
            last += count
            order += range(last - kept, last)
        for name in ("pixel_values", "mm_encoder_outputs"):
            if kwargs.get(name) is not None:
                kwargs[name] = _reordered(kwargs[name], order) if order else None

    def _images_of(self, marks: torch.Tensor) -> list[int]:
        return (marks.sum(1) // features_of_image(self.config)).tolist()

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Make the masks of a static cache; a prompt that is pruned makes its own, layer by layer."""
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if not is_pruned(cache):
            if kwargs.get("is_first_iteration") and self.model.plan() is not None:
                return mask
            return create_masks_for_generate(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            return mask
        mask = None if _needs_no_mask(cache) else mask
        return self.model.language_model.masks_for_pruned_cache(kwargs["inputs_embeds"], mask, cache)

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        chunked = generation_config.prefill_chunk_size is not None
        if chunked and _count_images(model_kwargs) and self.model.plan() is not None:
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
        embeds = model_kwargs.get("inputs_embeds")
        prompt = input_ids if embeds is None else embeds
        assert prompt is not None
        length = model_kwargs["prompt_length"] = prompt.shape[1]
        cache = model_kwargs.get(CACHE)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and (spans := model_kwargs.get("clip_spans")) is not None and spans.shape[1] < length:
            # Spans may cover the last words only: the tokens before them, say an earlier answer, have none.
            model_kwargs["clip_spans"] = nn.functional.pad(spans, (0, 0, length - spans.shape[1], 0))
        names = ("pixel_values", "mm_encoder_outputs") if expand_size > 1 and _count_images(model_kwargs) else ()
        images = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
        order: list[int] = []
        if images:
            marks = self.model.placeholders(None if embeds is not None else input_ids, embeds)
            order = self._image_order(expand_size, marks, _count_images(images), model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: _reordered(value, order) for name, value in images.items()}

    def _image_order(self, repeats: int, marks: torch.Tensor, images: int, model_kwargs: dict[str, Any]) -> list[int]:
        """Return the order of the images once every row is repeated."""
        if (mask := model_kwargs.get("attention_mask")) is not None:
            marks = marks & mask[:, mask.shape[1] - marks.shape[1] :].bool()
        counts = self._images_of(marks)
        if sum(counts) != images and (cache := model_kwargs.get(CACHE)) is not None:
            counts = self._images_of(marks[:, int(cache.get_seq_length()) :])
        first, order = 0, []
        for count in counts:
            order += list(range(first, first + count)) * repeats
            first += count
        return order

    def generate_batch(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate from token lists by transformers' continuous batching, which takes no images.

        Raises
        ------
        ValueError
            If images come along, or image tokens that no image could fill.
        """
        images = [name for name in ("pixel_values", "mm_encoder_outputs") if kwargs.get(name) is not None]
        if images or any(self.config.image_token_id in list(row) for row in inputs):
            raise ValueError(
                f"generate_batch takes prompts without images, and {' and '.join(images) or 'image tokens'} came: use "
                "generate, which takes batches of prompts with images."
            )
        return super().generate_batch(inputs, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Give an assistant that sees its own features, and leave out what a plain language model does not take."""
        assistant, inputs = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if assistant is not None and inputs is not None:
            known = inspect.signature(assistant.forward).parameters
            ours = {"clip_input_ids", "clip_spans", "pixel_values", "prompt_length"} - set(known)
            inputs = {name: value for name, value in inputs.items() if name not in ours}
            if (encoded := _DRAFTED_FROM.get()) is not None:
                inputs["mm_encoder_outputs"] = encoded
            kwargs["model_kwargs"] = inputs
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def _encoded_for_assistant(kwargs: dict[str, Any]) -> Any:
    """Return the images as an assistant's tower encodes them; None without images, or if it sees none.

    An assistant gets the inputs of the model that it drafts for, and transformers has encoded the images by then. Its
    own tower may be another one, or keep another number of tokens.
    """
    assistant, pixels = kwargs.get("assistant_model"), kwargs.get("pixel_values")
    encode = getattr(assistant, "get_image_features", None)
    if assistant is None or pixels is None or encode is None:
        return None
    known = inspect.signature(encode).parameters
    given = {name: value for name, value in kwargs.items() if name in known and name != "return_dict"}
    given["pixel_values"] = pixels.to(assistant.device)
    return {"image": encode(**given, return_dict=True)}


def _needs_no_mask(cache: Any) -> bool:
    """Return whether a decoding step sees every entry of a pruned cache, in every row."""
    return is_pruned(cache) and getattr(cache, "rows_are_whole", False)


def _count_images(kwargs: dict[str, Any]) -> int:
    if (pixels := kwargs.get("pixel_values")) is not None:
        return pixels.shape[0]
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    return 0 if encoded is None else len(encoded.pooler_output)


def _reordered(images: Any, order: list[int]) -> Any:
    """Put pixels (I, ...) or encoder outputs into another order of the images."""
    if isinstance(images, torch.Tensor):
        return images[torch.tensor(order, device=images.device)]
    return {kind: None if output is None else take_images(output, order) for kind, output in images.items()}
