"""Images on a vLLM server: both stages, up to the features that the decoder gets.

The vision tower, the projector and CLIP's text tower are the modules of the transformers engine, unchanged.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel

from ..model.ahead import Prefix, drops, places, up_to_images
from ..model.guide import InstructionGuide
from ..model.instruction_cache import InstructionCache
from ..model.modeling_ivtp import IVTPLlavaModel
from ..model.outputs import IVTPImageFeatures
from ..model.prompt import PromptInputs, build_prompt, instruction_windows
from ..model.prompt_graphs import PromptGraphs
from ..model.vision_ivtp import GroupedCLIPVisionModel
from .budget import options_for
from .prefix_decoder import Devices, PrefixDecoder, without_adapters

TOWER_OUTPUTS = 64
"""Pictures whose tower output is remembered, so that another question about one does not encode it again."""

AT_ONCE = 8
"""Pictures that the vision tower encodes at a time."""

TOGETHER = 32
"""Windows of questions that CLIP's text tower reads at a time, fewer than its cache holds."""


_PER_IMAGE = ("kept_patches", "cls_features", "image_embeds")


@dataclass(frozen=True)
class Item:
    """An image of a request.

    Attributes
    ----------
    pixel_values : Tensor (m, 3, height, width)
        Of all images in the guide; of the image alone if nothing guides.
    keys : tuple of hashable
        Identities of these images.
    number : int
        The image's own number among them.
    visual_tokens : int
        Its budget.
    prompt_ids : int64 Tensor (S,) or None
        The prompt that guides, with one placeholder per patch; None: nothing guides.
    clip_input_ids : int64 Tensor (W, C) or None
    clip_spans : int64 Tensor (S, 2) or None
        As `IVTPLlavaProcessor` makes them.
    """

    pixel_values: torch.Tensor
    keys: tuple[Any, ...]
    number: int
    visual_tokens: int
    prompt_ids: torch.Tensor | None = None
    clip_input_ids: torch.Tensor | None = None
    clip_spans: torch.Tensor | None = None

    @property
    def conversation(self) -> tuple[Any, ...]:
        """Key that the images of one turn share: they are chosen in one pass."""
        ids = None if self.prompt_ids is None else tuple(self.prompt_ids.tolist())
        return self.visual_tokens, self.keys, ids


@dataclass(frozen=True)
class _Guided:
    """A prompt on its way to a choice."""

    prefix: Prefix
    patches: torch.Tensor
    """int64 Tensor (1, M, k): those that the tower handed over."""


