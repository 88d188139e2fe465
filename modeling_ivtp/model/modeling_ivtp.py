"""LLaVA with instruction-guided visual token pruning: the two stages, wired into transformers' LLaVA."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)

from .adapter import naming_adapter
from .ahead import choose_ahead
from .checkpoint_ivtp import load_llava, naming_damaged_weights, register_weight_names, sparing, with_our_names
from .compat import CACHE, cache_argument, cache_of, check_export, copied, is_exporting, one_cache
from .configuration_ivtp import IVTPLlavaConfig, IVTPPruningConfig
from .connector_options import without_pruning
from .connectors import CONNECTORS, Question, join_connector, make_connector, question_of_images
from .generation_ivtp import PrunedGeneration
from .guide import InstructionGuide, asks
from .instruction_cache import InstructionCache
from .labels import TEXT_TOWER, labelled
from .language_ivtp import DECODERS, check_architecture, refuse_flex_attention
from .outputs import (
    IMAGES,
    IVTPImageFeatures,
    answers_of,
    check_encoded,
    kept_columns,
    model_output,
    training_targets,
    trimmed,
    without_targets,
)
from .prompt import PromptIndex, PromptInputs, build_prompt, choose_features, index_prompt
from .prompt_graphs import MAX_GRAPHS, PromptGraphs
from .pruner import Choice, FeatureStep, IVTPPruner, Pruner
from .schedule import PruningPlan
from .trace import PruningTrace, TraceRecorder
from .vision_ivtp import GroupedCLIPVisionModel, PrunedVisionOutput

CHOOSING = ("clip_text_model", "visual_projection")
"""Parts of the model that serve nothing but the choice of tokens."""
HEAD = "lm_head.weight"
"""The language model's head, by its name among the weights."""
SPARED = (*CHOOSING, "connector")
"""Parts that a quantisation is told to leave out."""


