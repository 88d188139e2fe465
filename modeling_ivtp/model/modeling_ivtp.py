"""LLaVA with instruction-guided visual token pruning: the two stages, wired into transformers' LLaVA."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)

from .checkpoint_ivtp import load_llava, naming_damaged_weights, register_weight_names
from .compat import CACHE, cache_of, one_cache
from .configuration_ivtp import IVTPLlavaConfig
from .controls import PruningControls, PruningOptions
from .cuda_graphs import Graphs
from .generation_ivtp import PrunedGeneration
from .instruction_cache import InstructionCache
from .language_ivtp import DECODERS
from .prompt import PromptIndex, PromptPruning, choose_features
from .prompt_graphs import MAX_GRAPHS, PromptCapture, PromptReplay
from .pruner import Choice, FeatureStep
from .schedule import PruningPlan
from .trace import TraceRecorder
from .vision_ivtp import GroupedCLIPVisionModel, PrunedVisionOutput

IMAGES = "image_outputs" if "image_outputs" in LlavaModelOutputWithPast.__dataclass_fields__ else "image_hidden_states"
"""Under which name LLaVA's outputs tell of the images: the former since transformers 5.24."""


@dataclass
class IVTPImageFeatures(BaseModelOutputWithPooling):
    """Features of images from which patches were dropped.

    Attributes
    ----------
    pooler_output : list of Tensor (k, d)
        Kept patches of each image, projected for the language model.
    kept_patches : int64 Tensor (I, k)
        Which patches they are, 0 to N - 1; N after those of an image that keeps fewer than others.
    cls_features : Tensor (I, d)
        The CLS token, projected the same way.
    image_embeds : Tensor (I, P) or None
        CLIP's embedding of the image (Eq. 6).
    patch_embeds : Tensor (I, k, P) or None
        The kept patches in CLIP's space, where a method compares them with the instruction.
    """

    kept_patches: torch.Tensor | None = None
    cls_features: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None


@dataclass
class IVTPLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output, and which columns of the prompt went through the whole decoder.

    Attributes
    ----------
    kept_tokens : bool Tensor (B, S) or None
        None: all did.
    """

    kept_tokens: torch.Tensor | None = None


class IVTPLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Base class: configuration and weight loading."""

    config_class = IVTPLlavaConfig
    config: Any


