"""Stages 2 and 3: the miniature's projector, then projector and decoder, with the tower frozen, as LLaVA is trained.

Stage 2 aligns the projector: a patch of a dog on a red tile is to land near the words "dog" and "red". Stage 3 reads
every picture once and asks many questions about it side by side. It begins with every kind by its bare name, from which
words learn within minutes to find what they name. Then come questions in their fewest words, on larger scenes and on
whole ones; then whole sentences with idle words around them, and more of those that relate two objects. No patch is
ever dropped in training.

The recipe of stage 1 says what helps on the way. In `taught` the decoder is asked for the place of the object named and
of the one that the answer is read from; this fades out, and its heads are dropped. Attention to the ground costs a
little all along, and in the end so does an object's attention to other objects: a token that finds nothing to look at
is to rest on the first token, as in large models, not on patches that pruning drops. In `plain` attention is free.

    python -m benchmarks.quality.train_llava --clip out/miniature/clip --out out/miniature/llava

On CPUs one process a core is faster than one process with as many threads:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.quality.train_llava --clip … --out …
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from benchmarks.quality import command, processes
from benchmarks.quality.loop import (
    TrainingRun,
    drawn_ahead,
    optimize,
    optimizers_of,
    precision,
    set_up,
)
from benchmarks.quality.question_batches import UNKNOWN, Asked, Named, Pictures, ask, name_all, words_of_kinds
from benchmarks.quality.recipes import Course
from benchmarks.quality.speaker import NAMING, Speaker
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.towers import load_teacher
from benchmarks.quality.train_clip import pixel_values
from benchmarks.quality.world import COLOURS, GRID, TYPES, draw_scene, kinds

NO_CORNERS = tuple(one for one in TYPES if one != "corner")
"""Types without corners: the corner of a small scene is no corner of the whole grid in which it stands."""
TWO_THINGS = tuple(one for one in TYPES if one not in ("existence", "count", "colour", "corner"))
"""Types that relate two objects, which take longest to learn."""
MUON = 0.01
"""Peak learning rate, lower than the tower's because labels are sparser."""


