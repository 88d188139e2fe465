"""Stage 2 ahead of the decoder (`decoder_choice="ahead"`): the choice of IVTP Sec. 3.3, made before the decoder runs.

Attention is causal, so nothing that stands after an image decides which of its tokens stay; the question comes in
through the pseudo CLS. What stands up to the end of the last image therefore runs through the first layers by itself,
group after group and image beside image, as it would inside the decoder, and chooses the same tokens. The decoder then
gets those tokens, as the vision tower made them, from its first layer on. So all of its layers hold as many entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from .prompt import PromptInputs
from .visual_prompt import Numbering, PseudoCLSTokens, VisualPrompt
from .visual_sequence import VisualSequence


@dataclass(frozen=True)
class Prefix:
    """Rows without padding up to the end of their last image, by tensors that do not depend on what stands after it.

    So one captured graph serves questions of all lengths, and rows of several prompts make one batch.

    Attributes
    ----------
    visual : VisualPrompt
        Pruner, groups and counts.
    tensors : dict of str to Tensor
        `tokens` (B, n, d); `positions` (B, n); `columns` and `patches` (B, M, k), as in `VisualSequence`; `pseudo_cls`
        (B, M, d) and its `end_positions` (B, M).
    """

    visual: VisualPrompt
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, visual: VisualPrompt, tokens: torch.Tensor, position_ids: torch.Tensor) -> "Prefix":
        """Make it of a prompt that ends with its last image, its embeddings, and positions of the whole prompt."""
        sequence, pseudo = visual.sequence, visual.pseudo_cls
        assert pseudo is not None
        numbering = Numbering(
            position_ids.expand(tokens.shape[0], -1), None, None, visual.pruner.needs.compact_positions
        )
        return cls(
            visual,
            {
                "tokens": tokens,
                "positions": numbering.of(sequence, None)[0],
                "columns": sequence.columns,
                "patches": sequence.patches,
                "pseudo_cls": pseudo.embeds,
                "end_positions": pseudo.end_positions,
            },
        )

    def choose(self, language_model: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the patches that stay: int64 (B, M, k'). Other `tensors` of these shapes may replace its own."""
        given = self.tensors if tensors is None else tensors
        columns, positions = given["columns"], given["positions"]
        rows, size = positions.shape
        sequence = VisualSequence(
            length=size,
            rows=self.visual.sequence.rows,
            slots=torch.arange(size, device=columns.device).expand(rows, -1),
            valid=None,
            columns=columns,
            patches=given["patches"],
            image_present=columns[..., 0] < size,
            order=None,
            ends=columns.new_full((rows, 1), size - 1),
        )
        pseudo = PseudoCLSTokens(given["pseudo_cls"], given["end_positions"])
        visual = VisualPrompt(sequence, self.visual.pruner, self.visual.groups, pseudo_cls=pseudo)
        return language_model.choose(given["tokens"], None, positions, None, visual).patches


def up_to_images(visual: VisualPrompt, embeds: torch.Tensor) -> tuple[VisualPrompt, torch.Tensor]:
    """Cut a prompt and its embeddings (B, n, d) after the last image of any row."""
    sequence = visual.sequence.up_to_images()
    return replace(visual, sequence=sequence, stage="ahead"), embeds[:, : sequence.size]


def choose_ahead(
    model: Any, prompt: PromptInputs, visual: VisualPrompt, embeds: torch.Tensor, cache: Cache | None
) -> tuple[VisualPrompt, torch.Tensor]:
    """Let the decoder's groups choose, and leave out what they drop.

    Parameters
    ----------
    model : IVTPLlavaModel
    prompt : PromptInputs
    visual : VisualPrompt
        From `build_prompt`.
    embeds : Tensor (B, n, d)
        Its embeddings.
    cache : Cache or None
        Of earlier turns. It is read and left as it is.

    Returns
    -------
    VisualPrompt
        With no groups.
    Tensor (B, n', d)
        The embeddings that are left, unchanged.
    """
    before = visual.sequence
    chosen = replace(visual, groups=(), pseudo_cls=None)
    if not drops(visual):
        return chosen, embeds
    prefix, tokens = up_to_images(visual, embeds)
    positions = prompt.position_ids
    if positions is None:
        positions = (torch.arange(prompt.length, device=embeds.device) + prompt.past)[None]
    patches = None
    sequence = prefix.sequence
    alone = prompt.past == 0 and sequence.counted and sequence.valid is None and sequence.order is None
    if alone and visual.scores is None and visual.pseudo_cls is not None and not before.ragged:
        patches = model.prompt_graphs.replay_choice(model, Prefix.of(prefix, tokens, positions))
    if patches is None:
        patches = model.language_model.choose(tokens, prompt.attention_mask, positions, cache, prefix).patches
    sequence, columns = before.keep(places(patches, before.patches))
    index = columns.to(embeds.device)[..., None].expand(-1, -1, embeds.shape[-1])
    return replace(chosen, sequence=sequence), embeds.gather(1, index)


def drops(visual: VisualPrompt) -> bool:
    """Return whether a prompt's groups drop anything."""
    last = visual.groups[-1] if visual.groups else None
    return last is not None and (last.adaptive or last.keep < visual.sequence.patches.shape[2])


def places(chosen: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Return where patches (..., k') stand among others (..., k): int64 (..., k'), k for those that do not."""
    found = chosen[..., None] == patches[..., None, :]
    return found.int().argmax(-1).masked_fill(~found.any(-1), patches.shape[-1])