class IVTPLlavaModel(PromptReplay, PromptPruning, PruningOptions, IVTPLlavaPreTrainedModel, LlavaModel):
    """LLaVA without language model head, pruning its visual tokens in the vision tower and in the decoder.

    Parameters
    ----------
    config : IVTPLlavaConfig

    Raises
    ------
    ValueError
        For towers that pruning cannot serve, or pruning options that do not fit the layers.
    """

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        _check_architecture(config)
        self.vision_tower = GroupedCLIPVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = DECODERS[config.text_config.model_type]._from_config(config.text_config)
        self.instruction_cache = InstructionCache()
        self.graphs = Graphs(MAX_GRAPHS, automatic=True)
        if config.clip_text_config is not None:
            # These choose tokens; no gradient comes through a choice, so training leaves them as they are.
            self.clip_text_model = CLIPTextModelWithProjection._from_config(config.clip_text_config)
            self.visual_projection = nn.Linear(
                config.vision_config.hidden_size, config.clip_text_config.projection_dim, bias=False
            )
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        recorder: TraceRecorder | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of images in the language model's space, with patches dropped by the vision tower (stage 1).

        Parameters
        ----------
        pixel_values : Tensor (I, 3, height, width)
        vision_feature_layer, vision_feature_select_strategy
            As in LLaVA; default: the configuration's. Pruning needs the strategy "default".
        image_sizes
            Not supported under pruning.

        Returns
        -------
        IVTPImageFeatures; LLaVA's own output where pruning is off.
        """
        pruner, plan = self.pruner, self.plan()
        if plan is None:
            options = {"image_sizes": image_sizes} if image_sizes is not None else {}
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **options,
                **kwargs,
            )
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy != "default" or image_sizes is not None:
            raise ValueError(
                f'vision_feature_select_strategy="{strategy}", image_sizes={image_sizes}: pruning takes "default" and '
                "images of one size (image_sizes=None). Otherwise switch it off: model.pruning(enabled=False)."
            )
        return_dict = kwargs.pop("return_dict", True)
        kwargs.pop("output_hidden_states", None)
        wanted = (layers,) if isinstance(layers, int) else tuple(layers)

        def encode(pixel_values: torch.Tensor) -> IVTPImageFeatures:
            vision = self.vision_tower(
                pixel_values,
                pruner=pruner,
                plan=plan,
                feature_layers=wanted,
                to_the_top=self.has_text_tower and pruner.needs.image_embeds,
                scores=None if recorder is None else recorder.tower,
                **kwargs,
            )
            return self.image_outputs(vision, plan, pixel_values, recorder)

        outputs = None
        if recorder is None and self.replay_serves({"pixel_values": pixel_values}, kwargs):
            outputs = self.replay_images(encode, pixel_values, wanted)
        if outputs is None:
            outputs = encode(pixel_values)
        return outputs if return_dict else outputs.to_tuple()

    def image_outputs(
        self, vision: PrunedVisionOutput, plan: PruningPlan, pixel_values: torch.Tensor, recorder: Any = None
    ) -> IVTPImageFeatures:
        """What the language model gets of images, from what the vision tower made of them."""
        pruner, patches, choice = self.pruner, vision.patches, None
        if plan.features is None:
            features = self.multi_modal_projector(vision.features)
            cls, features = features[:, 0], features[:, 1:]
        else:
            step = FeatureStep(
                keep=plan.features,
                features=vision.features[:, 1:],
                patches=patches,
                records=vision.records,
                pixel_values=pixel_values,
                grid=self.config.grid,
                project=self.multi_modal_projector,
            )
            cls = self.multi_modal_projector(vision.features[:, :1])[:, 0]
            choice, patches, features = choose_features(pruner, step, recorder)
        return IVTPImageFeatures(
            pooler_output=_trimmed(features, patches < plan.patches) if choice and choice.ragged else list(features),
            kept_patches=patches,
            cls_features=cls,
            image_embeds=None if vision.pooler_output is None else self.visual_projection(vision.pooler_output),
            patch_embeds=self._patch_embeds(vision.features, choice) if pruner.needs.patch_embeds else None,
        )

    def _patch_embeds(self, features: torch.Tensor, choice: Choice | None) -> torch.Tensor:
        """What is left of an image in CLIP's space (I, k, P): a feature as if it were the tower's output for CLS."""
        left = features[:, 1:] if choice is None else choice.of(features[:, 1:])
        return self.visual_projection(self.vision_tower.post_layernorm(left))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        clip_input_ids: torch.LongTensor | None = None,
        clip_spans: torch.LongTensor | None = None,
        recorder: TraceRecorder | None = None,
        past_key_values: Cache | None = None,
        drafted: int = 0,
        prompt_index: PromptIndex | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run LLaVA on a prompt, keeping of each image what its question needs.

        Parameters
        ----------
        input_ids, pixel_values, attention_mask, position_ids, cache (or past_key_values), inputs_embeds,
        vision_feature_layer, vision_feature_select_strategy, image_sizes, mm_encoder_outputs
            As in `LlavaModel`: one image token per patch, whatever is dropped later.
        clip_input_ids : int64 Tensor (B, W, C), optional
            The instruction in CLIP's tokens, from `IVTPLlavaProcessor`.
        clip_spans : int64 Tensor (B, S, 2), optional
            Which of them overlap each token of the prompt, counted from the end.
        recorder : TraceRecorder, optional
            Collects what `explain` shows.
        drafted : int, default 0
            Last columns that an assistant proposes: they are no words of the prompt, and choose nothing.
        prompt_index : PromptIndex, optional
            What `read` told of this very prompt, so that the host does not wait for the device here. `generate` passes
            it.

        Returns
        -------
        IVTPLlavaModelOutputWithPast
            `last_hidden_state` (B, S, d), zero at dropped tokens; a row that ends on one ends with the last token left.
        """
        cache = one_cache(cache, past_key_values)
        encoded = (mm_encoder_outputs or {}).get("image")
        # Without an image there is nothing to plan: a decoding step costs no more than this look.
        plan = None if pixel_values is None and encoded is None else self.plan()
        if plan is None:
            options = {"mm_encoder_outputs": mm_encoder_outputs} if mm_encoder_outputs is not None else {}
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                **{CACHE: cache},
                **options,
                **kwargs,
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and encoded is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        return_dict = kwargs.pop("return_dict", None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if prompt_index is None or torch.compiler.is_compiling():
            prompt_index = self.read(
                plan=plan,
                images=pixel_values.shape[0] if encoded is None else len(encoded.pooler_output),  # type: ignore[union-attr]
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past=past,
                clip_input_ids=clip_input_ids,
                drafted=drafted,
                known=prompt_index,
            )
        if prompt_index.sequence.valid is None and past == 0:
            attention_mask = None  # where nothing is padded, no layer has to look for it
        if encoded is None:
            encoded = self.get_image_features(
                pixel_values,  # type: ignore[arg-type]
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                recorder=recorder,
            )
        kept = getattr(encoded, "kept_patches", None)
        if kept is None or kept.shape[1] > plan.encoded_tokens or (kept.shape[1] < plan.encoded_tokens and plan.exact):
            raise ValueError(
                f"mm_encoder_outputs holds {'all' if kept is None else kept.shape[1]} patches of an image, the options "
                f"in force {plan.encoded_tokens}: encode it with get_image_features under the same pruning options."
            )
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"clip_input_ids": clip_input_ids, "clip_spans": clip_spans}
        plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
        alone = cache is None or (plain and past == 0)
        outputs = None
        if (
            alone
            and recorder is None
            and not drafted
            and inputs_embeds is None
            and kwargs.get("use_cache")
            and prompt_index.sequence.order is None
            and self.replay_serves(given, kwargs)
        ):
            outputs = self.replay_prompt(self._run_prompt, prompt_index, encoded, given, cache)
        if outputs is None:
            outputs = self._run_prompt(
                encoded=encoded,
                prompt_index=prompt_index,
                cache=cache,
                inputs_embeds=inputs_embeds,
                recorder=recorder,
                **given,
                **kwargs,
            )
        result = IVTPLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=None,
            kept_tokens=outputs.kept_tokens,
            **{CACHE: cache_of(outputs)},
            **{IMAGES: encoded if IMAGES == "image_outputs" else torch.cat(encoded.pooler_output)},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _run_prompt(
        self,
        encoded: Any,
        prompt_index: PromptIndex,
        cache: Cache | None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        clip_input_ids: torch.Tensor | None = None,
        clip_spans: torch.Tensor | None = None,
        recorder: TraceRecorder | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder on a prompt whose images are encoded: PrunedDecoderOutput."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None
        plan = self.plan()
        assert plan is not None
        visual, inputs_embeds = self.visual_prompt(
            plan=plan,
            prompt_index=prompt_index,
            encoded=encoded,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past=0 if cache is None else int(cache.get_seq_length()),
            clip_input_ids=clip_input_ids,
            clip_spans=clip_spans,
            recorder=recorder,
        )
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            visual=visual,
            **kwargs,
        )