class IVTPLlavaPreTrainedModel(LlavaPreTrainedModel):
    """LLaVA's base class with pruning options that can be changed."""

    config_class = IVTPLlavaConfig
    config: Any
    _no_split_modules = [connector.__name__ for connector in CONNECTORS.values()]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, tuple(CONNECTORS.values())):
            module.start()  # type: ignore[operator]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does, with CLIP's text tower, projection and a connector unquantised.

        They are left out by name, so a format whose configuration has no list of modules to leave out (HQQ, AQLM)
        quantises them, too. An error names a weights file that is damaged or cut short.

        Raises
        ------
        OSError
            If a weights file cannot be read, or the checkpoint is a LoRA adapter alone.
        ValueError
            If the checkpoint lacks the language model's head, and `output_loading_info` does not ask what is missing.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = sparing(
                kwargs["quantization_config"], [*SPARED, *(f"model.{name}" for name in SPARED)]
            )
        wanted = kwargs.pop("output_loading_info", False)
        source = pretrained_model_name_or_path
        with naming_adapter(source, **kwargs), naming_damaged_weights(source):
            model, info = super().from_pretrained(source, *args, **kwargs, output_loading_info=True)
        if wanted:
            return model, info
        if HEAD in info["missing_keys"]:
            raise ValueError(
                f"{source} has no {HEAD}: it was saved from a bare model, which cannot answer. Load it with "
                "IVTPLlavaModel.from_pretrained, or save the whole model."
            )
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights as PyTorch does, by the model's own names or by the official ones.

        `save_pretrained` writes official names, and Trainer reads them back by this method when it resumes a run; it
        would leave out all that it does not know.
        """
        return super().load_state_dict(with_our_names(self, state_dict), *args, **kwargs)

    @property
    def pruning_config(self) -> IVTPPruningConfig:
        """The options in force."""
        return self.config.pruning

    def set_pruning(self, **options: Any) -> None:
        """Change pruning options for good; `save_pretrained` keeps them.

        Raises
        ------
        ValueError
            For an option that is unknown, out of range, or does not fit this model. Nothing changes then.
        """
        self._use_pruning(self.config.pruning.changed(**options))

    @contextmanager
    def pruning(self, **options: Any) -> Iterator[None]:
        """Change pruning options inside a `with` block; blocks nest, and an exception undoes them too.

        The options belong to the model, not to the thread: a model that several threads share needs a lock around this.

        Examples
        --------
        >>> with model.pruning(enabled=False):  # doctest: +SKIP
        ...     stock = model.generate(**inputs)
        """
        before = self.config.pruning
        self._use_pruning(before.changed(**options))
        try:
            yield
        finally:
            self._use_pruning(before)

    def _use_pruning(self, pruning: IVTPPruningConfig) -> None:
        before = self.config.pruning
        if getattr(getattr(self, "model", self), "applied_pruner", None) is not None:
            raise ValueError(
                "Another method prunes this model, and its own options have no effect: leave that method's `with` "
                "block first."
            )
        self.config.pruning = pruning
        try:
            self.config.check_connector()
            self.config.pruning_plan()
        except ValueError:
            self.config.pruning = before
            raise


class IVTPLlavaModel(IVTPLlavaPreTrainedModel, LlavaModel):
    """LLaVA without language model head, pruning its visual tokens in the vision tower and in the decoder.

    Changed of `LlavaModel`: the vision tower and the decoder are the grouped ones, CLIP's text tower stands beside
    them, and `forward` chooses tokens on the way, or a connector makes them.

    Parameters
    ----------
    config : IVTPLlavaConfig

    Raises
    ------
    ValueError
        For towers that pruning cannot serve, or pruning options that do not fit the layers.
    """

    applied_pruner: Pruner | None = None
    """Pruner in place of the model's own options, for a while; `modeling_ivtp.methods` sets it."""

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        check_architecture(config)
        self.vision_tower = GroupedCLIPVisionModel._from_config(config.vision_config)
        if (connector := make_connector(config)) is not None:
            self.connector = connector
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = DECODERS[config.text_config.model_type]._from_config(config.text_config)
        self.instruction_cache = InstructionCache()
        self.prompt_graphs = PromptGraphs()
        self.guide = InstructionGuide()
        if config.clip_text_config is not None:
            self.clip_text_model = CLIPTextModelWithProjection._from_config(config.clip_text_config)
            self.visual_projection = nn.Linear(
                config.vision_config.hidden_size, config.clip_text_config.projection_dim, bias=False
            )
        self.post_init()
        self.train(self.training)

    @property
    def pruner(self) -> Pruner:
        """The pruner: IVTP with the model's own options, unless a method was applied."""
        return self.applied_pruner or IVTPPruner(self.config.pruning)

    def plan(self) -> PruningPlan | None:
        """Lay out how many tokens stay where; None if nothing is to be dropped.

        Raises
        ------
        ValueError
            If the options, or the applied method, do not fit the model.
        """
        plan = self.pruner.plan(self.config, self.config.num_patches)
        if plan is not None and self.has_connector:
            raise ValueError(f"Pruning chooses among patches, and this model's {self.config.connector} leaves none.")
        return plan

    @property
    def has_connector(self) -> bool:
        """Return whether a connector makes the visual tokens of this model."""
        return hasattr(self, "connector")

    @property
    def has_text_tower(self) -> bool:
        """Return whether CLIP's text tower is part of this model."""
        return hasattr(self, "clip_text_model")

    def train(self, mode: bool = True) -> Any:
        """Set training mode as PyTorch does; CLIP's text tower and projection stay frozen (Fig. 2).

        They choose tokens, and no gradient comes through a choice: as trainable weights, adapters on them included,
        they would stop data-parallel training at its second step.
        """
        super().train(mode)
        for name in CHOOSING:
            if hasattr(self, name):
                getattr(self, name).requires_grad_(False)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # The model is moved or cast: no captured graph is valid, and its memory is wanted back now.
        if (graphs := getattr(self, "prompt_graphs", None)) is not None:
            graphs.graphs.forget()
        return super()._apply(*args, **kwargs)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        recorder: TraceRecorder | None = None,
        question: Question | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images for the language model, dropping patches in the vision tower (stage 1).

        Parameters
        ----------
        pixel_values : Tensor (I, 3, height, width)
        vision_feature_layer, vision_feature_select_strategy
            As in LLaVA; default: the configuration's. Pruning and connectors need the strategy "default".
        image_sizes
            Not supported under pruning, nor with a connector.
        recorder : TraceRecorder, optional
            Collects what `explain` shows.
        question : Question, optional
            Of each image, for a connector that reads it; `forward` and `generate` pass it.

        **kwargs
            As in LLaVA: `return_dict`, and `output_hidden_states` for the tower's, each with the patches left there.

        Returns
        -------
        IVTPImageFeatures; LLaVA's own output where pruning is off.
        """
        plan = self.plan()
        if plan is None and not self.has_connector:
            options = {"image_sizes": image_sizes} if image_sizes is not None else {}
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **options,
                **kwargs,
            )
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy != "default" or image_sizes is not None:
            otherwise = "" if plan is None else " Otherwise switch it off: model.pruning(enabled=False)."
            raise ValueError(
                f'vision_feature_select_strategy="{strategy}", image_sizes={image_sizes}: '
                f'{"a connector" if plan is None else "pruning"} takes "default" and images of one size '
                f"(image_sizes=None).{otherwise}"
            )
        if pixel_values.dim() != 4:
            raise ValueError(
                f"pixel_values has {pixel_values.dim()} dimensions; allowed: 4, (images, 3, height, width). Images in "
                "tiles, as LLaVA-1.6 has them, are not supported."
            )
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        feature_layers = (layers,) if isinstance(layers, int) else tuple(layers)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if kwargs.get("output_hidden_states") is None and self.config.vision_config.output_hidden_states:
            kwargs["output_hidden_states"] = True
        if kwargs.pop("output_attentions", None) and plan is not None:
            raise ValueError(
                "output_attentions=True: under pruning each layer's attention map has another size. Use "
                "model.explain(...) to see what was kept and why, or switch pruning off: model.pruning(enabled=False)."
            )

        if plan is None:
            connected = self._connect_images(pixel_values, feature_layers, question, kwargs)
            return connected if return_dict else connected.to_tuple()
        refuse_flex_attention(self.language_model.config)

        def encode(pixel_values: torch.Tensor) -> IVTPImageFeatures:
            return self._encode_images(pixel_values, plan, feature_layers, recorder, kwargs)

        outputs = None
        if recorder is None:
            outputs = self.prompt_graphs.replay_images(self, encode, pixel_values, feature_layers, kwargs)
        if outputs is None:
            outputs = encode(pixel_values)
        return outputs if return_dict else outputs.to_tuple()

    def _encode_images(
        self,
        pixel_values: torch.Tensor,
        plan: PruningPlan,
        feature_layers: tuple[int, ...],
        recorder: TraceRecorder | None,
        options: dict[str, Any],
    ) -> IVTPImageFeatures:
        """Run the vision tower and the projector on images."""
        pruner = self.pruner
        vision = self.vision_tower(
            pixel_values,
            pruner=pruner,
            plan=plan,
            feature_layers=feature_layers,
            to_the_top=self.has_text_tower and pruner.needs.image_embeds,
            scores=None if recorder is None else recorder.tower,
            **options,
        )
        return self.image_outputs(vision, plan, pixel_values, recorder)

    def _connect_images(
        self,
        pixel_values: torch.Tensor,
        feature_layers: tuple[int, ...],
        question: Question | None,
        options: dict[str, Any],
    ) -> BaseModelOutputWithPooling:
        """Run the whole vision tower, the connector and the projector on images."""
        vision = self.vision_tower(
            pixel_values,
            pruner=self.pruner,
            plan=PruningPlan(self.config.num_patches),
            feature_layers=feature_layers,
            to_the_top=False,
            **options,
        )
        ready, tokens = self.connector(vision.features[:, 1:], question)
        features = self.multi_modal_projector(tokens)
        if ready is not None:
            features = torch.cat([ready.to(features), features], 1)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=list(features),
            hidden_states=vision.hidden_states,
        )

    def image_outputs(
        self, vision: PrunedVisionOutput, plan: PruningPlan, pixel_values: torch.Tensor, recorder: Any = None
    ) -> IVTPImageFeatures:
        """Project the vision tower's output for the language model; methods that choose among features choose here."""
        pruner, patches, choice = self.pruner, vision.patches, None
        if plan.features is None:
            features = self.multi_modal_projector(vision.features)
            cls, features = features[:, 0], features[:, 1:]
        else:
            step = FeatureStep(
                keep=plan.features,
                features=vision.features[:, 1:],
                cls=vision.features[:, 0],
                patches=patches,
                records=vision.records,
                pixel_values=pixel_values,
                grid=self.config.grid,
                project=self.multi_modal_projector,
            )
            cls = self.multi_modal_projector(vision.features[:, :1])[:, 0]
            choice, patches, features = choose_features(pruner, step, recorder)
        return IVTPImageFeatures(
            pooler_output=trimmed(features, patches < plan.patches) if choice and choice.ragged else list(features),
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            kept_patches=patches,
            cls_features=cls,
            image_embeds=None if vision.pooler_output is None else self.visual_projection(vision.pooler_output),
            patch_embeds=self._patch_embeds(vision.features, choice) if pruner.needs.patch_embeds else None,
        )

    def _patch_embeds(self, features: torch.Tensor, choice: Choice | None) -> torch.Tensor:
        """Project the patches that are left into CLIP's space (I, k, P), as CLIP projects the CLS."""
        kept = features[:, 1:] if choice is None else choice.of(features[:, 1:], features[:, 0])
        return self.visual_projection(self.vision_tower.post_layernorm(kept))

    @labelled(TEXT_TOWER)
    def text_features(
        self, clip_input_ids: torch.Tensor, windows: tuple[tuple[int, ...], ...] | None = None
    ) -> torch.Tensor:
        """Compute CLIP's features of the instruction's tokens (Eq. 5): (B, W, C) to (B, W x C, P).

        With `windows`, which the host has read, padding is left out and gets zeros, and windows whose features are
        known are not computed again, except in training.
        """
        tower, ids = self.clip_text_model, clip_input_ids.flatten(0, 1)

        def encode(ids: torch.Tensor) -> torch.Tensor:
            return tower.text_projection(tower.text_model(input_ids=ids).last_hidden_state)

        if windows is None:
            features = encode(ids)
        else:
            cache = InstructionCache(0) if self.training else self.instruction_cache
            features = cache.features(tower, ids, windows, encode)
        return features.unflatten(0, clip_input_ids.shape[:2]).flatten(1, 2)

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Return where an image token stands, as a number or as its embedding: bool Tensor (B, S)."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def prepare_prompt(
        self, prompt: PromptInputs, plan: PruningPlan, images: int, known: PromptIndex | None = None
    ) -> tuple[PromptInputs, PromptIndex]:
        """Return a prompt with the inputs that tell the question, and its index.

        See `InstructionGuide.complete` and `prompt.index_prompt`. Call it before the device has work: the host waits
        for it here, and nowhere later.
        """
        guide: InstructionGuide | None = getattr(self, "guide", None)  # a stock model in our classes has none
        if guide is None:
            return prompt, self.index_prompt(prompt, plan, images, known)
        prompt = guide.complete(self, prompt)
        index = self.index_prompt(prompt, plan, images, known)
        if index.misplaced:
            prompt = guide.complete(self, prompt, misplaced=True)
            index = self.index_prompt(replace(prompt, clip_spans=None), plan, images, known)
        return prompt, index

    def index_prompt(
        self, prompt: PromptInputs, plan: PruningPlan, images: int, known: PromptIndex | None = None
    ) -> PromptIndex:
        """Find images and words of a prompt; see `prompt.index_prompt`."""
        placeholders, needs = self.placeholders(prompt.input_ids, prompt.inputs_embeds), self.pruner.needs
        by_clip = needs.pseudo_cls and needs.options.guidance == "clip" and self.has_text_tower
        return index_prompt(
            placeholders,
            prompt.valid_tokens(placeholders.device),
            images=images,
            patches=plan.patches,
            drafted=prompt.drafted,
            clip_input_ids=prompt.clip_input_ids if needs.patch_embeds or by_clip else None,
            spans=prompt.new_spans(placeholders) if asks(needs, self.has_text_tower) else None,
            known=known,
        )

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
        answers: torch.Tensor | None = None,
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
            The index of this very prompt, so that the host does not wait for the device here. `generate` passes it.
        answers : bool Tensor (B, S), optional
            Where an answer stands that is to be learned: it chooses nothing, for it is not there at inference.

        Returns
        -------
        IVTPLlavaModelOutputWithPast
            `last_hidden_state` (B, S, d), zero at dropped tokens; a row that ends on a dropped token ends with the
            last token that is left.
        """
        cache = cache_argument(cache, past_key_values)
        encoded: Any = (mm_encoder_outputs or {}).get("image")
        images: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
        }
        # Without an image there is nothing to plan: a decoding step costs no more than this look.
        plan = None if pixel_values is None and encoded is None else self.plan()
        if is_exporting() and kwargs.get("use_cache", self.config.text_config.use_cache) is not False:
            check_export(pruned=plan is not None)
        if plan is None and self.has_connector and (pixel_values is not None or encoded is not None):
            past = 0 if cache is None else int(cache.get_seq_length())
            prompt = PromptInputs(
                input_ids, inputs_embeds, attention_mask, position_ids, clip_input_ids, clip_spans, past, drafted
            )
            return self._forward_connected(prompt, pixel_values, encoded, cache, images, **kwargs)
        if plan is None:
            if mm_encoder_outputs is not None:
                kwargs["mm_encoder_outputs"] = mm_encoder_outputs
            tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            tokens |= {"inputs_embeds": inputs_embeds, "pixel_values": pixel_values, CACHE: cache}
            return super().forward(**tokens, **images, **kwargs)
        if pixel_values is not None and encoded is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        return_dict = kwargs.pop("return_dict", None)
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt = PromptInputs(
            input_ids, inputs_embeds, attention_mask, position_ids, clip_input_ids, clip_spans, past, drafted
        )
        if prompt_index is None or torch.compiler.is_compiling():
            count = pixel_values.shape[0] if pixel_values is not None else len(encoded.pooler_output)
            prompt, prompt_index = self.prepare_prompt(prompt, plan, count, known=prompt_index)
        if answers is not None:
            prompt_index = replace(prompt_index, sequence=replace(prompt_index.sequence, answers=answers))
        if prompt_index.sequence.valid is None and past == 0:
            prompt = replace(prompt, attention_mask=None)  # where nothing is padded, no layer has to look for it
        if encoded is None:
            assert pixel_values is not None
            encoded = self.get_image_features(pixel_values, recorder=recorder, return_dict=True, **images)
        check_encoded(encoded, plan)
        outputs = None
        if recorder is None and answers is None:
            outputs = self.prompt_graphs.replay_prompt(self, prompt, prompt_index, encoded, cache, kwargs)
        if outputs is None:
            outputs = self.decode_prompt(prompt, prompt_index, encoded, cache, recorder, **kwargs)
        return model_output(outputs, encoded, self.config.return_dict if return_dict is None else return_dict)

    def read_question(self, prompt: PromptInputs, images: int) -> Question | None:
        """Read the question of each image for the connector; None where it reads none, or there is none."""
        if not (self.has_connector and self.config.connector.reads_question):
            return None
        return question_of_images(self, self.guide.read(self, prompt), images)

    def _forward_connected(
        self,
        prompt: PromptInputs,
        pixel_values: torch.Tensor | None,
        encoded: Any,
        cache: Cache | None,
        images: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """Run LLaVA on a prompt with a connector's tokens in place of the image tokens."""
        if pixel_values is not None and encoded is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if encoded is None:
            assert pixel_values is not None
            question = self.read_question(prompt, pixel_values.shape[0])
            encoded = self.get_image_features(pixel_values, question=question, return_dict=True, **images)
        embeds = prompt.inputs_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(prompt.input_ids)
        features = torch.cat(encoded.pooler_output).to(embeds.device, embeds.dtype)
        marks = self.placeholders(prompt.input_ids, prompt.inputs_embeds)
        if not torch.compiler.is_compiling() and int(marks.sum()) != len(features):
            raise ValueError(
                f"Image features and image tokens do not match: tokens: {int(marks.sum())}, features: {len(features)}. "
                f"The processor needs connector_tokens={self.config.connector.tokens}."
            )
        outputs = super().forward(
            inputs_embeds=embeds.masked_scatter(marks[..., None].to(embeds.device), features),
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        outputs[IMAGES] = encoded if IMAGES == "image_outputs" else features
        return outputs if return_dict else outputs.to_tuple()

    def decode_prompt(
        self,
        prompt: PromptInputs,
        index: PromptIndex,
        encoded: IVTPImageFeatures,
        cache: Cache | None,
        recorder: TraceRecorder | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build the decoder's prompt from encoded images and run the decoder on it: PrunedDecoderOutput."""
        plan, inputs_embeds = self.plan(), prompt.inputs_embeds
        assert plan is not None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(prompt.input_ids)
        visual, inputs_embeds = build_prompt(self, prompt, index, encoded, inputs_embeds, plan, recorder)
        if plan.ahead:
            visual, inputs_embeds = choose_ahead(self, prompt, visual, inputs_embeds, cache)
        return self.language_model(
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            visual=visual,
            **kwargs,
        )


class IVTPLlavaForConditionalGeneration(
    PrunedGeneration, IVTPLlavaPreTrainedModel, LlavaForConditionalGeneration, GenerationMixin
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
    def from_llava(
        cls,
        llava: Any,
        clip: Any = None,
        *,
        pruning: Any = None,
        connector: Any = None,
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
        connector : ConnectorConfig, dict or str, optional
            A connector to join, untrained, if the checkpoint has none; pruning is then off.
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
            If tower, CLIP and connector do not fit, or a checkpoint has missing or unexpected weights.
        """
        if connector is not None:
            pruning = without_pruning(connector, pruning)
        model = load_llava(cls, llava, clip, pruning=pruning, clip_options=clip_options, **kwargs)
        if connector is not None:
            join_connector(model, connector)
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with the labels on image tokens ignored.

        Trainers replace a model's `forward` by one of their own that computes the loss from the hidden states (TRL
        since 1.16, Liger), so the labels are masked before it sees them.
        """
        labels = {name: kwargs[name] for name in ("labels", "shift_labels") if kwargs.get(name) is not None}
        input_ids, inputs_embeds = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if labels and (input_ids is not None or inputs_embeds is not None):
            columns = kept_columns(kwargs.get("logits_to_keep", 0))
            kwargs |= without_targets(self.model.placeholders(input_ids, inputs_embeds), **labels, columns=columns)
        return super().__call__(*args, **kwargs)

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
        """Compute logits, and the loss if `labels` are given.

        Parameters
        ----------
        labels : int64 Tensor (B, S), or of the logits that are kept, optional
            As in LLaVA. Labels on image tokens are ignored, and so is the label right after a dropped token, which
            predicts nothing.
        clip_input_ids : int64 Tensor (B, W, C), optional
        clip_spans : int64 Tensor (B, S, 2), optional
            The instruction, from `IVTPLlavaProcessor`.
        **kwargs
            Everything else as in `LlavaForConditionalGeneration`.

        Returns
        -------
        LlavaCausalLMOutputWithPast
            `logits` (B, S, vocabulary) line up with `input_ids`. Those of dropped tokens mean nothing, except a row's
            last one, which comes from the last token that is left.
        """
        return_dict, columns = kwargs.pop("return_dict", None), kept_columns(logits_to_keep)
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        if labels is not None:
            images = self.model.placeholders(input_ids, inputs_embeds)
            kwargs["answers"] = answers_of(labels, images, attention_mask, columns)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache_argument(cache, past_key_values),
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
        # A view with gaps would make the head read its weights once per row.
        logits = self.lm_head(hidden_states[:, columns, :].contiguous())
        loss = None
        if labels is not None:
            for name in ("mm_encoder_outputs", "recorder", "answers"):
                kwargs.pop(name, None)
            targets = training_targets(labels, kwargs.pop("shift_labels", None), images, outputs, columns)
            loss = self.loss_function(logits=logits, vocab_size=self.config.text_config.vocab_size, **targets, **kwargs)
        result = LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the processor that was loaded from beside the weights.

        The model reads questions with it where inputs come without them, so it stays beside the weights.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_processor(save_directory)

    def _save_processor(self, folder: Any) -> None:
        if self.model.has_text_tower:
            self.model.guide.save(self, folder)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Upload as transformers does, with the processor: `save_pretrained(..., push_to_hub=True)` uploads first."""
        self._save_processor(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @torch.no_grad()
    def explain(self, processor: Any = None, **inputs: Any) -> PruningTrace:
        """Show what is kept of each image for a prompt, and why.

        Parameters
        ----------
        processor : processor or tokenizer, optional
            Puts the instruction's tokens into words. Default: the one saved next to this checkpoint, if it is on disk.
        **inputs
            What `generate` takes: `input_ids`, `pixel_values`, … A cache of earlier turns is read and left as it is;
            beside it the conversation may come whole, with a mask as long, or only what is new, as in `forward`.

        Returns
        -------
        PruningTrace

        Raises
        ------
        ValueError
            If there is no image, or pruning is off.
        """
        if isinstance(processor, Mapping):
            processor, inputs = None, {**processor, **inputs}
        self._check_something_to_explain(inputs)
        recorder = TraceRecorder(processor)
        fixed: dict[str, Any] = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}
        for name in ("labels", "shift_labels"):  # of a training batch; there is no loss to explain
            inputs.pop(name, None)
        earlier = one_cache(inputs.pop("cache", None), inputs.pop("past_key_values", None))
        if earlier is not None:
            earlier = copied(earlier)
            inputs = self._continuing(inputs, earlier)
            fixed["cache"] = earlier
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            outputs = self(**inputs | fixed, recorder=recorder)
        finally:
            for module in training:
                module.training = True
        return recorder.trace(self, cache_of(outputs))

    def _continuing(self, inputs: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """Return the inputs of a forward for what is new in a conversation that came whole, as in `generate`."""
        ids, mask, past = inputs.get("input_ids"), inputs.get("attention_mask"), int(cache.get_seq_length())
        if past == 0 or ids is None or mask is None or mask.shape[1] != ids.shape[1]:
            return inputs
        ids, whole = self._expand_inputs_for_generation(**inputs | {CACHE: cache})
        prepared: dict[str, Any] = self.prepare_inputs_for_generation(
            ids, next_sequence_length=ids.shape[1] - past, is_first_iteration=True, **whole
        )
        return {name: value for name, value in prepared.items() if name != CACHE}

    def _check_something_to_explain(self, inputs: Mapping[str, Any]) -> None:
        if self.model.plan() is None:
            options, patches = self.config.pruning, self.config.num_patches
            budget = f"visual_tokens={options.visual_tokens}"
            if self.model.has_connector:
                raise ValueError(f"Nothing to explain: {self.config.connector} makes the tokens, and none is dropped")
            keeps = budget if self.model.applied_pruner is None else "the method applied"
            why = f"{keeps} keeps all {patches} patches; allowed: 1 to {patches - 1}"
            raise ValueError(f"Nothing to explain: {why if options.enabled else 'pruning is off (enabled=False)'}")
        if inputs.get("pixel_values") is None:
            raise ValueError("Nothing to explain: the inputs hold no image (pixel_values).")

    def capture_prompts(self, limit: int = MAX_GRAPHS, automatic: bool = False) -> None:
        """Replay images and prompts of any size as CUDA graphs from the second time their shapes come, or never.

        On a fast GPU, launching the work of a small batch takes longer than doing it. A model therefore replays such
        work unasked where that is safe and small: where its weights alone decide what it computes (no adapters, no
        quantised layers), and where the work and its output, mostly the prompt's KV cache, take at most 1/64 of the
        GPU's memory. This method lifts both conditions, or with 0 switches replaying off.

        Work that cannot be replayed runs as always: prompts on top of a cache, rows with different numbers of images,
        padded rows under FlashAttention's package, gradients, training mode, autocast, hooks, methods other than
        IVTP. Graphs are dropped once a weight is another tensor; call this again after adapters were added, merged or
        switched. While a graph is captured, no other thread may synchronise the whole device.

        Parameters
        ----------
        limit : int, default 32
            Graphs that are kept. They share one piece of memory for their work and one for their output, each as large
            as the largest graph needs, and half of the latter again. 0 switches replaying off.
        automatic : bool, default False
            True keeps both conditions, as a new model has them.

        Raises
        ------
        ValueError
            If the limit is negative, or the model is not on one GPU.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit={limit!r}; allowed: a number of graphs, 0 for none.")
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        if limit and not automatic and (len(devices) != 1 or not devices[0].startswith("cuda")):
            raise ValueError(f"CUDA graphs need the whole model on one GPU; it is on {', '.join(devices)}.")
        self.model.prompt_graphs = PromptGraphs(limit, automatic)


register_weight_names()
# `generate` asks for the signature at every step of a class that is published with its code.
IVTPLlavaForConditionalGeneration.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    IVTPLlavaForConditionalGeneration.forward
)
IVTPLlavaModel.register_for_auto_class("AutoModel")  # its code is copied when it is saved by itself
IVTPLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
