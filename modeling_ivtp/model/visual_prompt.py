"""A prompt with images, as the decoder prunes it: its pseudo-CLS tokens, its positions, and what is left of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .labels import CHOOSE, label
from .pruner import DecoderStep, GridPositions, Pruner, full_precision
from .rollout import DecoderAttentionRecord, GroupScores
from .schedule import Group
from .text_relevance import pseudo_cls
from .visual_sequence import VisualSequence


@dataclass(frozen=True)
class PseudoCLSTokens:
    """The pseudo-CLS tokens of a prompt, one per image (Sec. 3.3).

    Attributes
    ----------
    embeds : Tensor (B, M, d)
        Input embeddings (Eq. 8).
    end_positions : int64 Tensor (B, M)
        Their RoPE positions: that of the first token after each image.
    key_tokens : bool Tensor (B, M, S) or None
        The columns of the prompt that are pooled anew at each layer. None: the tokens run through the layers.
    """

    embeds: torch.Tensor
    end_positions: torch.Tensor
    key_tokens: torch.Tensor | None = None


@dataclass
class VisualPrompt:
    """The visual tokens of a prompt and how the decoder prunes them.

    Attributes
    ----------
    sequence : VisualSequence
        The prompt as it comes to the decoder.
    pruner : Pruner
        What chooses.
    groups : tuple of Group
        The pruner is asked at the top of each.
    state : any
        What the pruner prepared.
    scores : list of GroupScores or None
        Each group's decision is appended.
    pseudo_cls : PseudoCLSTokens or None
        Tokens that run along, where the pruner needs them.
    instruction : bool Tensor (B, S) or None
        The prompt's columns with words of the instruction, where the pruner needs them.
    stage : {"decoder", "ahead"}
        Whether the groups are those of the decoder itself, or of a pass ahead of it.
    """

    sequence: VisualSequence
    pruner: Pruner
    groups: tuple[Group, ...]
    state: Any = None
    scores: list[GroupScores] | None = None
    pseudo_cls: PseudoCLSTokens | None = None
    instruction: torch.Tensor | None = None
    stage: str = "decoder"

    def stages(self, layers: int) -> Iterator[tuple[int, int, Group | None]]:
        """Yield all layers of the decoder as (first, last, group); layers outside of groups come with None."""
        start = 0
        for group in self.groups:
            if start < group.first:
                yield start, group.first - 1, None
            yield group.first, group.last, group
            start = group.last + 1
        yield start, layers - 1, None


@dataclass
class Numbering:
    """RoPE positions of what is left of a prompt.

    Attributes
    ----------
    position_ids : int64 Tensor (B, S)
        Of the whole prompt.
    valid : Tensor (B, S) or None
        The 2D mask of the prompt.
    ends : int64 Tensor (B, M) or None
        Positions of the pseudo-CLS tokens.
    compact : bool
        Renumber without gaps.
    grid : GridPositions or None
        Visual tokens stand on a grid.
    starts : int64 Tensor (B, M) or None
        Logical columns where images start, for a grid; after all others for an image that a row does not have.
    """

    position_ids: torch.Tensor
    valid: torch.Tensor | None
    ends: torch.Tensor | None
    compact: bool
    grid: GridPositions | None = None
    starts: torch.Tensor | None = None

    def of(
        self, sequence: VisualSequence, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return positions of the sequence (B, n) and its pseudo-CLS tokens (B, M), and how far the row's end moves.

        `shift` (B, 1) is how far earlier turns moved it down; the last value, (B, 1), is for this turn. On a grid,
        positions are (2, B, n): those of rows and those of columns.
        """
        positions, ends = sequence.at_slots(self.position_ids), self.ends
        if shift is not None:
            positions = positions - shift.to(positions.device)
            ends = None if ends is None else ends - shift.to(ends.device)
        if self.grid is not None:
            return self._on_grid(sequence, positions, self.grid)
        if not self.compact:
            return positions.clamp_min(0), ends, None
        present = torch.ones_like(self.position_ids) if self.valid is None else self.valid.long()
        original = present.cumsum(1) - 1
        gapless = torch.arange(sequence.size, device=positions.device).expand_as(positions)
        if sequence.valid is not None:
            gapless = sequence.valid.long().cumsum(1) - 1
        positions = (positions - (sequence.at_slots(original) - gapless)).clamp_min(0)
        if ends is not None:
            ends = positions.gather(1, sequence.columns[..., -1].clamp_max(sequence.size - 1)) + 1
        return positions, ends, original[:, -1:] - gapless[:, -1:]

    def _on_grid(
        self, sequence: VisualSequence, positions: torch.Tensor, grid: GridPositions
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """Return positions of rows and columns (2, B, n) from those in a line (B, n), and how far the end moves."""
        assert self.starts is not None
        starts, slots = self.starts.to(positions.device), sequence.slots.to(positions.device)
        ended = (starts[:, None] + grid.rows * grid.columns <= slots[..., None]).sum(-1)
        positions = positions - ended * grid.saved
        patch = positions.new_zeros(positions.shape[0], sequence.size + 1)
        columns = sequence.columns.to(positions.device).flatten(1)
        patch = patch.scatter(1, columns, sequence.patches.to(positions.device).flatten(1))[:, :-1]
        first = positions - patch
        axes = torch.stack([first + patch // grid.columns, first + patch % grid.columns]).clamp_min(0)
        images = (starts < self.position_ids.shape[1]).sum(-1, keepdim=True)
        return axes, None, images * grid.saved


def image_starts(sequence: VisualSequence) -> torch.Tensor:
    """Return the logical column where each image starts, of which any token is left: int64 (B, M)."""
    columns = sequence.columns.flatten(1)
    slots = torch.nn.functional.pad(sequence.slots, (0, 1), value=sequence.length)
    logical = slots.gather(1, columns).view_as(sequence.columns)
    starts = (logical - sequence.patches).masked_fill(~sequence.token_present, sequence.length)
    return starts.amin(-1)


class HiddenStates:
    """The hidden states that `output_hidden_states` asks for: all, or those of some layers.

    Parameters
    ----------
    wanted : bool, int or list of int
        Numbers count the inputs of all layers and the decoder's output; negative ones count from the end.
    layers : int
        Layers of the decoder.
    """

    def __init__(self, wanted: bool | int | list[int], layers: int) -> None:
        self.states: list[torch.Tensor | None] = [None] * (layers + 1)
        numbers = [wanted] if isinstance(wanted, int) else wanted
        count = len(self.states)
        self.layers = set(range(count)) if wanted is True else {n % count for n in numbers if -count <= n < count}

    def __setitem__(self, layer: int, state: torch.Tensor) -> None:
        if layer in self.layers:
            self.states[layer] = state

    def with_last(self, state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return what the model's output holds, with the decoder's output as the last entry."""
        self[len(self.states) - 1] = state
        return tuple(self.states)


@dataclass
class PromptPass:
    """A prompt on its way through the decoder: the tokens that are left, and the pseudo-CLS tokens beside them.

    Attributes
    ----------
    visual : VisualPrompt
    tokens : Tensor (B, n, d)
        Hidden states of the tokens that are left.
    sequence : VisualSequence
        Which tokens they are.
    numbering : Numbering
    pseudo_cls : Tensor (B, M, d) or None
        Hidden states of the pseudo-CLS tokens.
    sizes : float32 Tensor (B, M, k) or None
    order : int64 Tensor (B, M, k) or None
        See `Choice.sizes` and `Choice.order`.
    states : HiddenStates or None
        Collects the input of every layer, where `output_hidden_states` asks for it.
    weights : Tensor (B, M, k) or None
        How much each visual token counts, where tokens are weighted and not dropped. None: fully.
    """

    visual: VisualPrompt
    tokens: torch.Tensor
    sequence: VisualSequence
    numbering: Numbering
    pseudo_cls: torch.Tensor | None
    sizes: torch.Tensor | None = None
    order: torch.Tensor | None = None
    states: HiddenStates | None = None
    weights: torch.Tensor | None = None

    def note_state(self, layer: int) -> None:
        """Hand out the hidden states that a layer gets, if anybody wants them."""
        if self.states is None or layer not in self.states.layers:
            return
        state = self.states[layer] = self.sequence.restore(self.tokens)
        if state.requires_grad:
            # The layer goes on from what is handed out, so that gradients with respect to it can be asked for.
            index = self.sequence.slots.to(state.device).clamp_max(state.shape[1] - 1)
            self.tokens = state.gather(1, index[..., None].expand_as(self.tokens))

    def joined(self) -> torch.Tensor:
        """Return tokens and pseudo-CLS tokens side by side: (B, n + M, d)."""
        assert self.pseudo_cls is not None
        pseudo, tokens = self.pseudo_cls.to(self.tokens.device), self.visual.pseudo_cls
        if tokens is not None and tokens.key_tokens is not None:
            keys = self.sequence.at_slots(tokens.key_tokens)
            if self.sequence.valid is not None:
                keys = keys & self.sequence.valid[:, None]
            pseudo = pseudo_cls(self.tokens, keys.to(self.tokens.device), pseudo)
        return torch.cat([self.tokens, pseudo], 1)

    def drop(self, group: Group, records: list[Any], next_record: DecoderAttentionRecord | None = None) -> None:
        """Ask the pruner at the top of a group, and leave out the tokens that it does not keep.

        Parameters
        ----------
        group : Group
        records : list of AttentionRecord or list of DecoderAttentionRecord
            Of the group's layers, lowest first: the former where pseudo-CLS tokens run along.
        next_record : DecoderAttentionRecord, optional
            Of the layer after the group, for a pruner that needs it.
        """
        visual, before = self.visual, self.sequence
        with torch.no_grad(), full_precision(self.tokens.device), label(CHOOSE):
            choice = visual.pruner.in_decoder(self._step(group, records, next_record))
        for record in records:
            record.seal()
        self.sizes, self.order = choice.sizes, choice.order
        self.sequence, columns = before.keep(choice.kept, choice.ragged)
        if visual.scores is not None:
            visual.scores.append(
                GroupScores(visual.stage, group, before.patches, choice.scores, self.sequence.patches, choice.mixture)
            )
        columns = columns.to(self.tokens.device)[..., None].expand(-1, -1, self.tokens.shape[-1])
        merged = None if choice.mixture is None else choice.of(before.visual(self.tokens))
        self.tokens = self.tokens.gather(1, columns)
        if merged is not None:
            self.tokens = self.sequence.with_visual(self.tokens, merged)

    def weigh(self, group: Group, records: list[Any]) -> None:
        """Ask the pruner at the top of a group how much each visual token counts from here on; nothing is dropped."""
        with full_precision(self.tokens.device), label(CHOOSE):
            self.weights = self.visual.pruner.weigh(self._step(group, records))
        for record in records:
            record.seal()

    def column_weights(self) -> torch.Tensor | None:
        """Return how much each column counts as a key, 1 for text: (B, n), or None if nothing was weighed."""
        if self.weights is None:
            return None
        columns = self.sequence.columns.to(self.weights.device).flatten(1)
        even = self.weights.new_ones(columns.shape[0], self.sequence.size + 1)
        return even.scatter(1, columns, self.weights.flatten(1))[:, :-1]

    def kept_tokens(self) -> torch.Tensor:
        """Mark the logical columns that are left, or count for more than a half: bool (B, S)."""
        kept, weights = self.sequence.kept_tokens(), self.column_weights()
        if weights is None:
            return kept
        counts = self.sequence.restore(weights.detach()[..., None])[..., 0] > 0.5
        return kept & counts

    def _step(self, group: Group, records: list[Any], next_record: DecoderAttentionRecord | None = None) -> DecoderStep:
        asked = (records, []) if self.pseudo_cls is not None else ([], records)
        return DecoderStep(
            group,
            *asked,
            self.tokens,
            self.sequence,
            sizes=self.sizes,
            order=self.order,
            state=self.visual.state,
            next_record=next_record,
            pseudo_cls=self.pseudo_cls,
            instruction=self._instruction(),
            weights=self.weights,
        )

    def _instruction(self) -> torch.Tensor | None:
        """Mark the columns that are left of the instruction: bool (B, n)."""
        if self.visual.instruction is None:
            return None
        columns = self.sequence.at_slots(self.visual.instruction)
        return columns if self.sequence.valid is None else columns & self.sequence.valid