class IVTPLlavaForConditionalGeneration(
    PruningControls,
    PromptCapture,
    PrunedGeneration,
    IVTPLlavaPreTrainedModel,
    LlavaForConditionalGeneration,
    GenerationMixin,
):
    """LLaVA that answers from a fraction of its visual tokens.

    Takes what `LlavaForConditionalGeneration` takes and returns what it returns.

    Examples
    --------
    >>> model = IVTPLlavaForConditionalGeneration.from_llava(
    ...     "llava-hf/llava-1.5-7b-hf", clip="openai/clip-vit-large-patch14-336"
    ... )  # doctest: +SKIP
    >>> model.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
    """

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = IVTPLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does, and name a weights file that is damaged or cut short.

        Raises
        ------
        OSError
            If a weights file cannot be read.
        """
        with naming_damaged_weights(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_llava(
        cls,
        llava: Any,
        clip: Any = None,
        *,
        pruning: Any = None,
        clip_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a LLaVA checkpoint and join CLIP's text tower and projections to it.

        Parameters
        ----------
        llava : str or path
            A LLaVA folder or Hub id in transformers' format, or one of ours.
        clip : str or path, optional
            Where CLIP's text half comes from: a transformers CLIP folder or Hub id. With the package installed also an
            open_clip name such as "open_clip:ViT-L-14-336/openai", or an open_clip weights file (safetensors). None: no
            text tower, and the image's CLS token guides the language model.
        pruning : IVTPPruningConfig or dict, optional
        clip_options : dict, optional
            Options for CLIP alone: `revision`, `activation` (default: the vision tower's), and access to the Hub
            (`token`, `cache_dir`, `local_files_only`; default: that of `kwargs`).
        **kwargs
            For `from_pretrained`: dtype, device_map, attn_implementation, quantization_config, …

        Raises
        ------
        ImportError
            If `clip` is of open_clip and the package is not installed.
        ValueError
            If tower and CLIP do not fit, or a checkpoint has missing or unexpected weights.
        """
        return load_llava(cls, llava, clip, pruning=pruning, clip_options=clip_options, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        clip_input_ids: torch.LongTensor | None = None,
        clip_spans: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss if `labels` are given.

        Parameters
        ----------
        labels : int64 Tensor (B, S), optional
            As in LLaVA. A token that was dropped predicts nothing, so the label right after it is left out.
        clip_input_ids : int64 Tensor (B, W, C), optional
        clip_spans : int64 Tensor (B, S, 2), optional
            The instruction, from `IVTPLlavaProcessor`.
        **kwargs
            Everything else as in `LlavaForConditionalGeneration`.

        Returns
        -------
        LlavaCausalLMOutputWithPast
            `logits` (B, S, vocabulary) line up with `input_ids`. Those of dropped tokens mean nothing, but for a row's
            last one, which the last token that is left answers for.
        """
        return_dict = kwargs.pop("return_dict", None)
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            clip_input_ids=clip_input_ids,
            clip_spans=clip_spans,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Rows that lie apart would each read the head's weights anew.
        logits = self.lm_head(hidden_states[:, rows, :].contiguous())
        loss = None
        if labels is not None:
            kept = getattr(outputs, "kept_tokens", None)
            if kept is not None:
                predicted = nn.functional.pad(kept[:, :-1], (1, 0), value=True)
                labels = labels.masked_fill(~predicted.to(labels.device), -100)  # type: ignore[assignment]
            for name in ("mm_encoder_outputs", "recorder"):
                kwargs.pop(name, None)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        result = LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()


def _trimmed(features: torch.Tensor, there: torch.Tensor) -> list[torch.Tensor]:
    """The features (I, k, d) of each image, those that are there (bool (I, k), the first ones) alone."""
    return [image[:count] for image, count in zip(features, there.sum(1).tolist(), strict=True)]


def _check_architecture(config: Any) -> None:
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
    config.pruning_plan()


register_weight_names()
# `generate` asks for it at every step of a class that is published with its code.
IVTPLlavaForConditionalGeneration.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    IVTPLlavaForConditionalGeneration.forward
)
IVTPLlavaModel.register_for_auto_class("AutoModel")
IVTPLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
