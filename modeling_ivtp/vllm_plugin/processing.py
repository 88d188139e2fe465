"""Requests on a vLLM server: pictures become pixels, and each gets as many placeholders as tokens will stay of it."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from ..model.processing_ivtp import IVTPLlavaProcessor
from . import pictures as pictures_of_requests
from .budget import BUDGET, CEILING, Budgets, check_positions, plan_for
from .guide import Guide, guides_of
from .metrics import PruningMetrics

_GUIDES = "ivtp_guides"
"""The name under which guides travel with a request's options inside of vLLM's processor."""
_PICTURES = "ivtp_pictures"
_DUMMY = "ivtp_dummy"
_VLLMS_OWN = object()
"""Under that name it marks vLLM's own requests, by which it warms up and measures memory; no client can send it."""
_TOKENIZING = threading.RLock()
"""Held while a tokenizer works: fast tokenizers refuse two threads at a time."""

_OURS = (BUDGET, CEILING, _GUIDES, _PICTURES, _DUMMY)

FIELDS = ("pixel_values", "picture_keys", "image_number", BUDGET, "prompt_ids", "clip_input_ids", "clip_spans")
"""Fields that an image brings to the model; see `encoding.Item`."""


class ServedProcessingInfo(LlavaProcessingInfo):
    """Facts about requests that vLLM has to know ahead."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        pictures_of_requests.guard()

    def get_hf_processor(self, **kwargs: object) -> IVTPLlavaProcessor:
        """Return the checkpoint's processor, with CLIP's tokenizer."""
        return self._processor

    @cached_property
    def _processor(self) -> IVTPLlavaProcessor:
        model = self.ctx.model_config
        return IVTPLlavaProcessor.from_pretrained(model.model, revision=model.revision)

    @cached_property
    def budgets(self) -> Budgets:
        """The budgets of this server."""
        return Budgets(self.get_hf_config(), self.ctx.get_mm_config().mm_processor_kwargs)

    @cached_property
    def metrics(self) -> PruningMetrics:
        """Counters of what pruning spares, for `/metrics`."""
        return PruningMetrics(self.get_hf_config(), self.ctx.model_config.dtype.itemsize)

    @cached_property
    def room(self) -> int:
        """Return the positions that the decoder takes, as its configuration or this server has it."""
        config: Any = self.get_hf_config()
        return max(int(config.text_config.max_position_embeddings), int(self.ctx.model_config.max_model_len))

    @cached_property
    def words_guide(self) -> bool:
        """Return whether words after an image steer the choice."""
        config: Any = self.get_hf_config()
        return config.pruning.guidance != "visual_cls"

    def is_guided(self, visual_tokens: int) -> bool:
        """Return whether the second stage drops anything under a budget."""
        config: Any = self.get_hf_config()
        plan = plan_for(config, visual_tokens)
        guided = plan is not None and plan.final_tokens < plan.tower_tokens
        if guided and config.pruning.strict and self.words_guide and self._processor.clip_tokenizer is None:
            raise ValueError(
                "pruning.strict=True, and this checkpoint has no clip_tokenizer/ to read the question with."
            )
        return guided

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the most visual tokens that a request may ask for."""
        return {"image": self.budgets.ceiling}


