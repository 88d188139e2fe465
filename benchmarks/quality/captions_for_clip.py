"""Texts for CLIP's text tower: captions and questions, read whole or up to a word, and the kinds that they name."""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from benchmarks.quality.world import Scene, caption, kinds, questions
from modeling_ivtp.checkpoints.clip_bpe import clip_tokenizer_from_open_clip

LENGTH = 64


@dataclass(frozen=True)
class Texts:
    """One text for every scene of a batch.

    Attributes
    ----------
    input_ids : int64 Tensor (B, LENGTH)
    ends : int64 Tensor (B,)
        The token at which each text is read: the end token, or a word's.
    names : bool Tensor (B, kinds)
        All kinds that the text names, for a text read at the end token; the kind that the word names, for one read
        at a word.
    """

    input_ids: torch.Tensor
    ends: torch.Tensor
    names: torch.Tensor


@cache
def _tokenizer() -> object:
    return clip_tokenizer_from_open_clip()


@cache
def _kinds_by_word() -> dict[str, int]:
    return {word: number for number, kind in enumerate(kinds()) for word in (kind.name, kind.plural)}


def texts_of(
    scenes: list[Scene], draw: np.random.Generator, question_share: float = 0.4, word_share: float = 0.5
) -> Texts:
    """Draw a caption or a question of each scene, read whole or at one of their words.

    Eq. 6 compares single words with the image and counts those above a threshold as visible. From the web's billions of
    captions CLIP learns that by itself; here it is trained: a text read at a word matches the images that show what
    this word names, and no image if it names nothing. Questions take part without their answers, so that the tower
    knows their wording.

    Parameters
    ----------
    scenes : list of Scene
    draw : numpy Generator
    question_share : float, default 0.4
        Share of questions among the texts.
    word_share : float, default 0.5
        Share of texts that are read at a word; the others are read whole, at the end token, as CLIP reads captions.
    """
    texts = []
    for scene in scenes:
        text = None
        if draw.random() < question_share:
            question = questions(scene, 1, variant=int(draw.integers(1 << 30)))[0]
            text = question.text if question.subjects else None
        texts.append(text or caption(scene, variant=int(draw.integers(1 << 30))))
    encoded = _tokenizer()(  # type: ignore[operator]
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_offsets_mapping=True
    )
    ends, names = [], torch.zeros(len(texts), len(kinds()), dtype=torch.bool)
    for row, text in enumerate(texts):
        last = sum(encoded["attention_mask"][row]) - 1
        words = [match.span() for match in re.finditer(r"\w+", text)]
        end = last
        if draw.random() < word_share:
            # Words that name something are as often read as words that do not.
            naming = [span for span in words if text[slice(*span)].lower() in _kinds_by_word()]
            words = [span for span in words if span not in naming] if draw.random() < 0.5 or not naming else naming
            start, stop = words[int(draw.integers(len(words)))]
            words = [(start, stop)]
            offsets = encoded["offset_mapping"][row]
            end = max((at for at in range(1, last) if start <= offsets[at][0] < stop), default=last)
        ends.append(end)
        for span in words:
            if (kind := _kinds_by_word().get(text[slice(*span)].lower())) is not None:
                names[row, kind] = True
    return Texts(torch.tensor(encoded["input_ids"]), torch.tensor(ends), names)
