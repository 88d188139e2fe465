"""Stages 2 and 3: the miniature's projector, then projector and decoder, with the tower frozen, as LLaVA is trained.

Stage 2 aligns the projector: a patch of a dog on a red tile is to land near the words "dog" and "red". Stage 3 reads
every picture once and asks many questions about it side by side. It begins with every kind by its bare name, from which
words learn within minutes to find what they name. Then come questions in their fewest words, on larger scenes and on
whole ones; then whole sentences with idle words around them, and more of those that relate two objects.

On the way to an answer the decoder is asked for the place of the object named, and of the one that the answer is read
from; this help fades out, and its heads are dropped. Attention to the ground costs a little all along, and in the end
so does an object's attention to other objects: a token that finds nothing to look at is to rest on the first token, as
in large models, not on patches that pruning drops. No patch is ever dropped in training.

    python -m benchmarks.quality.train_llava --clip out/miniature/clip --out out/miniature/llava
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from benchmarks.quality import command
from benchmarks.quality.loop import (
    TrainingRun,
    cosine_rate,
    drawn_ahead,
    optimize,
    optimizers_of,
    saved_weights,
    set_up,
)
from benchmarks.quality.miniature import decoder_config
from benchmarks.quality.question_batches import UNKNOWN, Asked, Named, Pictures, ask, name_all, words_of_kinds
from benchmarks.quality.speaker import NAMING, Speaker
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import Teacher, pixel_values
from benchmarks.quality.world import COLOURS, GRID, TYPES, draw_scene, kinds

NO_CORNERS = tuple(one for one in TYPES if one != "corner")
"""Types without corners: the corner of a small scene is no corner of the whole grid in which it stands."""
TWO_THINGS = tuple(one for one in TYPES if one not in ("existence", "count", "colour", "corner"))
"""Types that relate two objects, which take longest to learn."""
PLACES_WEIGHT, IDLE_WEIGHT = 0.3, 0.5
MUON = 0.01
"""Peak learning rate, lower than the tower's because labels are sparser."""


