"""Applying methods to a model for a while. A stock LLaVA gets our classes meanwhile; afterwards all is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from ..model.configuration_ivtp import IVTPLlavaConfig, IVTPPruningConfig
from ..model.language_ivtp import DECODERS
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaModel
from ..model.prompt_graphs import PromptGraphs
from ..model.pruner import STAGES, Choice, DecoderStep, FeatureStep, Needs, PromptStep, Pruner, TowerStep
from ..model.schedule import PruningPlan
from ..model.vision_ivtp import CLIPEncoderLayer, GroupedCLIPAttention, GroupedCLIPVisionModel
from ..model.visual_sequence import VisualSequence


@dataclass(frozen=True)
class Applied(Pruner):
    """The methods that are applied to one model, in the order of the stages at which they act.

    Attributes
    ----------
    parts : tuple of (Pruner, stages, name)
        Of each method.
    """

    parts: tuple[tuple[Pruner, tuple[str, ...], str], ...]

    def joined(self, pruner: Pruner, stages: tuple[str, ...], name: str) -> Applied:
        """Add a method.

        Raises
        ------
        ValueError
            If it acts at a stage of another method, or between another's two stages.
        """
        for _, others, other in self.parts:
            spans = [range(STAGES.index(own[0]), STAGES.index(own[-1]) + 1) for own in (others, stages)]
            if set(spans[0]) & set(spans[1]):
                raise ValueError(
                    f"{name} acts at {' and '.join(stages)}, where {other} acts already ({' and '.join(others)}); two "
                    "methods at once must act at different stages."
                )
        parts = sorted([*self.parts, (pruner, stages, name)], key=lambda part: STAGES.index(part[1][0]))
        return Applied(tuple(parts))

    def at(self, stage: str) -> Pruner | None:
        """Return the pruner that acts at a stage; None if no method does."""
        return next((pruner for pruner, stages, _ in self.parts if stage in stages), None)

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan each method on the tokens that the one before leaves."""
        whole, tokens, exact = PruningPlan(patches), patches, True
        for pruner, _, name in self.parts:
            plan = pruner.plan(config, tokens)
            if plan is None:
                continue
            if pruner.needs.recorded_layers and whole.tower:
                raise ValueError(
                    f"{name} reads the attention of the whole image, and patches are dropped in the tower already."
                )
            if (pruner.needs.pseudo_cls or plan.prompt is not None) and not exact:
                raise ValueError(
                    f"{name} follows a method that adapts its number of tokens to the image (adaptive=True); allowed: "
                    "adaptive=False."
                )
            whole = PruningPlan(
                patches,
                tower=whole.tower + plan.tower,
                decoder=whole.decoder + plan.decoder,
                features=plan.features if whole.features is None else whole.features,
                prompt=plan.prompt if whole.prompt is None else whole.prompt,
                exact=whole.exact and plan.exact,
                ahead=whole.ahead or plan.ahead,
            )
            tokens, exact = whole.final_tokens, whole.exact
        return whole if whole.drops else None

    @property
    def label(self) -> str:
        """The names of the parts, such as `"topk + fastv"`."""
        return " + ".join(name for _, _, name in self.parts)

    @property
    def needs(self) -> Needs:
        """All needs of the methods; the one in the decoder brings the pseudo-CLS token's options."""
        parts, decoder = [pruner.needs for pruner, _, _ in self.parts], self.at("decoder")
        in_decoder = Needs() if decoder is None else decoder.needs
        return Needs(
            pseudo_cls=in_decoder.pseudo_cls,
            options=in_decoder.options,
            proportional_attention=any(needs.proportional_attention for needs in parts),
            recorded_layers=tuple(layer for needs in parts for layer in needs.recorded_layers),
            all_queries=any(needs.all_queries for needs in parts),
            patch_embeds=any(needs.patch_embeds for needs in parts),
            image_embeds=any(needs.image_embeds for needs in parts),
            compact_positions=any(needs.compact_positions for needs in parts),
            all_projected=any(needs.all_projected for needs in parts),
            next_record=in_decoder.next_record,
            instruction=in_decoder.instruction,
            weights=in_decoder.weights,
            attention_gradient=in_decoder.attention_gradient,
            grid_positions=in_decoder.grid_positions,
        )

    def _must(self, stage: str) -> Pruner:
        pruner = self.at(stage)
        assert pruner is not None
        return pruner

    def record(self, group: Any, layer: int) -> Any:
        """Make the record that the method of this group needs."""
        for pruner, _, _ in self.parts:
            if pruner.needs.pseudo_cls or pruner.needs.proportional_attention or self.at("tower") is pruner:
                return pruner.record(group, layer)
        return super().record(group, layer)

    def in_tower(self, step: TowerStep) -> Choice:
        """Ask the method that acts here."""
        return self._must("tower").in_tower(step)

    def in_features(self, step: FeatureStep) -> Choice:
        """Ask the method that acts here."""
        return self._must("features").in_features(step)

    def in_prompt(self, step: PromptStep) -> Choice:
        """Ask the method that acts here."""
        return self._must("prompt").in_prompt(step)

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """Prepare the method in the decoder."""
        decoder = self.at("decoder")
        return None if decoder is None else decoder.prepare(sequence, embeds)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Ask the method that acts here."""
        return self._must("decoder").in_decoder(step)

    def weigh(self, step: DecoderStep) -> torch.Tensor:
        """Ask the method in the decoder."""
        return self._must("decoder").weigh(step)


def llava_of(model: Any) -> Any:
    """Return the LLaVA inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def applied(model: Any, method: Any) -> Iterator[Any]:
    """Prune a model with a method, and with nothing else, until the context is left; it yields the model.

    The method is applied to the model for all threads: a model that several threads share needs a lock around this.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration or LlavaForConditionalGeneration
        Or a PEFT model around one.
    method : Method

    Raises
    ------
    ValueError
        If the method does not fit the model, or another one acts at the same stage already. The model is then as
        before.
    """
    llava = llava_of(model)
    with _as_ours(llava):
        inner, config = llava.model, llava.config
        before = inner.applied_pruner
        pruner = (before or Applied(())).joined(method.bind(config), method.stages, method.name)
        pruner.plan(config, config.num_patches)
        _check_fits(pruner, method.name, inner, config)
        inner.applied_pruner = pruner
        try:
            yield model
        finally:
            if before is None:
                del inner.applied_pruner
            else:
                inner.applied_pruner = before


