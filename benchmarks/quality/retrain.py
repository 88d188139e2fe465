"""The paper's second mode: a system is fine-tuned as it prunes, and learns to use what is left.

    python -m benchmarks.quality.retrain --model examples/miniature --visual-tokens 16 --state out/retrain-16 \\
        --out out/miniature-16

retrains IVTP at one budget, and `benchmarks.quality.retrain_all` every system of the tables. All see the same scenes
and questions, drawn from the numbers of seed and step. The vision tower and CLIP's text half stay frozen.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.quality import command
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint
from benchmarks.quality.loop import TrainingRun, cosine_rate, drawn_ahead, optimize, precision, set_up
from benchmarks.quality.retrained_rows import LEARNS
from benchmarks.quality.world import SIDE, Question, Scene, draw_scene, questions
from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from modeling_ivtp.files.folder import check_target, new_folder
from modeling_ivtp.methods import Method
from modeling_ivtp.model.outputs import take_images
from modeling_ivtp.model.placeholders import complete_processor
from modeling_ivtp.serving.answering import load_model
from modeling_ivtp.trained import PrunerTraining
from modeling_ivtp.training.parts import PrunedBy, training_module

_FIRST = 500_000_000
"""Index of the first scene; earlier training used the ones before."""
_OF_A_SEED = 10_000_000
SCENES, QUESTIONS = 8, 4
ADAM, NEW = 2e-5, 1e-3
"""Peak learning rates of AdamW: LLaVA's own, and that of modules that start from nothing. Five times LLaVA's made the
model forget: unpruned accuracy fell from 89.7 to 85.9% in 100 steps of 8 questions."""


@dataclass(frozen=True)
class Course:
    """Length of a training and its data; the same for all systems that are compared.

    Attributes
    ----------
    steps : int
    scenes, questions : int
        Of a step; each scene has as many questions.
    seed : int
        Of the scenes, of new modules, and of what training draws.
    """

    steps: int = 400
    scenes: int = SCENES
    questions: int = QUESTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("scenes", 1), ("questions", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; allowed: a whole number of at least {least}.")

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates: a warm-up of a quarter, at most 100 steps, then a cosine."""
        return cosine_rate(step, self.steps, warm_up=max(1, min(100, self.steps // 4)))


def draw_questions(step: int, side: int = SIDE, course: Course | None = None) -> list[tuple[Scene, Question]]:
    """Draw the scenes of a step and their questions, with idle words."""
    course = course or Course()
    draw = np.random.Generator(np.random.PCG64([13, step, *([course.seed] if course.seed else [])]))
    first = _FIRST + course.seed * _OF_A_SEED + step * course.scenes
    scenes = [draw_scene("train", first + row, side=side) for row in range(course.scenes)]
    asked = []
    for scene in scenes:
        found = questions(scene, course.questions, variant=int(draw.integers(1 << 30)))
        asked += [(scene, found[number % len(found)]) for number in range(course.questions)]
    return asked


def prepared(processor: Any, asked: list[tuple[Scene, Question]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of prompts with their answers, padded on the right, and labels for answer and end."""
    eos = processor.tokenizer.eos_token
    inputs = processor(
        images=[Image.fromarray(scene.pixels) for scene, _ in asked],
        text=[f"{question.prompt} {question.answer}{eos}" for _, question in asked],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        labels[row, length - 2 : length] = inputs["input_ids"][row, length - 2 : length]
    return dict(inputs), labels


def load_base(model: Path, connector: Mapping[str, Any] | None, seed: int, device: str) -> tuple[Any, Any]:
    """Load the miniature, with a new connector where one is wanted, and its processor."""
    llava, processor = load_model(model, device=device, dtype="float32")
    check_world(llava, processor)
    if connector is not None:
        torch.manual_seed(seed)
        llava = IVTPLlavaForConditionalGeneration.from_llava(model, connector=dict(connector), dtype=torch.float32)
        llava = llava.to(device).eval()
        complete_processor(processor, llava.config)
    return llava, processor


def retrain(
    llava: Any,
    processor: Any,
    pruned_by: PrunedBy,
    learns: Sequence[str],
    course: Course,
    state: Path,
    model: Path,
) -> tuple[Method | None, float]:
    """Train a system, or go on with its training.

    Parameters
    ----------
    llava, processor
        From `load_base`.
    pruned_by : PrunedBy
    learns : sequence of str
        As `trains` of a preset; a connector and the projector learn alone in the first half.
    course : Course
    state : Path
        Folder of state and log.
    model : Path
        The checkpoint it came from.

    Returns
    -------
    Method or None
        With the modules that it learned; None where it has none. It is not applied.
    float
        Seconds of a step.
    """
    torch.manual_seed(course.seed)
    with_connector = llava.config.connector is not None
    parts = ("connector", *learns) if with_connector else tuple(learns)
    with training_module(llava, pruned_by, parts) as module:
        modules, optimizers = _what_learns(llava, module, learns)
        settings = asdict(course) | {
            "method": pruned_by.method,
            "visual_tokens": pruned_by.tokens,
            "options": dict(pruned_by.options),
            "connector": with_connector and llava.config.connector.name,
            "model": checkpoint_fingerprint(model),
        }
        run = TrainingRun(state, modules, optimizers, settings)
        step = _Step(llava, processor, module, modules, optimizers, course, run.step)
        module.train()
        run.train(course.steps, step, title=str(state.name))
        module.eval()
        method = module.method if isinstance(module, PrunerTraining) else None
    return method, run.seconds / course.steps


class _Step:
    """One optimizer step of a system."""

    def __init__(
        self,
        llava: Any,
        processor: Any,
        module: Any,
        modules: torch.nn.ModuleDict,
        optimizers: list[torch.optim.Optimizer],
        course: Course,
        first: int,
    ) -> None:
        self.llava, self.module, self.modules, self.optimizers = llava, module, modules, optimizers
        self.course, self.device = course, llava.device
        side = llava.config.vision_config.image_size
        self.batches = drawn_ahead(lambda step: prepared(processor, draw_questions(step, side, course)), first)

    def __call__(self, step: int) -> dict[str, float]:
        inputs, labels = next(self.batches)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        labels = labels.to(self.device)
        # What noise a step draws depends on its number alone, also in a run that was stopped.
        torch.manual_seed(self.course.seed * _OF_A_SEED + step)
        self._stage(step)
        with precision(self.device):
            outputs = self.module(**self._seen(inputs), labels=labels)
        at = labels[:, 1:] != -100
        right = (outputs.logits[:, :-1][at].argmax(-1) == labels[:, 1:][at]).float()[::2].mean()
        losses = {"loss": outputs.loss, "right": right}
        return optimize(self.modules, self.optimizers, losses, self.course.rate(step))

    def _stage(self, step: int) -> None:
        """Hold the language model still in a connector's first half, and tell a method how much is done."""
        if isinstance(self.module, PrunerTraining):
            self.module.method.batch.progress = step / self.course.steps
        if self.llava.config.connector is not None:
            second = step >= self.course.steps // 2
            for part in ("decoder", "head"):
                self.modules[part].requires_grad_(second)

    def _seen(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Encode each scene once for its questions, which are neighbours, where the question plays no part in it."""
        if self.module is not self.llava or self.llava.config.connector is not None:
            return inputs
        rows = len(inputs["input_ids"])
        scenes = inputs.pop("pixel_values")[:: self.course.questions]
        encoded = self.llava.model.get_image_features(scenes)
        images = take_images(encoded, [row // self.course.questions for row in range(rows)])
        return inputs | {"mm_encoder_outputs": {"image": images}}


def _what_learns(
    llava: Any, module: Any, learns: Sequence[str]
) -> tuple[torch.nn.ModuleDict, list[torch.optim.Optimizer]]:
    """Return the modules that are trained and kept, and their optimizers."""
    named: dict[str, torch.nn.Module] = {}
    if set(learns) & set(LEARNS):
        named = {
            "projector": llava.model.multi_modal_projector, "decoder": llava.model.language_model, "head": llava.lm_head
        }  # fmt: skip
    optimizers = [_adam(named.values(), ADAM)] if named else []
    new = {"connector": llava.model.connector} if llava.config.connector is not None else {}
    if isinstance(module, PrunerTraining):
        new["pruner"] = module.learned
    if any([*part.parameters()] for part in new.values()):
        optimizers.append(_adam(new.values(), NEW))
    return torch.nn.ModuleDict(named | new), optimizers


def _adam(parts: Iterable[torch.nn.Module], rate: float) -> torch.optim.Optimizer:
    """Return LLaVA's optimizer for parts of a model: AdamW without weight decay."""
    weights = [weight for part in parts for weight in part.parameters()]
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint to start from.")],
    visual_tokens: Annotated[int, typer.Option(help="Visual tokens of one image in the last layers.")],
    state: Annotated[Path, typer.Option(help="Folder of state and log; an earlier run there is continued.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of everything that training draws.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Retrain IVTP at one budget, or continue retraining."""
    device = set_up(seed, threads)
    check_target(out, overwrite=overwrite)
    llava, processor = load_base(model, None, seed, str(device))
    pruned_by = PrunedBy("ivtp", visual_tokens, {"strict": True})
    retrain(llava, processor, pruned_by, LEARNS, Course(steps, seed=seed), state, model)
    llava.set_pruning(strict=False)
    llava.to(IVTPLlavaConfig.from_pretrained(model).dtype)
    size = sum(parameter.nbytes for parameter in llava.parameters())
    with new_folder(out, needed_bytes=size, overwrite=overwrite) as folder:
        llava.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