@dataclass(frozen=True)
class Course:
    """The number of steps of each part of training, in order.

    Attributes
    ----------
    align : int
        Stage 2, on small scenes of 168 pixels.
    name : int
        Small scenes; every kind by its bare name.
    middle : int
        Scenes of 224 pixels; questions in their fewest words.
    whole : int
        Whole scenes; the same questions. Every third step keeps the smaller scenes, so that the model does not get
        used to one number of patches.
    sentences : int
        The same scenes; whole sentences, every second step with idle words around them.
    practice : int
        The same, every second step with `TWO_THINGS` only. The smaller scenes are crowded, so that the model does not
        get used to one share of ground.
    settle : int
        The same, with a cost on objects' attention to other objects, and the highest cost on the attention to ground
        of the token that answers.
    """

    align: int
    name: int
    middle: int
    whole: int
    sentences: int
    practice: int
    settle: int

    @property
    def terse(self) -> int:
        """The number of steps before the first sentence."""
        return self.align + self.name + self.middle + self.whole

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return self.terse + self.sentences + self.practice + self.settle

    def settling(self, step: int) -> bool:
        """Return whether a step belongs to the last part."""
        return step >= self.steps - self.settle

    def batch(self, step: int, gpu: bool = False) -> Asked | Named:
        """Draw the batch of a step, with four times as many pictures on a GPU."""
        more = 4 if gpu else 1
        if step < self.align + self.name:
            return name_all(step, 24 * more, side=168)
        terse, practice = step < self.terse, step >= self.terse + self.sentences
        number, style = (32, "terse") if terse else (24, "plain") if step % 2 else (16, "full")
        types = TWO_THINGS if practice and step % 2 else TYPES
        if step < self.align + self.name + self.middle or step % 3 == 2:
            types = tuple(kind for kind in types if kind in NO_CORNERS)
            return ask(step, (16 if terse else 12) * more, number, types, side=224, style=style, crowded=practice)
        return ask(step, 8 * more, 40 if terse else number, types, style=style)

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates: a cosine, and half of one for each part after the terse ones."""
        if step < self.terse:
            return cosine_rate(step, self.terse)
        step -= self.terse
        for part in (self.sentences, self.practice, self.settle):
            if step < part:
                return 0.5 * cosine_rate(step, part)
            step -= part
        return 0.0

    def help(self, step: int) -> float:
        """Return the weight of the help: full at first, 0 in the last quarter before the sentences."""
        return PLACES_WEIGHT * min(1.0, max(0.0, 3 - 4 * step / self.terse))


def load_teacher(folder: Path) -> Teacher:
    """Load the towers that stage 1 trained, without its heads."""
    teacher = Teacher()
    teacher.clip.load_state_dict(saved_weights(folder, "clip."))
    return teacher.eval().requires_grad_(False)


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1.")],
    out: Annotated[Path, typer.Option(help="Folder of state and log; an earlier run there is continued.")],
    align: Annotated[int, typer.Option(help="Steps of stage 2.")] = 200,
    name: Annotated[int, typer.Option(help="Steps with bare names.")] = 400,
    middle: Annotated[int, typer.Option(help="Steps with terse questions about larger scenes.")] = 600,
    whole: Annotated[int, typer.Option(help="Steps with terse questions about whole scenes.")] = 900,
    sentences: Annotated[int, typer.Option(help="Steps with whole sentences.")] = 700,
    practice: Annotated[int, typer.Option(help="Steps with more of the hard questions.")] = 900,
    settle: Annotated[int, typer.Option(help="Steps in which objects learn to look at themselves.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or continue training."""
    device = set_up(seed, threads)
    course = Course(align, name, middle, whole, sentences, practice, settle)
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
    optimizers = optimizers_of(speaker, MUON)
    run = TrainingRun(out, speaker, optimizers, asdict(course) | {"seed": seed, "device": device.type})
    batches = drawn_ahead(lambda step: course.batch(step, device.type == "cuda"), run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        features = see(batch.pixels, batch.window)
        with torch.autocast(device.type, torch.bfloat16):
            values = losses(
                speaker, features, batch, aligning=step < align, help=course.help(step), settling=course.settling(step)
            )
        return optimize(speaker, optimizers, values, course.rate(step))

    run.train(course.steps, one_step, title="LLaVA")


def losses(
    speaker: Speaker, features: torch.Tensor, batch: Asked | Named, *, aligning: bool, help: float, settling: bool
) -> dict[str, torch.Tensor]:
    """Compute the `loss` of a step, and values to watch.

    Parameters
    ----------
    speaker : Speaker
    features : Tensor (B, N, width)
        The tower's features of the batch's pictures.
    batch : Asked or Named
    aligning : bool
        Whether the step is of stage 2.
    help : float
        Weight of the help on the way to an answer.
    settling : bool
        Whether objects' attention to other objects costs.
    """
    if aligning:
        return _align(speaker, features, batch)
    if isinstance(batch, Named):
        return _name(speaker, features, batch)
    return _answer(speaker, features, batch, help, settling)


def _align(speaker: Speaker, features: torch.Tensor, batch: Pictures) -> dict[str, torch.Tensor]:
    """Compute the loss of stage 2: among all kinds and all colours, a patch lies nearest to the words for its own."""
    projected = speaker.project(features).float().flatten(0, 1)
    tokenizer = decoder_tokenizer()
    nothing = tokenizer.convert_tokens_to_ids("<0x0A>")  # for the ground: a line's end
    colours = [tokenizer(f" {colour}")["input_ids"][-1] for colour in COLOURS]
    losses = {}
    for name, words, shown in zip(("kind", "colour"), (words_of_kinds(), colours), batch.shown.unbind(-1), strict=True):
        embedded = speaker.language.embed_tokens(torch.tensor([*words, nothing], device=features.device)).float()
        logits = projected @ embedded.T / embedded.shape[1] ** 0.5
        losses[name] = F.cross_entropy(logits, shown.to(features.device).flatten())
    return {"loss": losses["kind"] + losses["colour"]} | losses


def _name(speaker: Speaker, features: torch.Tensor, batch: Named) -> dict[str, torch.Tensor]:
    """Compute the loss of bare names: whether each kind is there, and colour, place and size of those there once."""
    device = features.device
    asked = batch.words.to(device)[None, :, None].expand(len(features), -1, -1)
    lead = torch.tensor([decoder_tokenizer().bos_token_id], device=device)
    _, halfway, _ = speaker(features, lead, asked, batch.patches.to(device))
    predictions = speaker.naming(halfway[0][:, :, 0]).float().split(list(NAMING.values()), -1)
    loss, shares = torch.zeros((), device=device), {}
    for (name, known), logits in zip(batch.known.items(), predictions, strict=True):
        wanted = known.to(device)
        if name == "there":
            # Few of all kinds are there, so those that are weigh more.
            weight = torch.tensor(5.0, device=device)
            loss = loss + F.binary_cross_entropy_with_logits(logits[..., 0], wanted.float(), pos_weight=weight)
            guess = logits[..., 0] > 0
            shares[name] = 2 * (guess & (wanted > 0)).sum() / (guess.sum() + wanted.sum()).clamp(min=1)
        else:
            share = 1.0 if name == "colour" else 0.5
            loss = loss + share * F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN)
            shares[name] = (logits.argmax(-1) == wanted)[wanted != UNKNOWN].float().mean()
    return {"loss": loss} | shares


