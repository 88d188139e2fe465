"""Texts for CLIP's text tower: captions and questions, read up to some word, and what that much of them names."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from benchmarks.quality.world import Scene, caption, kinds, questions
from modeling_ivtp.hub.clip_bpe import clip_tokenizer_from_open_clip

LENGTH = 64


@dataclass(frozen=True)
class Texts:
    """One text for every scene of a batch.

    Attributes
    ----------
    input_ids : int64 Tensor (B, LENGTH)
    ends : int64 Tensor (B,)
        The token that each text is read up to: the end token, or an earlier one.
    names : bool Tensor (B, kinds)
        The kinds that are named up to there.
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


def texts_of(scenes: list[Scene], draw: np.random.Generator, question_share: float = 0.25) -> Texts:
    """A caption or a question of each scene, half of them cut short.

    The text tower is causal, so a token's feature is that of the text up to it; cutting captions at a word and pooling
    there trains exactly what Eq. 6 compares with the image. Questions take part without their answers, so that their
    wording is known to the tower, as any wording of the web is to a real CLIP.
    """
    texts = []
    for scene in scenes:
        asked = None
        if draw.random() < question_share:
            one = questions(scene, 1, variant=int(draw.integers(1 << 30)))[0]
            asked = one.text if one.subjects else None
        texts.append(asked or caption(scene, variant=int(draw.integers(1 << 30))))
    encoded = _tokenizer()(  # type: ignore[operator]
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_offsets_mapping=True
    )
    ids = torch.tensor(encoded["input_ids"])
    lengths = [sum(mask) for mask in encoded["attention_mask"]]
    ends, names = [], torch.zeros(len(texts), len(kinds()), dtype=torch.bool)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        end = length - 1 if draw.random() < 0.5 else int(draw.integers(1, length - 1))
        ends.append(end)
        stop = len(text) if end == length - 1 else encoded["offset_mapping"][row][end][1]
        for word in text[:stop].lower().replace(",", " ").replace("?", " ").replace(".", " ").split():
            if word in _kinds_by_word():
                names[row, _kinds_by_word()[word]] = True
    return Texts(ids, torch.tensor(ends), names)
