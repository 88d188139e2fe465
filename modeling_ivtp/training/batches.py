"""From written conversations to a batch: inputs of the model, and labels on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.images import load_image
from .conversation import Written, write
from .data import Conversation

IGNORED = -100
"""The label of tokens that are not learned."""


@dataclass(frozen=True)
class Collator:
    """Makes a batch of conversations. `Trainer` calls it, also in other processes.

    Attributes
    ----------
    processor : IVTPLlavaProcessor
    max_length : int
        Tokens of a row; what is longer is cut at the end.
    """

    processor: Any
    max_length: int

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """Return the model's inputs, padded on the right, and `labels` (B, S) int64.

        Raises
        ------
        ValueError
            If a picture does not fit into the length, or no label is left in any row.
        """
        written = [write(self.processor, row) for row in rows]
        images = [_load(image, row.name) for row in written for image in row.images]
        batch = self.processor(
            images=images or None,
            text=[row.text for row in written],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets, replaced = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for number, row in enumerate(written):
            learned = answer_tokens(row, torch.as_tensor(offsets[number]), replaced[number] if row.images else [])
            learned &= batch["attention_mask"][number].bool()
            labels[number, learned] = batch["input_ids"][number, learned]
        inputs = self._cut(dict(batch) | {"labels": labels}, written)
        if not (inputs["labels"][:, 1:] != IGNORED).any():
            raise ValueError(
                f"{', '.join(row.name for row in written)}: no answer is left in max_length={self.max_length} tokens"
            )
        return inputs

    def _cut(self, inputs: dict[str, Any], written: Sequence[Written]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        if ids.shape[1] <= self.max_length:
            return inputs
        lost = (ids[:, self.max_length :] == self.processor.image_token_id).any(1).tolist()
        if any(lost):
            name = written[lost.index(True)].name
            raise ValueError(f"{name}: its pictures do not fit into max_length={self.max_length} tokens")
        for name in ("input_ids", "attention_mask", "labels", "clip_spans"):
            if name in inputs:
                inputs[name] = inputs[name][:, : self.max_length]
        return inputs


def answer_tokens(row: Written, offsets: torch.Tensor, replaced: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Mark the tokens of a row's answers.

    Parameters
    ----------
    row : Written
    offsets : int64 Tensor (S, 2)
        The tokens' characters in the text with all of its placeholders; empty for special tokens without any.
    replaced : sequence of dict
        How its image tokens were replaced by placeholders.

    Returns
    -------
    bool Tensor (S,)
    """
    learned = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in row.answers:
        # No placeholder stands in an answer, so those before it move it as a whole.
        before = [item for item in replaced if item["span"][1] <= start]
        moved = before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0
        overlaps = (offsets[:, 0] < end + moved) & (offsets[:, 1] > start + moved)
        learned |= overlaps & (offsets[:, 0] < offsets[:, 1])
    return learned


def _load(image: Any, name: str) -> Any:
    try:
        return load_image(str(image) if isinstance(image, Path) else image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: a picture cannot be read: {error}") from error
