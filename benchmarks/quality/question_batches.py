"""Pictures and their questions for a step of training, with what is asked of the decoder on the way to an answer."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import GRID, pixel_values
from benchmarks.quality.world import COLOURS, PATCH, SIDE, TYPES, Question, Scene, draw_scene, kinds, questions

UNKNOWN = -100
_FIRST = 1_000_000
"""The CLIP's training has the scenes before."""


@dataclass
class Asked:
    """Pictures of one step and their questions.

    Attributes
    ----------
    pixels : float32 Tensor (B, 3, side, side)
    window : tuple of int
        Row and column of the whole grid at which the scenes' first patch stands.
    lead : int64 Tensor (L,)
        The prompt's tokens before the picture.
    tokens : int64 Tensor (B, Q, T)
        What comes behind it: question, answer, end; padded on the right.
    answers : int64 Tensor (B, Q)
        The token that predicts the answer; then come the answer and the end.
    types : int64 Tensor (B, Q)
    nouns : int64 Tensor (B, Q)
        The last token of the first noun.
    named, source : int64 Tensor (B, Q, 2)
        Row and column of the thing the noun names and of the one the answer is read from; `UNKNOWN` where it is none
        or not one.
    words : int64 Tensor (B, N, 2)
        The decoder's tokens for kind and colour of each patch; `UNKNOWN` where there is nothing.
    """

    pixels: torch.Tensor
    window: tuple[int, int]
    lead: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor
    types: torch.Tensor
    nouns: torch.Tensor
    named: torch.Tensor
    source: torch.Tensor
    words: torch.Tensor

    @property
    def patches(self) -> torch.Tensor:
        """Which patches of a whole picture the scenes fill: int64 (N,)."""
        side = self.pixels.shape[-1] // PATCH
        rows, columns = (torch.arange(start, start + side) for start in self.window)
        return (rows[:, None] * GRID + columns).flatten()


def ask(
    step: int, size: int, number: int, types: tuple[str, ...] = TYPES, *, side: int = SIDE, idle: bool = True
) -> Asked:
    """Draw the scenes of a step; another step never draws the same ones.

    Parameters
    ----------
    step : int
    size, number : int
        Pictures, and questions about each.
    types : tuple of str
    side : int
        Of the scenes in pixels; smaller ones stand somewhere in the whole grid.
    idle : bool
        Idle words around the questions.
    """
    tokenizer = decoder_tokenizer()
    draw = np.random.Generator(np.random.PCG64([11, step]))
    scenes = [draw_scene("train", _FIRST + step * 64 + row, side=side) for row in range(size)]
    free = GRID - side // PATCH
    window = int(draw.integers(free + 1)), int(draw.integers(free + 1))
    asked: list[tuple[Scene, Question]] = []
    for scene in scenes:
        of_scene = questions(scene, number, types=types, variant=int(draw.integers(1 << 30)), idle=idle)
        asked += [(scene, of_scene[index % len(of_scene)]) for index in range(number)]
    encoded = tokenizer([f"{one.prompt} {one.answer}</s>" for _, one in asked], return_offsets_mapping=True)
    image = encoded["input_ids"][0].index(tokenizer.convert_tokens_to_ids("<image>"))
    behind = [ids[image + 1 :] for ids in encoded["input_ids"]]
    tokens = torch.zeros(len(asked), max(map(len, behind)), dtype=torch.long)
    nouns = torch.zeros(len(asked), dtype=torch.long)
    for row, ids in enumerate(behind):
        tokens[row, : len(ids)] = torch.tensor(ids)
        span = next(span for span in asked[row][1].prompt_spans if span.role == "object")
        starts = [start for start, _ in encoded["offset_mapping"][row][image + 1 :]]
        nouns[row] = max(at for at, start in enumerate(starts) if start < span.stop)
    places = torch.tensor([[_place(*one, window) for one in _places(*pair)] for pair in asked])
    shape = size, number
    return Asked(
        pixel_values(scenes),
        window,
        torch.tensor(encoded["input_ids"][0][:image]),
        tokens.unflatten(0, shape),
        torch.tensor([len(ids) - 3 for ids in behind]).unflatten(0, shape),
        torch.tensor([TYPES.index(one.type) for _, one in asked]).unflatten(0, shape),
        nouns.unflatten(0, shape),
        places[:, 0].unflatten(0, shape),
        places[:, 1].unflatten(0, shape),
        _patch_words(scenes),
    )


def _places(scene: Scene, question: Question) -> tuple[tuple[Scene, int | None], tuple[Scene, int | None]]:
    """Numbers of the thing that the question's noun names and of the one its answer is read from."""
    subjects = question.subjects
    named = subjects[0] if len(subjects) == 1 else None
    if question.type == "larger":
        objects = [span for span in question.spans if span.role == "object"]
        first = question.text[objects[0].start : objects[0].stop].lower()
        named = next(number for number in subjects if scene.objects[number].name == first)
        source = next(number for number in subjects if scene.objects[number].name == question.answer)
        return (scene, named), (scene, source)
    return (scene, named), (scene, question.sources[0] if question.sources else named)


def _place(scene: Scene, number: int | None, window: tuple[int, int]) -> tuple[int, int]:
    if number is None:
        return UNKNOWN, UNKNOWN
    thing = scene.objects[number]
    return thing.y // PATCH + window[0], thing.x // PATCH + window[1]


def _patch_words(scenes: list[Scene]) -> torch.Tensor:
    tokenizer = decoder_tokenizer()
    of_kind = torch.tensor([*(tokenizer(f" {kind.name}")["input_ids"][-1] for kind in kinds()), UNKNOWN])
    of_colour = torch.tensor([*(tokenizer(f" {colour}")["input_ids"][-1] for colour in COLOURS), UNKNOWN])
    seen = [(scene.patch_kinds().ravel(), scene.patch_colours().ravel()) for scene in scenes]
    return torch.stack(
        [torch.stack([of_kind[torch.from_numpy(k).long()], of_colour[torch.from_numpy(c).long()]], -1) for k, c in seen]
    )
