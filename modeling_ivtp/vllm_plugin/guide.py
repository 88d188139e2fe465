"""The guide of the choice for an image: the prompt up to the end of the image's own turn.

A later turn must not change what was kept of an earlier turn's images: their keys and values are cached, and would be
computed anew. So an image is guided by the words that stand before the end of its own turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.processing_ivtp import IVTPLlavaProcessor


@dataclass(frozen=True)
class Guide:
    """The part of a prompt that decides about an image.

    Attributes
    ----------
    token_ids : tuple of int
        The prompt's first tokens, one image token for each image.
    images : int
        Images among them.
    number : int
        The image's own number, from 0.
    """

    token_ids: tuple[int, ...]
    images: int
    number: int

    def expanded(self, image_token: int, patches: int) -> list[int]:
        """Return the tokens with as many placeholders for each image as it has patches."""
        return [token for one in self.token_ids for token in [one] * (patches if one == image_token else 1)]

    def tensors(self, processor: IVTPLlavaProcessor, image_token: int, patches: int) -> dict[str, torch.Tensor]:
        """Return `prompt_ids` (S,) and, with a CLIP tokenizer, `clip_input_ids` (W, C) and `clip_spans` (S, 2)."""
        ids = torch.tensor([self.expanded(image_token, patches)])
        tensors = {"prompt_ids": ids[0]}
        if processor.clip_tokenizer is not None:
            question = processor.read_instruction(ids)
            tensors |= {name: question[name][0] for name in ("clip_input_ids", "clip_spans")}
        return tensors


def guides_of(
    token_ids: Sequence[int], processor: IVTPLlavaProcessor, image_token: int, with_words: bool = True
) -> list[Guide]:
    """Return the guide of every image of a prompt, in order.

    Parameters
    ----------
    token_ids : sequence of int
        The prompt, one image token for each image.
    processor : IVTPLlavaProcessor
        Knows the role markers.
    image_token : int
    with_words : bool, default True
        Whether words after an image steer; otherwise a guide ends with the last image of the turn.
    """
    ids = list(token_ids)
    columns = [column for column, token in enumerate(ids) if token == image_token]
    ends = processor.turn_ends(ids)
    guides = []
    for number, column in enumerate(columns):
        end = ends[column]
        inside = [other for other in columns if other < end]
        if not with_words:
            end = inside[-1] + 1
        guides.append(Guide(tuple(ids[:end]), len(inside), number))
    return guides
