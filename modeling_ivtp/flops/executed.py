"""FLOPs that really run for one prompt, counted from shapes alone: the model itself on tensors without data.

The model is built without weights and runs under `torch.utils.flop_counter`. Where a method needs data to choose, it
gets random tensors of the same shapes; its own work is counted apart, and the first tokens stay.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ..methods import METHODS, Method
from ..methods.names import UNPRUNED
from ..model import diversity
from ..model.ahead import choose_ahead
from ..model.configuration_ivtp import IVTPLlavaConfig
from ..model.connectors import CONNECTORS, Question
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.placeholders import features_of_image
from ..model.prompt import PromptInputs, build_prompt
from ..model.pruner import Choice, DecoderStep, FeatureStep, IVTPPruner, PromptStep, Pruner, PrunerWrapper, TowerStep
from ..model.rollout import AttentionRecord, DecoderAttentionRecord
from ..model.schedule import PruningPlan
from ..model.visual_sequence import VisualSequence, count_rows, locate_images
from ..trained import TrainedMethod, is_adapter, make
from ..trained.adapter import check_shape, describe_shape
from .formula import PARTS, closed_formula, farthest_flops, kv_cache_bytes, spanning_flops

_CHOICES: dict[Any, Callable[..., int]] = {
    getattr(torch.ops, diversity.NAMESPACE).spanning: lambda features, weights, scores, keep, **_: (
        features[0] * spanning_flops(features[1], features[2], keep)
    ),
    getattr(torch.ops, diversity.NAMESPACE).farthest: lambda distance, keep, **_: (
        distance[0] * farthest_flops(distance[1], keep)
    ),
}
"""The operators that choose by diversity, with functions from the shapes of their arguments to FLOPs."""

_TEXT_BEFORE = 1
"""Text tokens before the image; where the image stands changes next to nothing."""


@dataclass(frozen=True)
class Count:
    """The cost of one image and its prompt.

    Attributes
    ----------
    parts, formula : dict of str to float
        TFLOPs by part, executed and by the closed formula.
    text_tokens : int
        Text tokens of the prompt.
    layer_tokens : tuple of int
        Visual tokens in each layer of the decoder; the largest number, where a method adapts it to the image.
    kv_cache_bytes_per_layer : tuple of int
        Keys and values of text and visual tokens.
    """

    parts: dict[str, float]
    formula: dict[str, float]
    text_tokens: int
    layer_tokens: tuple[int, ...]
    kv_cache_bytes_per_layer: tuple[int, ...]

    @property
    def total_tflops(self) -> float:
        """The sum of all parts, as executed."""
        return sum(self.parts.values())

    @property
    def formula_tflops(self) -> float:
        """The sum of all parts, by the closed formula."""
        return sum(self.formula.values())

    @property
    def kv_cache_bytes(self) -> int:
        """The KV cache of all layers."""
        return sum(self.kv_cache_bytes_per_layer)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dict ready for JSON."""
        return {
            "total_tflops": self.total_tflops,
            "parts": self.parts,
            "formula": {"total_tflops": self.formula_tflops, "parts": self.formula},
            "kv_cache_bytes": self.kv_cache_bytes,
            "final_tokens": self.layer_tokens[-1],
            "layer_averaged_tokens": sum(self.layer_tokens) / len(self.layer_tokens),
            **{name: value for name, value in asdict(self).items() if name not in ("parts", "formula")},
        }


