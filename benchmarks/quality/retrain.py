"""The paper's second mode: the decoder is fine-tuned with pruning on, at one budget, and learns to use what is left.

    python -m benchmarks.quality.retrain --model examples/miniature --visual-tokens 16 --state out/retrain-16 \\
        --out out/miniature-16

Projector and decoder are trained through the same engine that answers; the tower, which chooses, stays frozen.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image

from benchmarks.quality import command
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint
from benchmarks.quality.loop import TrainingRun, cosine_rate, drawn_ahead, optimize, optimizers_of, precision, set_up
from benchmarks.quality.world import SIDE, Question, Scene, draw_scene, questions
from modeling_ivtp import IVTPLlavaConfig
from modeling_ivtp.files.folder import check_target, new_folder
from modeling_ivtp.model.outputs import take_images
from modeling_ivtp.serving.answering import load_model, set_budget

_FIRST = 500_000_000
"""Index of the first scene; earlier training used the ones before."""
SCENES, QUESTIONS = 8, 4
MUON, ADAM = 5e-4, 1e-4
"""Peak learning rates. Four times as much made the model forget: accuracy fell by 5 points in 60 steps."""


def draw_questions(step: int, side: int = SIDE) -> list[tuple[Scene, Question]]:
    """Draw the scenes of a step and their questions, with idle words."""
    draw = np.random.Generator(np.random.PCG64([13, step]))
    scenes = [draw_scene("train", _FIRST + step * SCENES + row, side=side) for row in range(SCENES)]
    return [
        (scene, question)
        for scene in scenes
        for question in questions(scene, QUESTIONS, variant=int(draw.integers(1 << 30)))
    ]


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
    """Retrain, or continue retraining."""
    device = set_up(seed, threads)
    check_target(out, overwrite=overwrite)
    llava, processor = load_model(model, device=str(device), dtype="float32")
    check_world(llava, processor)
    set_budget(llava, visual_tokens)
    llava.set_pruning(strict=True)
    llava.requires_grad_(False)
    trained = torch.nn.ModuleDict(
        {"projector": llava.model.multi_modal_projector, "decoder": llava.model.language_model, "head": llava.lm_head}
    ).requires_grad_(True)
    optimizers = optimizers_of(trained, MUON, ADAM)
    settings = {"steps": steps, "visual_tokens": visual_tokens, "seed": seed, "model": checkpoint_fingerprint(model)}
    run = TrainingRun(state, trained, optimizers, settings)
    side = llava.config.vision_config.image_size
    batches = drawn_ahead(lambda step: prepared(processor, draw_questions(step, side)), run.step)

    def one_step(step: int) -> dict[str, float]:
        inputs, labels = next(batches)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        # The questions about a scene are neighbours in the batch; the frozen tower encodes each scene once.
        pixels = inputs.pop("pixel_values")[::QUESTIONS]
        with precision(device):
            encoded = llava.model.get_image_features(pixels)
            images = take_images(encoded, [row // QUESTIONS for row in range(len(labels))])
            logits = llava(**inputs, mm_encoder_outputs={"image": images}).logits[:, :-1]
        wanted = labels[:, 1:].to(device)
        at = wanted != -100
        logits, wanted = logits[at].float(), wanted[at]
        right = (logits.argmax(-1) == wanted).float()[::2].mean()
        losses = {"loss": F.cross_entropy(logits, wanted), "right": right}
        return optimize(trained, optimizers, losses, cosine_rate(step, steps))

    run.train(steps, one_step, title=f"{visual_tokens} tokens")
    llava.set_pruning(strict=False)
    llava.to(IVTPLlavaConfig.from_pretrained(model).dtype)
    size = sum(parameter.nbytes for parameter in llava.parameters())
    with new_folder(out, needed_bytes=size, overwrite=overwrite) as folder:
        llava.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
