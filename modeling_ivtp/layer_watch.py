"""A decoder layer's attention, for methods that go by what the prompt's own tokens attend to."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention_maps import map_heads


@dataclass
class LayerWatch:
    """Queries and keys of one decoder layer during a prompt.

    Attributes
    ----------
    past : int
        Entries of the cache before the prompt.
    past_valid : bool Tensor (B, past) or None
        Which of them are tokens of their row. None: all.
    valid : bool Tensor (B, n) or None
        Which columns of the sequence are. None: all.
    query : Tensor (B, H, n, dh)
    key : Tensor (B, H_kv, past + n, dh)
    scale : float
        What their products are multiplied with.
    """

    past: int
    past_valid: torch.Tensor | None
    valid: torch.Tensor | None
    query: torch.Tensor = field(init=False, repr=False)
    key: torch.Tensor = field(init=False, repr=False)
    scale: float = field(init=False)
    # Gradient checkpointing runs a layer again in the backward pass, long after the choice.
    sealed: bool = field(init=False, default=False)

    count = 0
    """Observers that travel along: none."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, observer: Any, new_value: Any, scale: float
    ) -> None:
        """Keep what the layer computes; see `Observation.attend`."""
        if not self.sealed:
            self.query, self.key, self.scale = query.detach(), key[:, :, : self.past + query.shape[2]].detach(), scale

    def seal(self) -> None:
        """Let go of the tensors and accept no more."""
        self.query = self.key = None  # type: ignore[assignment]
        self.sealed = True

    def attention(self, first: int, weights: torch.Tensor) -> torch.Tensor:
        """What columns of the sequence receive, from its columns `first` on: weights times the head-averaged map.

        Parameters
        ----------
        first : int
        weights : float32 Tensor (B, M, n - first)
            How much each of those columns counts, for each image.

        Returns
        -------
        float32 Tensor (B, M, n)
        """
        total = weights.new_zeros(*weights.shape[:2], self.key.shape[2])
        for attention in self._maps(first):
            total += (weights[:, None] @ attention).sum(1)
        return total[..., self.past :] / self.query.shape[1]

    def attention_map(self, first: int) -> torch.Tensor:
        """The head-averaged map of the columns `first` on, over the sequence: float32 Tensor (B, n - first, n)."""
        total = torch.zeros((), device=self.query.device)
        for attention in self._maps(first):
            total = total + attention.sum(1)
        return total[..., self.past :] / self.query.shape[1]

    def _maps(self, first: int) -> Iterator[torch.Tensor]:
        """Maps of some heads at a time, from column `first` on: float32 (B, some heads, n - first, past + n)."""
        visible = self._visible(first)
        for logits in map_heads(self.query[:, :, first:], self.key, self.scale):
            yield logits.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).nan_to_num(0)

    def _visible(self, first: int) -> torch.Tensor:
        """Which keys the queries from `first` on see: bool (B or 1, 1, Q, past + n)."""
        keys = torch.arange(self.key.shape[2], device=self.query.device)
        queries = self.past + torch.arange(first, self.query.shape[2], device=self.query.device)
        visible = (keys <= queries[:, None])[None]
        if self.past_valid is not None or self.valid is not None:
            rows = self.query.shape[0]
            there = torch.ones(rows, self.key.shape[2], dtype=torch.bool, device=self.query.device)
            if self.past_valid is not None:
                there[:, : self.past] = self.past_valid
            if self.valid is not None:
                there[:, self.past :] = self.valid
            visible = visible & there[:, None]
        return visible[:, None]