def draw_batch(course: Course, step: int, gpu: bool = False) -> Asked | Named:
    """Draw the batch of a step, with four times as many pictures on a GPU."""
    more = 4 if gpu else 1
    if step < course.align + course.name:
        return name_all(step, 24 * more, side=168)
    terse, practice = step < course.terse, step >= course.terse + course.sentences
    number, style = (32, "terse") if terse else (24, "plain") if step % 2 else (16, "full")
    types = TWO_THINGS if course.relates(step) else TYPES
    if step < course.align + course.name + course.middle or step % 3 == 2:
        types = tuple(kind for kind in types if kind in NO_CORNERS)
        size = (16 if terse else 12) * more
        return ask(step, size, number, types, side=224, style=style, crowded=practice and course.crowded)
    return ask(step, 8 * more, 40 if terse else number, types, style=style)


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1, or a file of its towers.")],
    out: Annotated[Path, typer.Option(help="Folder of state and log; an earlier run there is continued.")],
    align: Annotated[int | None, typer.Option(help="Steps of stage 2; default of all parts: the recipe's.")] = None,
    name: Annotated[int | None, typer.Option(help="Steps with bare names.")] = None,
    middle: Annotated[int | None, typer.Option(help="Steps with terse questions about larger scenes.")] = None,
    whole: Annotated[int | None, typer.Option(help="Steps with terse questions about whole scenes.")] = None,
    sentences: Annotated[int | None, typer.Option(help="Steps with whole sentences.")] = None,
    practice: Annotated[int | None, typer.Option(help="Steps with more of the hard questions.")] = None,
    settle: Annotated[int | None, typer.Option(help="Steps in which objects learn to look at themselves.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: a process's share.")] = None,
) -> None:
    """Train, or continue training, by the recipe of stage 1."""
    processes.join()
    device = set_up(seed, threads or max(1, (os.cpu_count() or 1) // processes.count()))
    teacher = load_teacher(clip).to(device)
    recipe = teacher.recipe.with_steps(
        "course",
        align=align,
        name=name,
        middle=middle,
        whole=whole,
        sentences=sentences,
        practice=practice,
        settle=settle,
    )
    course = recipe.course
    speaker = Speaker(recipe).to(device)

    @torch.no_grad()
    def see(pixels: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        with precision(device):
            return teacher.see(pixels.to(device), window)[1].float()

    sample = see(pixel_values([draw_scene("train", index) for index in range(32)]), (0, 0))
    speaker.mean.copy_(sample.mean((0, 1)))
    speaker.deviation.copy_(sample.std())
    optimizers = optimizers_of(speaker, MUON)
    settings = {"recipe": recipe.name, "seed": seed, "device": device.type} | asdict(course)
    run = TrainingRun(out, speaker, optimizers, settings)

    def own_batch(step: int) -> Asked | Named:
        batch = draw_batch(course, step, device.type == "cuda")
        return batch.part(processes.share(len(batch.pixels)))

    batches = drawn_ahead(own_batch, run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        features = see(batch.pixels, batch.window)
        with precision(device):
            values = losses(speaker, features, batch, course, step)
        return optimize(speaker, optimizers, values, course.rate(step))

    run.train(course.steps, one_step, title="LLaVA")


def losses(
    speaker: Speaker, features: torch.Tensor, batch: Asked | Named, course: Course, step: int
) -> dict[str, torch.Tensor]:
    """Compute the `loss` of a step, and values to watch.

    Parameters
    ----------
    speaker : Speaker
    features : Tensor (B, N, width)
        The tower's features of the batch's pictures.
    batch : Asked or Named
    course : Course
    step : int
        Decides which part of the course it is.
    """
    if step < course.align:
        return _align(speaker, features, batch, course.projector_alone)
    if isinstance(batch, Named):
        return _name(speaker, features, batch)
    return _answer(speaker, features, batch, course, step)


def _align(speaker: Speaker, features: torch.Tensor, batch: Pictures, projector_alone: bool) -> dict[str, torch.Tensor]:
    """Compute the loss of stage 2: among all kinds and all colours, a patch lies nearest to the words for its own."""
    projected = speaker.project(features).float().flatten(0, 1)
    tokenizer = decoder_tokenizer()
    nothing = tokenizer.convert_tokens_to_ids("<0x0A>")  # for the ground: a line's end
    colours = [tokenizer(f" {colour}")["input_ids"][-1] for colour in COLOURS]
    losses = {}
    for name, words, shown in zip(("kind", "colour"), (words_of_kinds(), colours), batch.shown.unbind(-1), strict=True):
        embedded = speaker.language.embed_tokens(torch.tensor([*words, nothing], device=features.device)).float()
        if projector_alone:
            embedded = embedded.detach()
        logits = projected @ embedded.T / embedded.shape[1] ** 0.5
        losses[name] = F.cross_entropy(logits, shown.to(features.device).flatten())
    return {"loss": losses["kind"] + losses["colour"]} | losses


def _name(speaker: Speaker, features: torch.Tensor, batch: Named) -> dict[str, torch.Tensor]:
    """Compute the loss of bare names: whether each kind is there, and colour, place and size of those there once."""
    device = features.device
    asked = batch.words.to(device)[None, :, None].expand(len(features), -1, -1)
    lead = torch.tensor([decoder_tokenizer().bos_token_id], device=device)
    read_after = speaker.recipe.course.named_after
    _, halfway, _ = speaker(features, lead, asked, batch.patches.to(device), layers=read_after)
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
    speaker: Speaker, features: torch.Tensor, batch: Asked, course: Course, step: int
) -> dict[str, torch.Tensor]:
    """Compute the loss of stage 3: the answer and the end after it."""
    device, help = features.device, course.help(step)
    tokens, at, nouns = batch.tokens.to(device), batch.answers.to(device), batch.nouns.to(device)
    ground = batch.shown[..., 0].to(device) == len(kinds()) if course.idle_weight else None
    things = asking = None
    if course.settling(step):
        things = (batch.shown[..., 0] * (len(COLOURS) + 1) + batch.shown[..., 1]).to(device)
        asking = _asking(tokens, at)
    # The end after the answer is asked for, but nothing is read from it, nor from padding after it. Where attention to
    # ground has a cost, padding pays it, too.
    lengths = None if course.idle_weight else at + 2
    hidden, halfway, idle = speaker(
        features, batch.lead.to(device), tokens, batch.patches.to(device), ground, things, asking, lengths=lengths
    )
    places = torch.stack([at, at + 1], -1)
    logits = speaker.head(_states_at(hidden, places)).float()
    wanted = tokens.gather(2, places + 1)
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
    values = {}
    if course.idle_weight:
        loss = loss + course.idle_weight * idle
        values["idle"] = idle
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
