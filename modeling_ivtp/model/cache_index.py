"""Which tokens the entries of a KV cache layer stand for, when some were dropped before they got there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .visual_sequence import VisualSequence


@dataclass(eq=False)
class CacheIndex:
    """Which logical tokens the entries of a cache layer stand for. Layers that saw the same tokens share one object.

    Attributes
    ----------
    stored : int
        Entries that `key_mask` speaks of; every later entry is one logical token.
    dropped : int
        Logical tokens without an entry, before the end of `stored`.
    tail : int
        Last entries of `stored` that are one logical token each: what `crop` may take away.
    key_mask : bool Tensor (B, stored) or None
        False where a shorter row is filled up on the left. None: every entry is a token of its row.
    position_shift : int64 Tensor (B, 1) or None
        How far positions were renumbered down (`positions="compact"`). None: they were not.
    """

    stored: int = 0
    dropped: int = 0
    tail: int = 0
    key_mask: torch.Tensor | None = None
    position_shift: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._latest: tuple[Any, CacheIndex] | None = None

    def _once(self, key: Any, change: Callable[[], "CacheIndex"]) -> "CacheIndex":
        """Make a changed cache_index once for all layers that share this one, so that they go on sharing."""
        if self._latest is not None:
            known = self._latest[0]
            if known is key or (not isinstance(key, torch.Tensor) and type(known) is type(key) and known == key):
                return self._latest[1]
        self._latest = (key, change())
        return self._latest[1]

    def _of_rows(self, key: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> "CacheIndex":
        mask, shift = self.key_mask, self.position_shift
        if mask is None and shift is None:
            return self
        return self._once(
            key,
            lambda: replace(
                self,
                key_mask=None if mask is None else change(mask),
                position_shift=None if shift is None else change(shift),
            ),
        )

    def select_rows(self, rows: torch.Tensor) -> "CacheIndex":
        """The cache_index of the batch `rows` (int64 Tensor), for beams that are reordered."""
        return self._of_rows(rows, lambda tensor: tensor[rows.to(tensor.device)])

    def repeat_rows(self, repeats: int) -> "CacheIndex":
        """The cache_index with every row repeated."""
        return self._of_rows(("repeat", repeats), lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def cropped(self, entries: int) -> "CacheIndex":
        """The cache_index when only the first `entries` entries are left.

        Raises
        ------
        ValueError
            If that cuts into the part of the prompt where tokens were dropped.
        """
        if entries >= self.stored:
            return self
        removed = self.stored - entries
        if removed > self.tail:
            raise ValueError(
                f"The cache cannot be cropped by {removed} of its prompt's tokens: visual tokens were dropped there. "
                f"Allowed: at most {self.tail}. Run the shortened prompt anew instead."
            )
        mask = None if self.key_mask is None else self.key_mask[:, :entries]
        return self._once(
            ("crop", entries), lambda: replace(self, stored=entries, tail=self.tail - removed, key_mask=mask)
        )

    def valid_entries(self, entries: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of a layer's `entries` are tokens of their row: bool Tensor (B, entries), or None if all are.

        Parameters
        ----------
        entries : int
        attention_mask : Tensor (B, logical length) or None
            The 2D mask of the whole sequence; it speaks for entries after `stored`.
        """
        later = entries - self.stored
        if self.key_mask is None and (attention_mask is None or later == 0):
            return None
        if attention_mask is None:
            newer = self.key_mask.new_ones(self.key_mask.shape[0], later)  # type: ignore[union-attr]
        else:
            start = self.stored + self.dropped
            newer = attention_mask[:, start : start + later].bool()
        stored = newer.new_ones(newer.shape[0], self.stored) if self.key_mask is None else self.key_mask
        return torch.cat([stored.to(newer.device), newer], dim=1)

    def extended(
        self,
        past_entries: int,
        past_valid: torch.Tensor | None,
        sequence: VisualSequence,
        renumbered: torch.Tensor | None,
    ) -> "CacheIndex":
        """The cache_index after a pass that stored what is left of a prompt.

        Parameters
        ----------
        past_entries : int
            Entries before the pass.
        past_valid : bool Tensor (B, past_entries) or None
        sequence : VisualSequence
            What the layers saw.
        renumbered : int64 Tensor (B, 1) or None
            How far the pass moved positions down.
        """
        valid = sequence.valid
        if past_valid is None and valid is not None:
            past_valid = valid.new_ones(valid.shape[0], past_entries)
        if valid is None and past_valid is not None:
            valid = past_valid.new_ones(past_valid.shape[0], sequence.size)
        shift = self.position_shift
        if renumbered is not None:
            shift = renumbered if shift is None else shift + renumbered.to(shift.device)
        return CacheIndex(
            stored=past_entries + sequence.size,
            dropped=self.dropped + sequence.length - sequence.size,
            tail=sequence.tail,
            key_mask=None
            if valid is None or past_valid is None
            else torch.cat([past_valid.to(valid.device), valid], 1),
            position_shift=shift,
        )
