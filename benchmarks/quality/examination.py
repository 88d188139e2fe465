"""A model's answers to a batch of questions under every row, and the cost of each row."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.answer_log import Answers
from benchmarks.quality.checkpoint import ANSWER_TOKENS
from benchmarks.quality.kept_counts import Kept, ahead_tokens, as_counted, counting, decoder_tokens
from benchmarks.quality.methods import Row, WholeImages, encode_whole, last_group, patch_order, see_whole, unsealed
from benchmarks.quality.world import GREY, Question, Scene
from modeling_ivtp.flops.formula import decoder_flops, head_flops, text_tower_flops, tower_depth, tower_flops
from modeling_ivtp.model.schedule import PruningPlan
from modeling_ivtp.speed.stopwatch import Stopwatch, Taken


@dataclass
class Asked:
    """The questions of an evaluation.

    Attributes
    ----------
    questions : list of Question
    text_tokens, windows, text_before : list of int
        For each prompt: tokens without the image, windows of its instruction for CLIP's text tower, and how many of the
        tokens stand before the image.
    """

    questions: list[Question] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    text_before: list[int] = field(default_factory=list)


class Examination:
    """A batch of questions for a model, which any row answers; an image is encoded once for all rows that can share it.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    asked : sequence of (Scene, Question)
    first : int
        Number of the first question among all questions.
    seed : int
        Seed of random patches.
    """

    def __init__(
        self, model: Any, processor: Any, asked: Sequence[tuple[Scene, Question]], first: int, seed: int = 0
    ) -> None:
        self.model, self.processor, self.asked, self.first, self.seed = model, processor, asked, first, seed
        images = [Image.fromarray(scene.pixels) for scene, _ in asked]
        prompts = [question.prompt for _, question in asked]
        inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        self.text_tokens = (inputs["attention_mask"].sum(1) - model.config.num_patches).tolist()
        clip = inputs.get("clip_input_ids")
        self.windows = [0] * len(asked) if clip is None else clip.any(-1).sum(-1).tolist()
        of_image = inputs["input_ids"] == model.config.image_token_id
        self.text_before = (of_image.int().argmax(1) - (inputs["attention_mask"] == 0).sum(1)).tolist()
        self.inputs = dict(inputs.to(model.device, model.dtype))
        self.pixels = self.inputs.pop("pixel_values")
        # Rows change the options; the last group is that of the checkpoint.
        self.last_group = last_group(model.config)
        self._encoded: dict[Any, tuple[Any, Taken]] = {}

    @torch.no_grad()
    def answers(self, row: Row) -> Answers:
        """Return a row's answers and the seconds they took; a shared encoding counts fully for every row."""
        watch = Stopwatch()
        with row.applied(self.model), counting(self.model) as kept, watch.watching(self.model):
            image, shared = self._image(row)
            watch.restart()
            start = time.perf_counter()
            answers = self._generate(**image)
            end = time.perf_counter()
        own = Taken(end - start, (watch.first_token or end) - start, watch.selection)
        return Answers(answers, own + shared, dict(kept))

    def _image(self, row: Row) -> tuple[dict[str, Any], Taken]:
        """Return the images' part of `generate`'s inputs, and the seconds it took to make."""
        plan = row.plan(self.model.config)
        if plan is None:
            # Stock LLaVA encodes the images itself, operation for operation.
            return {"pixel_values": self._grey() if row.blind else self.pixels}, Taken()
        encoded, taken = self._encode(row, plan)
        return {"mm_encoder_outputs": {"image": encoded}}, taken

    def _encode(self, row: Row, plan: PruningPlan) -> tuple[Any, Taken]:
        inner = self.model.model
        if row.chooser:
            whole, taken = self._once("whole", lambda: encode_whole(self.model, self.pixels))
            order, more = self._once(row.chooser, lambda: self._order(row, whole))
            return whole.keep(order, row.visual_tokens), taken + replace(more, selection=more.prefill)
        pruner = inner.pruner
        if plan.features is not None and not plan.tower:
            shared = "vision", pruner.needs.recorded_layers if pruner.needs.all_queries else None
            vision, taken = self._once(shared, lambda: see_whole(self.model, self.pixels, pruner.needs))
            start = time.perf_counter()
            encoded = inner.image_outputs(unsealed(vision), plan, self.pixels)
            seconds = time.perf_counter() - start
            return encoded, taken + Taken(seconds, seconds, seconds)
        # Methods that prune in the decoder alone, or by the question alone, share one encoding.
        choice = (
            (row.system, row.visual_tokens, *row.options.items())
            if plan.tower and row.system
            else pruner.needs.patch_embeds
        )
        options = pruner.needs.options
        ranked = [getattr(options, name, None) for name in ("aggregation", "importance", "choice", "sharpness")]
        key = (plan.tower, choice, pruner.needs.image_embeds, *ranked)
        return self._once(key, lambda: inner.get_image_features(self.pixels))

    def kept_patches(self, row: Row) -> torch.Tensor:
        """Return the patches from which a row that chooses before the decoder answers: int64 (B, k)."""
        with row.applied(self.model):
            image, _ = self._image(row)
        return image["mm_encoder_outputs"]["image"].kept_patches

    def _order(self, row: Row, whole: WholeImages) -> torch.Tensor:
        places = range(self.first, self.first + len(self.asked))
        return patch_order(row.chooser, whole, self.asked, places, last_group=self.last_group, seed=self.seed)

    def _once(self, key: Any, make: Any) -> tuple[Any, Taken]:
        if key not in self._encoded:
            watch, start = Stopwatch(), time.perf_counter()
            with watch.watching(self.model):
                result = make()
            seconds = time.perf_counter() - start
            self._encoded[key] = result, Taken(seconds, seconds, watch.selection)
        return self._encoded[key]

    def _grey(self) -> torch.Tensor:
        size = self.pixels.shape[-1]
        grey = self.processor.image_processor(Image.new("RGB", (size, size), GREY), return_tensors="pt")
        return grey["pixel_values"].to(self.pixels).expand_as(self.pixels)

    def _generate(self, **image: Any) -> list[str]:
        tokens = self.model.generate(**self.inputs, **image, max_new_tokens=ANSWER_TOKENS, do_sample=False, num_beams=1)
        new = tokens[:, self.inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def row_signature(row: Row, config: Any) -> str:
    """Return the name of a row's computation: rows of the same options are computed once."""
    options = (
        (row.system, row.visual_tokens, *row.options.items())
        if row.system
        else sorted(row.pruning(config).to_dict().items())
    )
    return hashlib.sha256(repr((row.chooser, row.blind, options)).encode()).hexdigest()[:16]


def row_cost(row: Row, config: Any, asked: Asked, kept: Kept | None = None) -> dict[str, Any]:
    """Return tokens and FLOPs of a row: `tflops`, `final_tokens`, `layer_averaged_tokens`, averaged over questions.

    FLOPs follow the paper's counting rule (`modeling_ivtp.flops.formula`): layers and head over the prompt, without
    patch embedding, projector and the few tokens of the answer. `kept` is what a row kept of each picture, if it adapts
    the number.
    """
    plan, pruner, layers = row.plan(config), row.pruner(config), config.text_config.num_hidden_layers
    visual = decoder_tokens(plan or PruningPlan(config.num_patches), layers, kept or {})
    # Choosers run after the tower, which sees all patches, and runs to its top where CLS chooses.
    tower, depth = PruningPlan(config.num_patches), config.feature_depth
    if row.chooser.startswith("cls-topk"):
        depth = config.vision_config.num_hidden_layers
    elif plan is not None and not row.chooser:
        tower, depth = plan, tower_depth(config, plan, pruner)
    texts = np.array(asked.text_tokens, dtype=np.float64)
    cost = tower_flops(config, tower, depth)
    cost = cost + decoder_flops(config, texts, visual) + head_flops(config, texts + visual[-1])
    if plan is not None and (choosing := ahead_tokens(plan, kept or {})):
        # A pass ahead runs what stands up to the end of the image.
        cost = cost + decoder_flops(config, np.array(asked.text_before, dtype=np.float64), choosing)
    guided = (
        plan is not None
        and not row.chooser
        and (pruner.needs.patch_embeds or (pruner.needs.image_embeds and plan.decoder))
    )
    if guided and config.clip_text_config is not None:
        cost = cost + np.array([text_tower_flops(config, windows) for windows in asked.windows])
    return {
        "tflops": float(np.mean(cost)) / 1e12,
        "final_tokens": as_counted(visual[-1]),
        "layer_averaged_tokens": float(np.mean([np.mean(tokens) for tokens in visual])),
    }
