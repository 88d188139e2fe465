"""Stages 2 and 3: the miniature's projector, then projector and decoder, with the tower frozen, as LLaVA is trained.

Stage 2 aligns the projector: a patch of a dog on a red tile is to land near the words "dog" and "red". Stage 3 asks:
every picture is read once and many questions about it are answered side by side. It begins with small scenes and
questions about single objects, goes on to larger and whole ones, and puts idle words around the questions last. On the
way to an answer the decoder is asked where the thing named is, and the one that the answer is read from; that help
fades out, and its heads are dropped. No patch is ever dropped in training.

    python -m benchmarks.quality.train_llava --clip out/miniature/clip --out out/miniature/llava
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open

from benchmarks.quality.loop import Stopped, TrainingRun, cosine_rate, drawn_ahead, optimize, optimizers_of, set_up
from benchmarks.quality.miniature import decoder_config
from benchmarks.quality.question_batches import UNKNOWN, Asked, ask
from benchmarks.quality.speaker import Speaker
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import Teacher, pixel_values
from benchmarks.quality.world import TYPES, draw_scene

SINGLE = ("existence", "colour", "larger", "count")
NO_CORNERS = tuple(one for one in TYPES if one != "corner")
"""A corner of a small scene is none of the whole grid in which it stands."""
PLACES_WEIGHT = 0.3


@dataclass(frozen=True)
class Course:
    """How many steps each part of training has, in their order.

    Attributes
    ----------
    align : int
        Stage 2, on small scenes of 168 pixels.
    single : int
        Small scenes, questions about single objects.
    middle : int
        Scenes of 224 pixels, all types that they allow.
    whole : int
        Whole scenes, all types.
    idle : int
        Whole scenes, idle words around the questions.
    """

    align: int
    single: int
    middle: int
    whole: int
    idle: int

    @property
    def steps(self) -> int:
        """All of them."""
        return self.align + self.single + self.middle + self.whole + self.idle

    def batch(self, step: int, gpu: bool = False) -> Asked:
        """Pictures and questions of a step; four times as many pictures on a GPU."""
        more = 4 if gpu else 1
        if step < self.align + self.single:
            return ask(step, 24 * more, 16, SINGLE, side=168, idle=False)
        if step < self.align + self.single + self.middle:
            return ask(step, 16 * more, 20, NO_CORNERS, side=224, idle=False)
        if step < self.steps - self.idle:
            return ask(step, 8 * more, 32, idle=False)
        return ask(step, 8 * more, 16)

    def help(self, step: int) -> float:
        """Weight of the questions on the way: whole at first, nothing in the last quarter."""
        return PLACES_WEIGHT * min(1.0, max(0.0, 3 - 4 * step / self.steps))


def load_teacher(folder: Path) -> Teacher:
    """The tower that stage 1 trained."""
    file = folder / "state.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: train stage 1 first (benchmarks.quality.train_clip).")
    teacher = Teacher()
    with safe_open(file, framework="pt") as state:
        names = [name for name in state.keys() if name.startswith("weights.")]  # noqa: SIM118
        teacher.load_state_dict({name.removeprefix("weights."): state.get_tensor(name) for name in names})
    return teacher.eval().requires_grad_(False)


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1.")],
    out: Annotated[Path, typer.Option(help="Folder of the state and log; an earlier run there goes on.")],
    align: Annotated[int, typer.Option(help="Steps of stage 2.")] = 150,
    single: Annotated[int, typer.Option(help="Steps on small scenes, about single objects.")] = 400,
    middle: Annotated[int, typer.Option(help="Steps on larger scenes, about relations too.")] = 900,
    whole: Annotated[int, typer.Option(help="Steps on whole scenes.")] = 1500,
    idle: Annotated[int, typer.Option(help="Steps on whole scenes with idle words.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or go on training."""
    device = set_up(seed, threads)
    course = Course(align, single, middle, whole, idle)
    teacher = load_teacher(clip).to(device)
    width = teacher.clip.config.vision_config.hidden_size
    speaker = Speaker(decoder_config(len(decoder_tokenizer())), width).to(device)

    @torch.no_grad()
    def see(pixels: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return teacher.see(pixels.to(device), window)[1].float()

    sample = see(pixel_values([draw_scene("train", index) for index in range(32)]), (0, 0))
    speaker.mean.copy_(sample.mean((0, 1)))
    speaker.deviation.copy_(sample.std())
    optimizers = optimizers_of(speaker)
    run = TrainingRun(out, speaker, optimizers, asdict(course) | {"seed": seed, "device": device.type})
    batches = drawn_ahead(lambda step: course.batch(step, device.type == "cuda"), run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        features = see(batch.pixels, batch.window)
        with torch.autocast(device.type, torch.bfloat16):
            if step < align:
                told = _align(speaker, features, batch)
            else:
                told = _answer(speaker, features, batch, course.help(step))
        return optimize(speaker, optimizers, told, cosine_rate(step, course.steps))

    run.train(course.steps, one_step, title="LLaVA")


def _align(speaker: Speaker, features: torch.Tensor, batch: Asked) -> dict[str, torch.Tensor]:
    """Stage 2: what a patch shows, told by its nearest words."""
    logits = speaker.project(features).float() @ speaker.language.embed_tokens.weight.float().T
    wanted = batch.words.to(features.device)
    losses = [F.cross_entropy(logits.flatten(0, 1), wanted[..., one].flatten(), ignore_index=UNKNOWN) for one in (0, 1)]
    return {"loss": losses[0] + losses[1], "kind": losses[0], "colour": losses[1]}


def _answer(speaker: Speaker, features: torch.Tensor, batch: Asked, help: float) -> dict[str, torch.Tensor]:
    """Stage 3: the answer and the end behind it."""
    device = features.device
    tokens, at, nouns = batch.tokens.to(device), batch.answers.to(device), batch.nouns.to(device)
    hidden, halfway = speaker(features, batch.lead.to(device), tokens, batch.patches.to(device))
    places = torch.stack([at, at + 1], -1)
    logits = speaker.head(_taken(hidden, places)).float()
    wanted = tokens.gather(2, places + 1)
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
    told = {}
    if help:
        asked = (nouns, batch.named.to(device)), (at, batch.source.to(device))
        for name, head, states, (where, place) in zip(("named", "source"), speaker.places, halfway, asked, strict=True):
            rows_and_columns = head(_taken(states, where[..., None]).squeeze(2)).float().unflatten(-1, (2, -1))
            told[name] = F.cross_entropy(rows_and_columns.flatten(0, 2), place.flatten(), ignore_index=UNKNOWN)
        loss = loss + help * (told["named"] + told["source"])
    right = (logits[:, :, 0].argmax(-1) == wanted[..., 0]).float()
    told |= {"loss": loss, "right": right.mean()}
    for index, name in enumerate(TYPES):
        if (of_type := batch.types.to(device) == index).any():
            told[name] = right[of_type].mean()
    return told


def _taken(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States (B, Q, T, d) at places (B, Q, P): (B, Q, P, d)."""
    return states.gather(2, places[..., None].expand(-1, -1, -1, states.shape[-1]))


if __name__ == "__main__":
    try:
        typer.run(main)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