def _check_fits(pruner: Pruner, name: str, inner: Any, config: Any) -> None:
    """Refuse now what would otherwise fail in the middle of a prompt."""
    if inner.has_connector:
        raise ValueError(f"{name} chooses among patches, and this model's {config.connector} leaves none.")
    if pruner.needs.patch_embeds and not inner.has_text_tower:
        raise ValueError(
            f"{name} compares patches with the instruction and needs CLIP's text tower, which this model lacks: "
            "IVTPLlavaForConditionalGeneration.from_llava(..., clip=...) joins it."
        )
    layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if pruner.needs.patch_embeds and not isinstance(layers, int):
        raise ValueError(
            f"{name} needs features of one layer in CLIP's space; vision_feature_layer={layers} has several."
        )
    if strategy != "default":
        raise ValueError(f'vision_feature_select_strategy="{strategy}": pruning takes "default" only.')
    attention = config.vision_config._attn_implementation
    if pruner.needs.proportional_attention and attention not in (None, "eager", "sdpa"):
        raise ValueError(
            f'{name} weights attention in the tower, which attn_implementation="{attention}" cannot; allowed: eager, '
            "sdpa."
        )


@contextmanager
def _as_ours(model: Any) -> Iterator[None]:
    """Give a stock LLaVA's modules and configuration our classes for a while; an IVTP model is left alone."""
    if hasattr(type(getattr(model, "model", None)), "applied_pruner"):
        yield
        return
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ValueError(
            f"{type(model).__name__} is no LLaVA; allowed: LlavaForConditionalGeneration and "
            "IVTPLlavaForConditionalGeneration."
        )
    config, inner = model.config, model.model
    vision, decoder = config.vision_config.model_type, config.text_config.model_type
    if vision != "clip_vision_model":
        raise ValueError(
            f"vision_config.model_type={vision!r}: pruning needs a tower with a CLS; allowed: clip_vision_model."
        )
    if decoder not in DECODERS:
        raise ValueError(f"text_config.model_type={decoder!r}; allowed: {', '.join(sorted(DECODERS))}.")
    changes: list[tuple[Any, type]] = [
        (config, IVTPLlavaConfig),
        (model, IVTPLlavaForConditionalGeneration),
        (inner, IVTPLlavaModel),
        (inner.vision_tower, GroupedCLIPVisionModel),
        (inner.language_model, DECODERS[decoder]),
    ]
    for layer in inner.vision_tower.encoder.layers:
        changes += [(layer, CLIPEncoderLayer), (layer.self_attn, GroupedCLIPAttention)]
    changes += [(layer.self_attn, DECODERS[decoder].attention_class) for layer in inner.language_model.layers]
    swap = _ClassSwap(model, changes)
    try:
        swap.make_ours()
        with _hooks_call_our_forwards([part for part, _ in changes]):
            yield
    finally:
        swap.make_stock()


class _ClassSwap:
    """Our classes and attributes on a stock LLaVA.

    Parameters
    ----------
    model : LlavaForConditionalGeneration
    changes : list of tuple
        Its modules and its configuration, each with our class.
    """

    def __init__(self, model: Any, changes: list[tuple[Any, type]]) -> None:
        self.model, self.ours, self.stock = model, changes, [(part, type(part)) for part, _ in changes]
        options = {"pruning": IVTPPruningConfig(enabled=False), "clip_text_config": None, "connector": None}
        self.missing = {name: value for name, value in options.items() if name not in vars(model.config)}

    def make_ours(self) -> None:
        """Make the model ours, but for how it is saved."""
        self.model.config.__dict__.update(self.missing)
        self.model.model.__dict__["prompt_graphs"] = PromptGraphs(0)
        self.model.__dict__["save_pretrained"] = self.save
        for part, our_class in self.ours:
            part.__class__ = our_class

    def make_stock(self) -> None:
        """Make the model stock again."""
        for part, stock_class in self.stock:
            part.__class__ = stock_class
        for name in self.missing:
            self.model.config.__dict__.pop(name, None)
        self.model.model.__dict__.pop("prompt_graphs", None)
        self.model.__dict__.pop("save_pretrained", None)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save as the stock model does: what is trained under a method stays the kind of model that it was."""
        self.make_stock()
        try:
            self.model.save_pretrained(*args, **kwargs)
        finally:
            self.make_ours()


@contextmanager
def _hooks_call_our_forwards(modules: list[Any]) -> Iterator[None]:
    """Give accelerate's hooks (offload, devices) the forwards of our classes: they keep those of the former ones."""
    stock = [(module, vars(module)["_old_forward"]) for module in modules if "_old_forward" in vars(module)]
    try:
        for module, _ in stock:
            module._old_forward = type(module).forward.__get__(module)
        yield
    finally:
        for module, forward in stock:
            module._old_forward = forward
