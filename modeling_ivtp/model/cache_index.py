"""The index of a KV cache layer: the tokens of its entries, when other tokens were dropped in lower layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .visual_sequence import VisualSequence


@dataclass(eq=False)
class CacheIndex:
    """The logical tokens of a cache layer's entries. Layers that saw the same tokens share one object.

    Attributes
    ----------
    stored : int
        Entries of the prompts so far, which the other fields describe. Each later entry is one logical token.
    dropped : int
        Logical tokens without an entry, all before the end of `stored`.
    croppable : int
        Entries at the end of `stored` that are one logical token each, so that `crop` may remove them.
    key_mask : bool Tensor (B, stored) or None
        False where a shorter row is filled up on the left. None: every entry is a token of its row.
    position_shift : int64 Tensor (B, 1) or None
        How far positions were renumbered down (`positions="compact"`). None: they were not.
    """

    stored: int = 0
    dropped: int = 0
    croppable: int = 0
    key_mask: torch.Tensor | None = None
    position_shift: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._latest: tuple[Any, CacheIndex] | None = None

    def select_rows(self, rows: torch.Tensor) -> "CacheIndex":
        """Take the rows of the batch that `rows` (int64 Tensor) lists, as beam search does."""
        return self._change_rows(rows, lambda tensor: tensor[rows.to(tensor.device)])

    def repeat_rows(self, repeats: int) -> "CacheIndex":
        """Repeat every row."""
        return self._change_rows(("repeat", repeats), lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def cropped(self, entries: int) -> "CacheIndex":
        """Keep the first `entries` entries only.

        Raises
        ------
        ValueError
            If that cuts into the part of the prompt where tokens were dropped.
        """
        if entries >= self.stored:
            return self
        removed = self.stored - entries
        if removed > self.croppable:
            raise ValueError(
                f"The cache cannot be cropped by {removed} of its prompt's tokens: visual tokens were dropped there. "
                f"Allowed: at most {self.croppable}. Run the shortened prompt anew instead."
            )
        mask = None if self.key_mask is None else self.key_mask[:, :entries]
        return self._change_once(
            ("crop", entries), lambda: replace(self, stored=entries, croppable=self.croppable - removed, key_mask=mask)
        )

    def valid_entries(self, entries: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Mark a layer's entries that are tokens of their row: bool Tensor (B, entries), or None if all are.

        Parameters
        ----------
        entries : int
            How many the layer has.
        attention_mask : Tensor (B, logical length) or None
            The 2D mask of the whole sequence; it is read for entries after `stored`.
        """
        later = entries - self.stored
        if self.key_mask is None and (attention_mask is None or later == 0):
            return None
        stored = self.stored if self.key_mask is None else self.key_mask
        if attention_mask is None:
            return join_masks(stored, later)
        start = self.stored + self.dropped
        return join_masks(stored, attention_mask[:, start : start + later].bool(), device=attention_mask.device)

    def extended(
        self,
        past_entries: int,
        past_valid: torch.Tensor | None,
        sequence: VisualSequence,
        renumbered: torch.Tensor | None,
    ) -> "CacheIndex":
        """Add what a pass stored of a prompt.

        Parameters
        ----------
        past_entries : int
            Entries before the pass.
        past_valid : bool Tensor (B, past_entries) or None
            Which of them are tokens of their row. None: all.
        sequence : VisualSequence
            The tokens that the layers saw.
        renumbered : int64 Tensor (B, 1) or None
            How far the pass moved positions down.
        """
        valid = sequence.valid
        mask = join_masks(
            past_entries if past_valid is None else past_valid,
            sequence.size if valid is None else valid,
            device=None if valid is None else valid.device,
        )
        shift = self.position_shift
        if renumbered is not None:
            shift = renumbered if shift is None else shift + renumbered.to(shift.device)
        return CacheIndex(
            stored=past_entries + sequence.size,
            dropped=self.dropped + sequence.length - sequence.size,
            croppable=sequence.trailing_text,
            key_mask=mask,
            position_shift=shift,
        )

    def _change_rows(self, key: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> "CacheIndex":
        mask, shift = self.key_mask, self.position_shift
        if mask is None and shift is None:
            return self
        return self._change_once(
            key,
            lambda: replace(
                self,
                key_mask=None if mask is None else change(mask),
                position_shift=None if shift is None else change(shift),
            ),
        )

    def _change_once(self, key: Any, change: Callable[[], "CacheIndex"]) -> "CacheIndex":
        """Make a change once for all layers that share this object, so that they share the result, too.

        `key` tells changes apart: a tensor by identity, anything else by type and value.
        """
        if self._latest is not None:
            known, result = self._latest
            if known is key or (not isinstance(key, torch.Tensor) and type(known) is type(key) and known == key):
                return result
        self._latest = (key, change())
        return self._latest[1]


def join_masks(*parts: torch.Tensor | int, device: torch.device | None = None) -> torch.Tensor | None:
    """Join masks side by side.

    Parameters
    ----------
    *parts : bool Tensor (B, columns) or int
        A number stands for as many columns of True.
    device : torch.device, optional
        Of the result; default: that of the first tensor.

    Returns
    -------
    bool Tensor (B, all columns) or None
        None if all parts are numbers: nothing is masked.
    """
    first = next((part for part in parts if isinstance(part, torch.Tensor)), None)
    if first is None:
        return None
    rows, device = first.shape[0], first.device if device is None else device
    masks = [
        part.to(device) if isinstance(part, torch.Tensor) else torch.ones(rows, part, dtype=torch.bool, device=device)
        for part in parts
    ]
    return torch.cat(masks, dim=1)