def _answer(
    speaker: Speaker, features: torch.Tensor, batch: Asked, help: float, settling: bool
) -> dict[str, torch.Tensor]:
    """Compute the loss of stage 3: the answer and the end after it."""
    device = features.device
    tokens, at, nouns = batch.tokens.to(device), batch.answers.to(device), batch.nouns.to(device)
    ground = batch.shown[..., 0].to(device) == len(kinds())
    things = asking = None
    if settling:
        things = (batch.shown[..., 0] * (len(COLOURS) + 1) + batch.shown[..., 1]).to(device)
        asking = _asking(tokens, at)
    hidden, halfway, idle = speaker(
        features, batch.lead.to(device), tokens, batch.patches.to(device), ground, things, asking
    )
    places = torch.stack([at, at + 1], -1)
    logits = speaker.head(_states_at(hidden, places)).float()
    wanted = tokens.gather(2, places + 1)
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten()) + IDLE_WEIGHT * idle
    values = {"idle": idle}
    if help:
        named = speaker.naming(_states_at(halfway[0], nouns[..., None]).squeeze(2)).split(list(NAMING.values()), -1)
        source = speaker.source(_states_at(halfway[1], at[..., None]).squeeze(2)).split(GRID, -1)
        for name, predictions, place in (("named", named[2:4], batch.named), ("source", source, batch.source)):
            rows_and_columns = place.to(device).flatten(0, 1).unbind(-1)
            missed = [
                F.cross_entropy(logits_of.float().flatten(0, 1), label, ignore_index=UNKNOWN)
                for logits_of, label in zip(predictions, rows_and_columns, strict=True)
            ]
            values[name] = torch.stack(missed).mean()
        # A noun that ends a terse question may answer it at once: what it found is one step away from the answer.
        early = speaker.head(_states_at(hidden, nouns[..., None]).squeeze(2)).float()
        values["early"] = F.cross_entropy(early.flatten(0, 1), wanted[..., 0].flatten())
        loss = loss + help * (values["named"] + values["source"] + values["early"])
    right = (logits[:, :, 0].argmax(-1) == wanted[..., 0]).float()
    values |= {"loss": loss, "right": right.mean()}
    for index, name in enumerate(TYPES):
        if (of_type := batch.types.to(device) == index).any():
            values[name] = right[of_type].mean()
    return values


def _asking(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return weights for the questions' tokens (B, Q, T): the answering one weighs as much as all those before it."""
    place = torch.arange(tokens.shape[2], device=tokens.device)
    return (place < at[..., None]).float() / at[..., None].clamp(min=1) + (place == at[..., None])


def _states_at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the states (B, Q, T, d) at places (B, Q, P): (B, Q, P, d)."""
    return states.gather(2, places[..., None].expand(-1, -1, -1, states.shape[-1]))


if __name__ == "__main__":
    command.run(main)
