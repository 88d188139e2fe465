"""Pictures and questions for a training step, with the places the decoder is to find on the way to an answer."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from benchmarks.quality.speaker import NAMING
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import patch_labels, pixel_values, pixel_values_of
from benchmarks.quality.world import (
    GREY,
    GRID,
    PATCH,
    SIDE,
    SIZES,
    TYPES,
    Question,
    Scene,
    draw_scene,
    kinds,
    questions,
)

UNKNOWN = -100
_FIRST = 1_000_000
"""Index of the first scene; the ones before are those of CLIP's training."""
SHARED = {"window", "words", "lead"}
"""What all pictures of a step have in common."""
BLANK_SHARE = 0.03
"""Share of grey pictures among those with questions: a model that sees nothing learns to guess at chance."""


@dataclass
class Pictures:
    """The pictures of a step.

    Attributes
    ----------
    pixels : float32 Tensor (B, 3, side, side)
    window : tuple of int
        Row and column of the scenes' first patch in the whole grid.
    shown : int64 Tensor (B, N, 2)
        Kind and colour of each patch; the number of kinds or colours where there is nothing.
    """

    pixels: torch.Tensor
    window: tuple[int, int]
    shown: torch.Tensor

    @property
    def patches(self) -> torch.Tensor:
        """The patches of a whole picture that the scenes fill: int64 (N,)."""
        side = self.pixels.shape[-1] // PATCH
        rows, columns = (torch.arange(start, start + side) for start in self.window)
        return (rows[:, None] * GRID + columns).flatten()

    def part(self, rows: slice) -> Self:
        """Return some of the pictures, with all that belongs to them."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in SHARED:
                parts[field.name] = {k: v[rows] for k, v in value.items()} if isinstance(value, dict) else value[rows]
        return replace(self, **parts)


@dataclass
class Named(Pictures):
    """Pictures, with the properties of every kind in them.

    Attributes
    ----------
    words : int64 Tensor (kinds,)
        The decoder's token for each kind.
    known : dict of str to int64 Tensor (B, kinds)
        Properties by the names of `NAMING`; `UNKNOWN` where a kind is missing, or there more than once.
    """

    words: torch.Tensor
    known: dict[str, torch.Tensor]


@dataclass
class Asked(Pictures):
    """Pictures with their questions.

    Attributes
    ----------
    lead : int64 Tensor (L,)
        The prompt's tokens before the picture.
    tokens : int64 Tensor (B, Q, T)
        The tokens after the picture: question, answer, end; padded on the right.
    answers : int64 Tensor (B, Q)
        Place of the token that predicts the answer; the answer and the end follow.
    types : int64 Tensor (B, Q)
    nouns : int64 Tensor (B, Q)
        Place of the last token of the first noun.
    named, source : int64 Tensor (B, Q, 2)
        Row and column of the object that the noun names and of the one that the answer is read from; `UNKNOWN` where
        there is no such object, or not exactly one.
    """

    lead: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor
    types: torch.Tensor
    nouns: torch.Tensor
    named: torch.Tensor
    source: torch.Tensor


def words_of_kinds() -> list[int]:
    """Return the decoder's token for each kind."""
    tokenizer = decoder_tokenizer()
    return [tokenizer(f" {kind.name}")["input_ids"][-1] for kind in kinds()]


def _pictures(
    draw: np.random.Generator, first: int, size: int, side: int, crowded: bool = False
) -> tuple[list[Scene], dict[str, Any]]:
    """Draw scenes that stand somewhere in the whole grid, and return them with the fields of `Pictures`."""
    scenes = [draw_scene("train", first + row, side=side, crowded=crowded) for row in range(size)]
    free = GRID - side // PATCH
    window = int(draw.integers(free + 1)), int(draw.integers(free + 1))
    shown = np.stack([patch_labels(scene, window)[..., :2] for scene in scenes])
    return scenes, {
        "pixels": pixel_values(scenes),
        "window": window,
        "shown": torch.from_numpy(shown).flatten(1, 2),
    }