class ImageEncoder(IVTPLlavaModel):
    """The engine's model without a decoder of its own: it encodes images and chooses with vLLM's layers.

    Parameters
    ----------
    config : IVTPLlavaConfig
    decoder : Module
        vLLM's decoder, with `embed_tokens` and `layers`.
    devices : Devices, optional
        Those that share the heads of its layers. Each encodes all images.
    """

    def __init__(self, config: Any, decoder: nn.Module, devices: Devices | None = None) -> None:
        # Not IVTPLlavaModel's, which builds a decoder. The options change with every batch, so the copy is its own.
        config = copy.deepcopy(config)
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = GroupedCLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.instruction_cache = InstructionCache()
        self.prompt_graphs = PromptGraphs(0)
        self.guide = InstructionGuide()
        if config.clip_text_config is not None:
            self.clip_text_model = CLIPTextModelWithProjection(config.clip_text_config)
            self.visual_projection = nn.Linear(
                config.vision_config.hidden_size, config.clip_text_config.projection_dim, bias=False
            )
        self.remembered: OrderedDict[Any, IVTPImageFeatures] = OrderedDict()
        self.encoded = self.chosen = 0
        # Not registered as a part: the decoder's weights are vLLM's.
        self.__dict__["decoder"] = decoder
        layers: Any = decoder.layers
        first = layers[: config.pruning.decoder_layers]
        self.__dict__["language_model"] = PrefixDecoder(config.text_config, first, devices)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens (B, S), with any for placeholders: (B, S, d)."""
        words = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        embed = without_adapters(self.__dict__["decoder"].embed_tokens)
        return embed(words.flatten()).unflatten(0, words.shape)

    @torch.no_grad()
    def features_of(self, items: Sequence[Item]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the features (k, d) that stay of each image, and their patches, int64 (k,) ascending."""
        results: list[Any] = [None] * len(items)
        order = sorted(range(len(items)), key=lambda at: items[at].visual_tokens)
        for visual_tokens, numbers in groupby(order, key=lambda at: items[at].visual_tokens):
            places_of = list(numbers)
            before = self.config.pruning
            self.config.pruning = options_for(self.config, visual_tokens)
            try:
                found = self._with_one_budget([items[at] for at in places_of])
            finally:
                self.config.pruning = before
            for at, result in zip(places_of, found, strict=True):
                results[at] = result
        return results

    def _with_one_budget(self, items: Sequence[Item]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        encoded = self._encode(items)
        distinct = {item.conversation: item for item in items if item.prompt_ids is not None}
        self._read(distinct.values())
        guided = {name: self._prepare(item, encoded) for name, item in distinct.items()}
        stay = self._choose({name: prompt for name, prompt in guided.items() if prompt is not None})
        results = []
        for item in items:
            image = encoded[item.keys[item.number]]
            kept_patches: Any = image.kept_patches
            features, patches = image.pooler_output[0], kept_patches[0]
            kept = stay.get(item.conversation)
            if kept is not None:
                index = places(kept[item.number], patches)
                features, patches = features[index], patches[index]
            results.append((features, patches))
        return results

    def _encode(self, items: Sequence[Item]) -> dict[Any, IVTPImageFeatures]:
        """Return the tower's output for each picture, by its key; what is remembered is not computed again."""
        pixels = {key: pixel for item in items for key, pixel in zip(item.keys, item.pixel_values, strict=True)}
        options = self.config.pruning
        stage = options if self.plan() is not None else None
        missing = [key for key in pixels if (key, stage) not in self.remembered]
        found = {key: self.remembered[key, stage] for key in pixels if (key, stage) in self.remembered}
        for key in found:
            self.remembered.move_to_end((key, stage))
        for first in range(0, len(missing), AT_ONCE):
            keys = missing[first : first + AT_ONCE]
            for key, output in zip(keys, self._run_tower(torch.stack([pixels[key] for key in keys])), strict=True):
                found[key] = self.remembered[key, stage] = output
        self.encoded += len(missing)
        while len(self.remembered) > TOWER_OUTPUTS:
            self.remembered.popitem(last=False)
        return found

    def _run_tower(self, pixel_values: torch.Tensor) -> list[IVTPImageFeatures]:
        """Encode images (I, 3, height, width), and take the outputs apart."""
        dtype = next(self.vision_tower.parameters()).dtype
        output: Any = self.get_image_features(pixel_values.to(dtype), return_dict=True)
        if self.plan() is None:
            whole = torch.arange(self.config.num_patches, device=pixel_values.device)[None]
            return [IVTPImageFeatures(pooler_output=[one], kept_patches=whole) for one in output.pooler_output]
        return [
            IVTPImageFeatures(
                pooler_output=[features],
                **{
                    name: None if (value := getattr(output, name)) is None else value[at : at + 1].clone()
                    for name in _PER_IMAGE
                },
            )
            for at, features in enumerate(output.pooler_output)
        ]

    def _read(self, items: Iterable[Item]) -> None:
        """Let CLIP read the questions of several prompts together; `_prepare` finds their features in the cache."""
        if self.plan() is None or self.config.pruning.guidance != "clip" or self.config.clip_text_config is None:
            return
        windows = [window for item in items if item.clip_input_ids is not None for window in item.clip_input_ids]
        for first in range(0, len(windows), TOGETHER):
            ids = torch.stack(windows[first : first + TOGETHER])[None]
            self.text_features(ids.to(self.device), instruction_windows(ids))

    def _prepare(self, item: Item, encoded: dict[Any, IVTPImageFeatures]) -> _Guided | None:
        """Make the pseudo CLS of a prompt's images, and cut the prompt after the last of them. None: nothing drops."""
        plan, images = self.plan(), [encoded[key] for key in item.keys]
        if plan is None or item.prompt_ids is None:
            return None
        joined = IVTPImageFeatures(
            pooler_output=[image.pooler_output[0] for image in images],
            **{name: _joined([getattr(image, name) for image in images]) for name in _PER_IMAGE},
        )
        device = joined.pooler_output[0].device
        ids = item.prompt_ids[None].to(device)
        rest: dict[str, Any] = {
            name: None if value is None else value[None].to(device)
            for name, value in (("clip_input_ids", item.clip_input_ids), ("clip_spans", item.clip_spans))
        }
        prompt = PromptInputs(ids, **rest)
        index = self.index_prompt(prompt, plan, len(images))
        visual, embeds = build_prompt(self, prompt, index, joined, self.embed(ids), plan)
        if not drops(visual):
            return None
        patches = visual.sequence.patches
        visual, tokens = up_to_images(visual, embeds)
        return _Guided(Prefix.of(visual, tokens, torch.arange(prompt.length, device=device)[None]), patches)

    def _choose(self, prompts: dict[Any, _Guided]) -> dict[Any, torch.Tensor]:
        """Return the patches that stay of each prompt's images, (M, k) each; prompts of equal shapes run as a batch."""
        batches: dict[Any, list[Any]] = {}
        for name, prompt in prompts.items():
            batches.setdefault(prompt.prefix.visual.sequence.rows, []).append(name)
        stay: dict[Any, torch.Tensor] = {}
        for rows, names in batches.items():
            alike = [prompts[name].prefix for name in names]
            sequence = replace(alike[0].visual.sequence, rows=rows * len(alike))
            batch = Prefix(
                replace(alike[0].visual, sequence=sequence),
                {key: torch.cat([prefix.tensors[key] for prefix in alike]) for key in alike[0].tensors},
            )
            stay |= dict(zip(names, batch.choose(self.language_model), strict=True))
            self.chosen += 1
        return stay


def _joined(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    tensors = [value for value in values if value is not None]
    return torch.cat(tensors) if tensors else None
