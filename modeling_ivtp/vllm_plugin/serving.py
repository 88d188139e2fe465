"""IVTP-LLaVA as a model of vLLM: its decoder is vLLM's, and images come pruned."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..model.language_ivtp import DECODERS
from . import check_version
from .budget import BUDGET, Budgets, moves_positions, options_for, plan_for
from .encoding import ImageEncoder, Item
from .prefix_decoder import Devices
from .processing import ServedDummyInputs, ServedProcessingInfo, ServedProcessor

check_version(vllm.__version__)

PLACES = 2
"""Channels after an image's features: row and column of the patch, which every floating-point type holds exactly."""


@MULTIMODAL_REGISTRY.register_processor(ServedProcessor, info=ServedProcessingInfo, dummy_inputs=ServedDummyInputs)
class IVTPLlavaForConditionalGeneration(LlavaForConditionalGeneration, SupportsMRoPE):
    """vLLM's LLaVA with the vision tower and the pruning of the transformers engine.

    Parameters
    ----------
    vllm_config : VllmConfig
    prefix : str
        Of the names of weights.

    Raises
    ------
    ValueError
        For what the plug-in does not support.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            # Names of all versions of transformers, of official checkpoints and of those that it saved itself.
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "",
            "vision_tower.vision_model.": "vision_tower.",
            "vision_tower.": "images.vision_tower.",
            "multi_modal_projector.": "images.multi_modal_projector.",
            "clip_text_model.": "images.clip_text_model.",
            "visual_projection.": "images.visual_projection.",
        }
    )
    supports_tower_connector_lora = False
    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config: Any = vllm_config.model_config.hf_config
        self.config, self.multimodal_config = config, vllm_config.model_config.multimodal_config
        _check(config, vllm_config)
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index]
        )
        if config.text_config.architectures is None:
            names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
            config.text_config.architectures = [names[config.text_config.model_type]]
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        for part in (config, config.vision_config, config.text_config, config.clip_text_config):
            if part is not None:
                part._attn_implementation = "sdpa"
        with self._mark_tower_model(vllm_config, "image"):
            self.images = ImageEncoder(config, self.language_model.model, _devices())
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        server = None if self.multimodal_config is None else self.multimodal_config.mm_processor_kwargs
        self.budgets = Budgets(config, server)
        if self.moves_positions and self.multimodal_config is not None:
            # The runners ask a model for positions where this answers yes, which by itself means a rate for videos.
            self.multimodal_config.__dict__["is_multimodal_pruning_enabled"] = partial(bool, True)

    @property
    def moves_positions(self) -> bool:
        """Return whether kept tokens stand at their original positions, which are known once an image is encoded."""
        return moves_positions(self.config)

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """Return the features that stay of each image, (k, d), or (k, d + 2) with their places if positions move."""
        if kwargs.get("pixel_values") is None:
            return []
        columns = self.config.grid[1]
        outputs = []
        for features, patches in self.images.features_of(_items(kwargs)):
            if self.moves_positions:
                places = torch.stack([patches // columns, patches % columns], -1).to(features)
                features = torch.cat([features, places], -1)
            outputs.append(features)
        return outputs

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Lay a prompt out as if nothing was dropped; where an image's tokens stand in it is not known yet.

        Returns
        -------
        int64 Tensor (3, tokens)
            Positions. The second channel holds, for an image's tokens, the position of its first patch.
        int
            How far positions of later tokens are ahead of their number.
        """
        positions = torch.arange(len(input_tokens)).repeat(3, 1)
        extra = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            first, count = feature.mm_position.offset, feature.mm_position.length
            if not self.moves_positions:
                continue
            positions[1:, first : first + count] = first + extra
            more = self.config.num_patches - count
            positions[:, first + count :] += more
            extra += more
        return positions, extra

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Move the image tokens of a step to their places, and cut those off their features.

        Parameters
        ----------
        input_ids : list of int or Tensor (tokens,)
            The whole prompt.
        multimodal_embeddings : sequence of Tensor (any, d + 2)
            Those of its image tokens that the step computes.
        mrope_positions : int64 Tensor (3, tokens)
        num_computed_tokens : int
            Tokens before the step.
        """
        ids = torch.as_tensor(input_ids, device="cpu")
        image = ids == self.config.image_token_index
        columns = image.nonzero()[:, 0]
        columns = columns[columns >= num_computed_tokens]
        positions = mrope_positions.clone()
        if multimodal_embeddings:
            places = torch.cat([one[:, -PLACES:] for one in multimodal_embeddings]).round().long()
            patches = (places[:, 0] * self.config.grid[1] + places[:, 1]).to(positions.device)
            columns = columns[: len(patches)]
            positions[0, columns] = positions[1, columns] + patches
        last = int(positions[1, -1]) + (self.config.num_patches - 1 if bool(image[-1]) else 0)
        return [one[:, :-PLACES] for one in multimodal_embeddings], positions, last + 1 - len(ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the decoder; positions (3, tokens) have one channel that counts."""
        positions = positions[0] if positions.dim() == 2 else positions
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return where the parts of the model are, for adapters."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="images.multi_modal_projector",
            tower_model="images.vision_tower",
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's weights, under the names of any version of transformers."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _items(kwargs: dict[str, Any]) -> list[Item]:
    """Take the fields of a batch of images apart."""
    count = len(kwargs["pixel_values"])

    def of(name: str, at: int) -> Any:
        return None if kwargs.get(name) is None else kwargs[name][at]

    return [
        Item(
            pixel_values=of("pixel_values", at),
            keys=tuple(tuple(key) for key in of("picture_keys", at).tolist()),
            number=int(of("image_number", at)),
            visual_tokens=int(of(BUDGET, at)),
            prompt_ids=of("prompt_ids", at),
            clip_input_ids=of("clip_input_ids", at),
            clip_spans=of("clip_spans", at),
        )
        for at in range(count)
    ]


def _devices() -> Devices | None:
    """Return the devices that share the decoder's heads, None if there is one."""
    count = get_tensor_model_parallel_world_size()
    return Devices(count, tensor_model_parallel_all_reduce) if count > 1 else None


def _check(config: Any, vllm_config: VllmConfig) -> None:
    """Refuse what the plug-in does not support, before anything is loaded."""
    if config.text_config.model_type not in DECODERS:
        raise ValueError(f"text_config.model_type={config.text_config.model_type!r}; allowed: {', '.join(DECODERS)}.")
    if config.vision_config.model_type != "clip_vision_model" or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_config.model_type={config.vision_config.model_type!r}, vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r}; allowed: 'clip_vision_model' and 'default'."
        )
    if config.connector is not None:
        raise ValueError(f"connector={config.connector}: the plug-in serves no connectors; allowed: None.")
    if not config.pruning.enabled:
        return
    options_for(config, config.pruning.visual_tokens)  # refuses a pooled pseudo CLS
    plan = plan_for(config, config.pruning.visual_tokens)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if plan is not None and plan.decoder and stages > 1:
        raise ValueError(
            f"pipeline_parallel_size={stages}: the question-guided stage needs the decoder's first layers on every "
            "device; allowed: 1, or decoder_layers=0 (the vision tower alone prunes)."
        )
    if plan is not None and plan.decoder and config.pruning.guidance == "clip" and config.clip_text_config is None:
        if config.pruning.strict:
            raise ValueError("pruning.strict=True, and this checkpoint has no CLIP text tower that the question needs.")
        init_logger(__name__).warning(
            "This checkpoint has no CLIP text tower to read questions with: the picture's own CLS guides instead."
        )