def name_all(step: int, size: int, *, side: int = SIDE) -> Named:
    """Draw the scenes of a step for questions about every kind by its bare name; arguments as in `ask`."""
    scenes, pictures = _pictures(np.random.Generator(np.random.PCG64([17, step])), _FIRST + step * 64, size, side)
    known = {name: torch.full((size, len(kinds())), UNKNOWN) for name in NAMING} | {
        "there": torch.zeros(size, len(kinds()), dtype=torch.long)
    }
    for row, scene in enumerate(scenes):
        counts = scene.counts()
        for number, thing in enumerate(scene.objects):
            known["there"][row, thing.kind] = 1
            if counts[thing.kind] == 1:
                known["colour"][row, thing.kind] = thing.colour
                known["size"][row, thing.kind] = SIZES.index(thing.size)
                place = _place(scene, number, pictures["window"])
                known["row"][row, thing.kind], known["column"][row, thing.kind] = place
    return Named(**pictures, words=torch.tensor(words_of_kinds()), known=known)


def ask(
    step: int,
    size: int,
    number: int,
    types: tuple[str, ...] = TYPES,
    *,
    side: int = SIDE,
    style: str = "full",
    crowded: bool = False,
) -> Asked:
    """Draw the scenes of a step and questions about them; no two steps draw the same scenes.

    Parameters
    ----------
    step : int
    size, number : int
        Number of pictures, and of questions about each.
    types : tuple of str
    side : int
        Side of the scenes in pixels; smaller ones stand somewhere in the whole grid.
    style : {"full", "plain", "terse"}
        Sentences with idle words, without them, or the fewest words.
    crowded : bool
        Draw scenes with little ground between the objects, or none.
    """
    tokenizer = decoder_tokenizer()
    draw = np.random.Generator(np.random.PCG64([11, step]))
    scenes, pictures = _pictures(draw, _FIRST + step * 64, size, side, crowded)
    asked: list[tuple[Scene, Question]] = []
    for scene in scenes:
        variant = int(draw.integers(1 << 30))
        of_scene = questions(scene, number, types=types, variant=variant, style=style)
        if not of_scene:  # a small scene may have nothing to relate, but existence can always be asked
            of_scene = questions(scene, number, types=["existence"], variant=variant, style=style)
        asked += [(scene, of_scene[index % len(of_scene)]) for index in range(number)]
    encoded = tokenizer(
        [f"{question.prompt} {question.answer}</s>" for _, question in asked], return_offsets_mapping=True
    )
    image = encoded["input_ids"][0].index(tokenizer.convert_tokens_to_ids("<image>"))
    after = [ids[image + 1 :] for ids in encoded["input_ids"]]
    tokens = torch.zeros(len(asked), max(map(len, after)), dtype=torch.long)
    nouns = torch.zeros(len(asked), dtype=torch.long)
    for row, ids in enumerate(after):
        tokens[row, : len(ids)] = torch.tensor(ids)
        span = next(span for span in asked[row][1].prompt_spans if span.role == "object")
        starts = [start for start, _ in encoded["offset_mapping"][row][image + 1 :]]
        nouns[row] = max(at for at, start in enumerate(starts) if start < span.stop)
    window = pictures["window"]
    places = torch.tensor(
        [[_place(scene, thing, window) for thing in _named_and_source(scene, question)] for scene, question in asked]
    )
    shape = size, number
    blank = torch.from_numpy(draw.random(size) < BLANK_SHARE)
    pictures["pixels"][blank] = pixel_values_of(np.full((1, side, side, 3), GREY, np.uint8))
    places[blank.repeat_interleave(number)] = UNKNOWN
    return Asked(
        **pictures,
        lead=torch.tensor(encoded["input_ids"][0][:image]),
        tokens=tokens.unflatten(0, shape),
        answers=torch.tensor([len(ids) - 3 for ids in after]).unflatten(0, shape),
        types=torch.tensor([TYPES.index(question.type) for _, question in asked]).unflatten(0, shape),
        nouns=nouns.unflatten(0, shape),
        named=places[:, 0].unflatten(0, shape),
        source=places[:, 1].unflatten(0, shape),
    )


def _named_and_source(scene: Scene, question: Question) -> tuple[int | None, int | None]:
    """Return the numbers of the object that the question's first noun names and of the one its answer is read from."""
    subjects = question.subjects
    if question.type == "larger":
        noun = next(span for span in question.spans if span.role == "object")
        words = question.text[noun.start : noun.stop].lower(), question.answer
        first, second = (next(thing for thing in subjects if scene.objects[thing].name == word) for word in words)
        return first, second
    named = subjects[0] if len(subjects) == 1 else None
    return named, question.sources[0] if question.sources else named


def _place(scene: Scene, number: int | None, window: tuple[int, int]) -> tuple[int, int]:
    if number is None:
        return UNKNOWN, UNKNOWN
    thing = scene.objects[number]
    return thing.y // PATCH + window[0], thing.x // PATCH + window[1]