def count(
    config: Any,
    method: Method | None = None,
    *,
    text_tokens: int,
    instruction_tokens: int | None = None,
    value_bytes: int = 2,
) -> Count:
    """Count the cost of a prefill with one image.

    Parameters
    ----------
    config : IVTPLlavaConfig
        With a connector, its tokens are counted; no method can prune them.
    method : Method, optional
        What prunes; default: the configuration's own options.
    text_tokens : int
        Text tokens of the prompt.
    instruction_tokens : int, optional
        CLIP tokens of the instruction; default: as many as there are text tokens.
    value_bytes : int, default 2
        Bytes of a value in the cache.

    Raises
    ------
    ValueError
        If there are too few text tokens, or the method does not fit.
    """
    if text_tokens < _TEXT_BEFORE + 1:
        raise ValueError(f"text_tokens={text_tokens}; allowed: at least {_TEXT_BEFORE + 1}.")
    pruner = IVTPPruner(config.pruning) if method is None else method.bind(config)
    plan = pruner.plan(config, config.num_patches)
    windows = 0
    if config.clip_text_config is not None:
        body = config.clip_text_config.max_position_embeddings - 2
        windows = max(1, -(-(text_tokens if instruction_tokens is None else instruction_tokens) // body))
    parts = _run(config, pruner, plan, text_tokens, windows)
    formula = closed_formula(config, plan, pruner, text_tokens=text_tokens, windows=windows, text_before=_TEXT_BEFORE)
    visual = (plan or PruningPlan(features_of_image(config))).decoder_layer_tokens(config.text_config.num_hidden_layers)
    return Count(
        {name: flops / 1e12 for name, flops in parts.items()},
        {name: flops / 1e12 for name, flops in formula.items()},
        text_tokens,
        visual,
        tuple(kv_cache_bytes(config, [text_tokens + tokens for tokens in visual], value_bytes)),
    )


def count_named(config: Any, name: str, visual_tokens: int | None, **options: Any) -> Count:
    """Count the cost of a method or a connector by its name, of a trained pruner's folder, or of `unpruned`.

    Parameters
    ----------
    config : IVTPLlavaConfig
    name : str
    visual_tokens : int or None
        In the end; of a connector, the tokens that it makes. None: 64, or the budget that is saved in a folder.
    **options
        As in `count`.

    Raises
    ------
    ValueError
        If the name is unknown, a folder's modules are for another shape, and as in `count`.
    """
    if name == UNPRUNED:
        config = copy.deepcopy(config)
        config.pruning = config.pruning.changed(enabled=False)
        return count(config, **options)
    if name in CONNECTORS:
        config = copy.deepcopy(config)
        config.pruning = config.pruning.changed(enabled=False)
        visual_tokens = visual_tokens or 64
        if config.connector is None or (config.connector.name, config.connector.tokens) != (name, visual_tokens):
            config.connector = {"name": name, "tokens": visual_tokens}
        return count(config, **options)
    if is_adapter(name):
        method = make(name, visual_tokens)
        assert isinstance(method, TrainedMethod)
        check_shape(name, method.base or {}, describe_shape(config))
        return count(config, method, **options)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}; allowed: {UNPRUNED}, {', '.join((*CONNECTORS, *METHODS))}.")
    return count(config, make(name, visual_tokens), **options)


@torch.no_grad()
def _run(config: Any, pruner: Pruner, plan: PruningPlan | None, text_tokens: int, windows: int) -> dict[str, int]:
    """Run the parts of the model one after the other, and return the FLOPs of each."""
    parts = dict.fromkeys(PARTS, 0)
    model = _without_weights(config.to_json_string())
    inner: Any = model.model
    # A method that adapts its numbers to the image keeps the most it may.
    plan = None if plan is None else replace(plan, exact=True)
    dry = None if plan is None else _Dry(pruner, plan, _TEXT_BEFORE, text_tokens)
    vision = config.vision_config
    pixels = torch.empty(1, 3, vision.image_size, vision.image_size, device="meta")
    placeholders = features_of_image(config)
    length = text_tokens + placeholders
    ids = torch.full((1, length), config.image_token_id)
    ids[:, :_TEXT_BEFORE] = ids[:, _TEXT_BEFORE + placeholders :] = 0
    with _only(model, dry):
        with _counting() as counted:
            question = _question(inner, windows)
        parts["text_tower"] = counted()
        with _counting() as counted:
            encoded = inner.get_image_features(pixels, question=question)
        parts["projector"] = counted("LlavaMultiModalProjector")
        parts["connector"] = counted(type(inner.connector).__name__) if inner.has_connector else 0
        scored = 0 if dry is None else dry.newly_counted()
        parts["tower"] = counted() - parts["projector"] - parts["connector"] - scored
        embeds = inner.get_input_embeddings()(ids.to("meta"))
        visual = None
        if dry is None:
            features = torch.cat(list(encoded.pooler_output))
            embeds = torch.cat([embeds[:, : length - len(features)], features[None]], 1)
        else:
            with _counting() as counted:
                assert plan is not None
                prompt = PromptInputs(
                    ids,
                    clip_input_ids=torch.ones(1, windows, _context(config), dtype=torch.long, device="meta"),
                    clip_spans=_spans(length, config.num_patches, windows * _context(config)),
                )
                index = inner.index_prompt(replace(prompt, clip_input_ids=None, clip_spans=None), plan, images=1)
                visual, embeds = build_prompt(inner, prompt, index, encoded, embeds, plan)
            parts["text_tower"] = counted() - dry.newly_counted()
        with _counting() as counted:
            if plan is not None and plan.ahead and visual is not None:
                visual, embeds = choose_ahead(inner, prompt, visual, embeds, None)
            options = {} if visual is None else {"visual": visual}
            hidden = inner.language_model(inputs_embeds=embeds, past_key_values=DynamicCache(), **options)
        observed = 0 if dry is None else dry.newly_counted()
        parts["decoder"] = counted() - observed
        left = hidden.last_hidden_state
        if plan is not None:
            left = left[:, : text_tokens + plan.final_tokens]
        with _counting() as counted:
            model.lm_head(left)
        parts["head"] = counted()
    parts["scoring"] = 0 if dry is None else dry.scoring
    parts["selection"] = 0 if dry is None else dry.selection
    return parts


def _question(inner: Any, windows: int) -> Question | None:
    """Encode a question of some windows for a connector that reads it; None for all others."""
    if not (inner.has_connector and inner.config.connector.reads_question):
        return None
    ids = torch.ones(1, windows, _context(inner.config), dtype=torch.long, device="meta")
    return Question(inner.text_features(ids), torch.ones(ids.flatten(1).shape, dtype=torch.bool, device="meta"))


@contextmanager
def _only(model: Any, pruner: Pruner | None) -> Iterator[None]:
    """Apply a pruner to a model, or switch pruning off for None."""
    if pruner is None:
        with model.pruning(enabled=False):
            yield
        return
    model.model.applied_pruner = pruner
    try:
        yield
    finally:
        del model.model.applied_pruner


@lru_cache(maxsize=2)
def _without_weights(config: str) -> Any:
    """Build the model of a configuration (JSON) on tensors without data."""
    with torch.device("meta"):
        return IVTPLlavaForConditionalGeneration(IVTPLlavaConfig(**json.loads(config))).eval()


@contextmanager
def _counting() -> Iterator[Callable[..., int]]:
    """Count the FLOPs that run inside: all of them, or those of the modules of a class."""
    mode = FlopCounterMode(display=False)

    def counted(module: str | None = None) -> int:
        if module is None:
            return mode.get_total_flops()
        return sum(sum(of.values()) for name, of in mode.get_flop_counts().items() if name == module)

    with mode:
        yield counted


def _context(config: Any) -> int:
    return 1 if config.clip_text_config is None else config.clip_text_config.max_position_embeddings


def _spans(length: int, patches: int, clip_tokens: int) -> torch.Tensor:
    """Make spans for the text after the image as the instruction, all of it on CLIP's first token."""
    spans = torch.zeros(1, length, 2, dtype=torch.long)
    spans[:, _TEXT_BEFORE + patches :, 0] = -clip_tokens
    spans[:, _TEXT_BEFORE + patches :, 1] = 1 - clip_tokens
    return spans.to("meta")


class _Dry(PrunerWrapper):
    """A pruner that asks another one about random tensors, counts that pruner's work, and keeps the first tokens.

    Parameters
    ----------
    pruner : Pruner
    plan : PruningPlan
    before, text : int
        Text tokens before the image, and of the whole prompt.
    """

    def __init__(self, pruner: Pruner, plan: PruningPlan, before: int, text: int) -> None:
        super().__init__(pruner)
        self.schedule, self.before, self.text = plan, before, text
        self.scoring, self.selection, self._new = 0, 0, 0
        self._state: Any = None

    def newly_counted(self) -> int:
        """Return the FLOPs that were counted since the last call."""
        new, self._new = self._new, 0
        return new

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Return the plan that was given."""
        return self.schedule

    def in_tower(self, step: TowerStep) -> Choice:
        """Choose on random records."""
        patches = torch.arange(step.patches.shape[1])[None]
        records = [_real_record(record) for record in step.records]
        real = TowerStep(
            step.group,
            records,
            torch.randn(step.hidden.shape),
            patches,
            step.total,
            sizes=_ones(step.sizes),
            order=_counted_off(step.order),
            carried=_ones(step.carried),
        )
        return self._ask(lambda: self.pruner.in_tower(real), step.group.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Choose among random features; what the pruner projects is projected in the model, too."""
        tokens = step.patches.shape[1]
        width = step.project(step.features[:, :1]).shape[-1]
        real = FeatureStep(
            keep=step.keep,
            features=torch.randn(step.features.shape),
            cls=torch.randn(step.cls.shape),
            patches=torch.arange(tokens)[None],
            records={layer: _real_record(record) for layer, record in step.records.items()},
            pixel_values=torch.randn(step.pixel_values.shape),
            grid=step.grid,
            project=lambda features: torch.randn(*features.shape[:-1], width),
        )
        choice = self._ask(lambda: self.pruner.in_features(real), step.keep)
        if real._projected is not None:
            step.projected  # noqa: B018 - counts the projection that the method needs
        return choice

    def in_prompt(self, step: PromptStep) -> Choice:
        """Choose among random features and embeddings."""

        def real(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.randn(tensor.shape)

        features, windows = torch.randn(step.features.shape), step.windows
        windows = None if windows is None else torch.ones(windows.shape, dtype=torch.bool)
        real_step = PromptStep(step.keep, features, real(step.patch_embeds), real(step.text_embeds), windows)
        return self._ask(lambda: self.pruner.in_prompt(real_step), step.keep)

    def prepare(self, sequence: VisualSequence, embeds: torch.Tensor) -> Any:
        """Let the pruner prepare for a random prompt."""

        def prepare() -> None:
            self._state = self.pruner.prepare(self._sequence(sequence), torch.randn(embeds.shape))

        self._count(prepare)

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Choose on random records and hidden states; learned modules are too large to run, and are counted."""
        if isinstance(self.pruner, TrainedMethod):
            self.scoring += self.pruner.module_flops(step.sequence.patches.shape[-1], self.text)
            return Choice(torch.arange(step.group.keep)[None, None].to("meta"))
        real = DecoderStep(
            group=step.group,
            records=[_real_record(record) for record in step.records],
            decoder_records=[_real_decoder_record(record) for record in step.decoder_records],
            hidden=torch.randn(step.hidden.shape),
            sequence=self._sequence(step.sequence),
            sizes=_ones(step.sizes),
            order=_counted_off(step.order),
            state=self._state,
            next_record=None if step.next_record is None else _real_decoder_record(step.next_record),
            pseudo_cls=None if step.pseudo_cls is None else torch.randn(step.pseudo_cls.shape),
            instruction=None if step.instruction is None else torch.ones(step.instruction.shape, dtype=torch.bool),
        )
        return self._ask(lambda: self.pruner.in_decoder(real), step.group.keep)

    def _sequence(self, sequence: VisualSequence) -> VisualSequence:
        """Return a sequence with data: as many visual tokens between the text, the first ones of the image."""
        length, tokens = sequence.length, sequence.columns.shape[2]
        column = torch.arange(length)[None]
        patches = length - self.text
        image = (column >= self.before) & (column < self.before + patches)
        rows, _ = count_rows(image, None, 1, patches)
        return locate_images(image, None, rows, patches).keep(torch.arange(tokens)[None, None])[0]

    def _count(self, work: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False, custom_mapping=_CHOICES) as mode:
            result = work()
        by_operator = mode.get_flop_counts().get("Global", {})
        chosen = sum(flops for operator, flops in by_operator.items() if operator in _CHOICES)
        self.selection += chosen
        self.scoring += mode.get_total_flops() - chosen
        self._new += mode.get_total_flops() - chosen  # the counter around this one does not know these operators
        return result

    def _ask(self, work: Callable[[], Choice], keep: int) -> Choice:
        choice: Choice = self._count(work)
        batch = choice.kept.shape[:-1]
        mixture = choice.mixture
        return Choice(
            torch.arange(keep).expand(*batch, -1).to("meta"),
            mixture=None if mixture is None else torch.empty(*batch, keep, mixture.shape[-1], device="meta"),
            sizes=None if choice.sizes is None else torch.empty(*batch, keep, device="meta"),
            order=None if choice.order is None else torch.arange(keep).expand(*batch, -1).to("meta"),
            carried=None if choice.carried is None else torch.empty(*batch, keep, device="meta"),
        )


def _counted_off(order: torch.Tensor | None) -> torch.Tensor | None:
    return None if order is None else torch.arange(order.shape[-1]).expand(order.shape)


def _ones(sizes: torch.Tensor | None) -> torch.Tensor | None:
    return None if sizes is None else torch.ones(sizes.shape)


def _real_record(record: AttentionRecord) -> AttentionRecord:
    """Make a record of the same shapes with data."""
    real, columns = AttentionRecord(record.reference_only), record.columns
    real.fill(
        query=torch.randn(record.query.shape),
        key=torch.randn(record.key.shape),
        value=torch.rand(record.value.shape),
        value_columns=None
        if record.value_columns is None
        else torch.zeros(record.value_columns.shape, dtype=torch.long),
        scale=record.scale,
        visible=None if record.visible is None else torch.ones(record.visible.shape, dtype=torch.bool),
        columns=None if columns is None else torch.arange(columns.shape[-1]).expand(columns.shape),
    )
    return real


def _real_decoder_record(record: DecoderAttentionRecord) -> DecoderAttentionRecord:
    """Make a decoder record of the same shapes with data."""
    real = DecoderAttentionRecord(record.past, None, None)
    key = torch.randn(record.key.shape)
    real.attend(torch.randn(record.query.shape), key, key, None, None, record.scale)
    return real
