"""Batches of questions before a model, and what each row of the table costs it."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.checkpoint import ANSWER_TOKENS
from benchmarks.quality.methods import Row, encode_whole, patch_order
from benchmarks.quality.world import GREY, Question, Scene
from modeling_ivtp.flops.formula import decoder_flops, head_flops, text_tower_flops, tower_flops
from modeling_ivtp.token_budget import PruningPlan


@dataclass
class Asked:
    """What the questions of an evaluation were.

    Attributes
    ----------
    questions : list of Question
    text_tokens, windows : list of int
        Of each prompt: tokens without the image, and windows of its instruction for CLIP's text tower.
    """

    questions: list[Question] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)


class Examination:
    """A model before a batch of questions: answers of any row, encoding every image as rarely as can be.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    asked : sequence of (Scene, Question)
    first : int
        Number of the first of them among all questions.
    seed : int
        Of random patches.
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
        self.inputs = dict(inputs.to(model.device, model.dtype))
        self.pixels = self.inputs.pop("pixel_values")
        self._encoded: dict[Any, tuple[Any, float]] = {}

    @torch.no_grad()
    def answers(self, row: Row) -> tuple[list[str], float]:
        """What the model says, and the seconds it took; of a shared encoding every row bears the whole."""
        with self.model.pruning(**row.options):
            image, shared = self._image(row)
            start = time.perf_counter()
            return self._generate(**image), time.perf_counter() - start + shared

    def _image(self, row: Row) -> tuple[dict[str, Any], float]:
        """What `generate` gets of the images, and the seconds it took to make."""
        plan = row.plan(self.model.config)
        if plan is None:
            # Stock LLaVA encodes for itself, operation for operation.
            return {"pixel_values": self._grey() if row.blind else self.pixels}, 0.0
        encoded, seconds = self._encode(row, plan)
        return {"mm_encoder_outputs": {"image": encoded}}, seconds

    def _encode(self, row: Row, plan: PruningPlan) -> tuple[Any, float]:
        if row.chooser:
            whole, seconds = self._once("whole", lambda: encode_whole(self.model, self.pixels))
            places = range(self.first, self.first + len(self.asked))
            order, more = self._once(
                row.chooser, lambda: patch_order(row.chooser, whole, self.asked, places, seed=self.seed)
            )
            return whole.keep(order, row.visual_tokens), seconds + more
        policy = self.model.model.policy
        key = (plan.tower, policy.reading.aggregation, policy.embeds_image)
        return self._once(key, lambda: self.model.model.get_image_features(self.pixels))

    def _once(self, key: Any, make: Any) -> tuple[Any, float]:
        if key not in self._encoded:
            start = time.perf_counter()
            self._encoded[key] = make(), time.perf_counter() - start
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
    """Names what a row computes, so that two rows of the same options are one computation."""
    told = repr((row.chooser, row.blind, sorted(row.pruning(config).to_dict().items())))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def row_cost(row: Row, config: Any, asked: Asked) -> dict[str, Any]:
    """Tokens and FLOPs of a row: `tflops`, `final_tokens`, `layer_averaged_tokens`.

    FLOPs by the paper's counting rule (`modeling_ivtp.flops.formula`): the layers and the head over the prompt, not the
    patch embedding, the projector and the few tokens of the answer.
    """
    plan, layers = row.plan(config), config.text_config.num_hidden_layers
    visual = (config.num_patches,) * layers if plan is None else plan.decoder_layer_tokens(layers)
    # What is chosen for the decoder is no work of the tower's: it sees all patches, up to its top where CLS is asked.
    own = None if row.chooser else plan
    guided = own is not None and bool(own.decoder) and row.pruning(config).guidance == "clip"
    to_the_top = own is not None or row.chooser == "topk"
    depth = config.vision_config.num_hidden_layers if to_the_top else config.feature_depth
    texts = np.array(asked.text_tokens, dtype=np.float64)
    cost = tower_flops(config, own or PruningPlan(config.num_patches), depth)
    cost = cost + decoder_flops(config, texts, visual) + head_flops(config, texts + visual[-1])
    if guided and config.clip_text_config is not None:
        cost = cost + np.array([text_tower_flops(config, windows) for windows in asked.windows])
    return {
        "tflops": float(np.mean(cost)) / 1e12,
        "final_tokens": visual[-1],
        "layer_averaged_tokens": sum(visual) / len(visual),
    }