class ServedProcessor(LlavaMultiModalProcessor):
    """vLLM's processor of LLaVA, with a budget and a guide for every image."""

    info: ServedProcessingInfo

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request as vLLM does, with what steers the choice among its options.

        Raises
        ------
        ValueError
            For a budget that is not allowed, for other options of the processor, for more pictures than the model has
            positions for, and for embeddings in place of pictures, of which nothing can be pruned.
        """
        pictures = inputs.mm_data_items.get("image")
        if not pictures:
            return super().apply(inputs, timing_ctx)
        if isinstance(pictures, ImageEmbeddingItems):
            raise ValueError("image embeddings came in place of a picture; pruning needs the picture itself.")
        options = dict(inputs.hf_processor_mm_kwargs)
        dummy = options.pop(_DUMMY, None) is _VLLMS_OWN
        number = self.info.budgets.of(options)
        if not dummy:
            check_positions(self.info.get_hf_config(), len(inputs.prompt), len(pictures), self.info.room)
        if self.info.is_guided(number):
            processor = self.info.get_hf_processor()
            with _TOKENIZING:
                guides = guides_of(inputs.prompt, processor, self._image_token, self.info.words_guide)
            if len(guides) != len(pictures):
                raise ValueError(f"{len(pictures)} image(s) came for a prompt with {len(guides)} image token(s).")
            options |= {_GUIDES: guides, _PICTURES: list(pictures.get_processor_data()["images"])}
        options[BUDGET] = number
        processed = super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)
        if not dummy:
            self.info.metrics.count(len(pictures), number)
        return processed

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Make one of vLLM's own requests, which the metrics leave out."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, _DUMMY: _VLLMS_OWN})

    @property
    def _image_token(self) -> int:
        return int(self.info.get_hf_config().image_token_index)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Identify each image by the pictures, the budget and the words that decide what is kept of it."""
        options = dict(inputs.hf_processor_mm_kwargs)
        guides: list[Guide] | None = options.pop(_GUIDES, None)
        options.pop(_PICTURES, None)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=options))
        if guides is None:
            return hashes
        pictures = hashes["image"]
        return hashes | {
            "image": [
                _digest(repr((pictures[: guide.images], guide.token_ids, guide.number)).encode()).hex()
                for guide in guides
            ]
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        """Leave out the guides of images that were processed before."""
        options = dict(inputs.hf_processor_mm_kwargs)
        if (guides := options.get(_GUIDES)) is not None:
            cached = mm_is_cached["image"]
            options[_GUIDES] = [guide for guide, known in zip(guides, cached, strict=True) if not known]
        return options

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Make pixels, and for guided images the tensors of their guide."""
        options = dict(hf_kwargs)
        number, guides, pictures = (options.pop(name, None) for name in (BUDGET, _GUIDES, _PICTURES))
        count = mm_items.get_count("image", strict=False)
        if not count:
            return BatchFeature({})
        budget = torch.full((count,), number if isinstance(number, int) else self.info.budgets.default)
        if not isinstance(guides, list):
            pixels = list(super()._apply_hf_processor_main(mm_items, options)["pixel_values"])
            return BatchFeature(
                {
                    "pixel_values": [one[None] for one in pixels],
                    "picture_keys": [_picture_keys(one[None]) for one in pixels],
                    "image_number": torch.zeros(count, dtype=torch.int64),
                    BUDGET: budget,
                }
            )
        config: Any = self.info.get_hf_config()
        assert isinstance(pictures, list)
        needed = pictures[: max((guide.images for guide in guides), default=0)]
        if any(picture is None for picture in needed):
            raise ValueError("a picture came as its uuid alone, and a later one is chosen beside it: send both.")
        seen = self._pixels(needed, options)
        data: dict[str, list[torch.Tensor]] = {
            "pixel_values": [seen[: guide.images] for guide in guides],
            "picture_keys": [_picture_keys(seen[: guide.images]) for guide in guides],
        }
        for guide in guides:
            with _TOKENIZING:
                tensors = guide.tensors(self.info.get_hf_processor(), self._image_token, config.num_patches)
            for name, tensor in tensors.items():
                data.setdefault(name, []).append(tensor)
        numbers = torch.tensor([guide.number for guide in guides])
        return BatchFeature({**data, "image_number": numbers, BUDGET: budget})

    def _pixels(self, pictures: Sequence[Any], options: Mapping[str, object]) -> torch.Tensor:
        """Return the pixels of pictures (n, 3, height, width)."""
        return torch.as_tensor(self._call_hf_processor({"images": list(pictures)}, options)["pixel_values"])

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Call the processor without the options that are ours."""
        ctx: Any = self.info.ctx
        options = {name: value for name, value in ctx.get_merged_mm_kwargs(hf_kwargs).items() if name not in _OURS}
        output = self.info.get_hf_processor()(**hf_data, **{"return_tensors": "pt", **options})
        return BatchFeature(ctx._postprocess_output(output.data))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Describe what an image brings: one entry of each field."""
        on_cpu = ("picture_keys", "image_number", BUDGET, "prompt_ids", "clip_input_ids", "clip_spans")
        return {name: MultiModalFieldConfig.batched("image", keep_on_cpu=name in on_cpu) for name in FIELDS}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        """Put one placeholder for each token that stays in place of an image's token."""
        number = hf_processor_mm_kwargs.get(BUDGET, self.info.budgets.default)
        assert isinstance(number, int)
        placeholders = [self._image_token] * number
        return [PromptReplacement(modality="image", target=[self._image_token], replacement=placeholders)]


class ServedDummyInputs(LlavaDummyInputsBuilder):
    """vLLM's dummy requests, by which it measures memory."""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _picture_keys(pixel_values: torch.Tensor) -> torch.Tensor:
    """Return an identity of each picture, by its pixels: int64 (n, 2)."""
    content = [one.contiguous().view(torch.uint8).numpy().tobytes() for one in pixel_values]
    return torch.stack([torch.frombuffer(bytearray(_digest(one)), dtype=torch.int64) for one in content])
