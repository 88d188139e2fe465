"""Records of attention layers, rollout within a group of layers, and importance (IVTP Sec. 3.2, Eq. 2 to 4).

Rollout multiplies the attention maps of a group (Eq. 3), yet importance needs only one row of the product: that of the
reference token, which is CLS in the vision tower and the pseudo-CLS token in the language model. So that row is carried
down the group from the last layer to the first, vector times matrix, and no two maps are multiplied. For this a layer
records its queries and keys, or its map averaged over heads if it computed its output from the map anyway.

Methods that rank by what decoder layers attend to, without a reference token, read a `DecoderAttentionRecord`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention_maps import averaged_attention, map_heads, weighted_attention
from .schedule import Group


@dataclass
class AttentionRecord:
    """Record of one attention layer, for the rollout of its group.

    The *tracked* tokens of an image are its reference token, at index 0, and its visual tokens after it.

    Attributes
    ----------
    reference_only : bool
        Whether the reference token's row suffices; then only its query is recorded.
    query : Tensor (B, H, M, Q, dh)
        Queries of the tracked tokens of each image; Q is 1 if `reference_only`, else 1 + k.
    key : Tensor (B, H_kv, K, dh)
        Keys of everything that the tracked tokens attend to.
    visible : bool Tensor (B, M, Q, K) or None
        Which keys each query attends to; None: all.
    columns : int64 Tensor (B, M, 1 + k) or None
        Where the tracked tokens stand among the keys; None: in order, K = 1 + k.
    value : Tensor (B, H_kv, n, dh)
        Values of a sequence that holds the visual tokens.
    value_columns : int64 Tensor (B, M, k) or None
        Where the visual tokens stand in it; None: in order, after the first.
    scale : float
        Factor of the products of queries and keys, 1 / sqrt(dh).
    averaged_map : float32 Tensor (B, K, K) or None
        The attention map averaged over heads, if all K tokens are tracked; None: it follows from queries and keys.
    sum_over_devices : callable or None
        Adds up a tensor over the devices of which each has some of the layer's heads (tensor parallelism). None: this
        device has all.
    devices : int
        How many have them.
    sealed : bool
        Whether the record takes no more. Gradient checkpointing runs a layer again in the backward pass, long after its
        group was scored.
    """

    reference_only: bool
    query: torch.Tensor = field(init=False, repr=False)
    key: torch.Tensor = field(init=False, repr=False)
    value: torch.Tensor = field(init=False, repr=False)
    value_columns: torch.Tensor | None = field(init=False, repr=False, default=None)
    scale: float = field(init=False)
    visible: torch.Tensor | None = field(init=False, repr=False, default=None)
    columns: torch.Tensor | None = field(init=False, repr=False, default=None)
    averaged_map: torch.Tensor | None = field(init=False, repr=False, default=None)
    sum_over_devices: Callable[[torch.Tensor], torch.Tensor] | None = field(init=False, repr=False, default=None)
    devices: int = field(init=False, default=1)
    sealed: bool = field(init=False, default=False)

    def over_all_heads(self, row: torch.Tensor) -> torch.Tensor:
        """Average rows that are averaged over this device's heads with those of the other devices."""
        return row if self.sum_over_devices is None else self.sum_over_devices(row) / self.devices

    def fill(self, **tensors: torch.Tensor | float | None) -> None:
        """Store what the attention layer computed; a sealed record ignores it."""
        if not self.sealed:
            for name, value in tensors.items():
                setattr(self, name, value.detach() if isinstance(value, torch.Tensor) else value)

    @property
    def value_norm(self) -> torch.Tensor:
        """L2 norm of the visual tokens' value vectors, all heads together: float32 (B, M, k)."""
        # One kernel, accumulating in float32 at least.
        dtype = torch.promote_types(self.value.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.value, dim=(1, 3), dtype=dtype).float()
        if self.sum_over_devices is not None:
            norms = self.sum_over_devices(norms.square()).sqrt()
        if self.value_columns is None:
            return norms[:, None, 1:]
        columns = self.value_columns.to(norms.device)
        return norms.gather(1, columns.flatten(1)).view_as(columns)

    @property
    def flat_patch_keys(self) -> torch.Tensor:
        """The patches' keys in a layer of the tower, all heads side by side: (B, k, H dh)."""
        return self.key[:, :, 1:].transpose(1, 2).flatten(2)

    def seal(self) -> None:
        """Release the tensors and accept no more."""
        self.query = self.key = self.value = None  # type: ignore[assignment]
        self.value_columns = self.visible = self.columns = self.averaged_map = None
        self.sealed = True


@dataclass
class DecoderAttentionRecord:
    """Queries and keys of one decoder layer during a prompt.

    Attributes
    ----------
    past : int
        Entries of the cache before the prompt.
    past_valid : bool Tensor (B, past) or None
        Which of them are tokens of their row. None: all.
    valid : bool Tensor (B, n) or None
        Which columns of the sequence are tokens. None: all.
    weights : Tensor (B, n) or None
        How much each column counts as a key of others, where tokens are weighted and not dropped. None: fully.
    differentiable : bool
        Whether scores have a gradient by queries, keys and weights.
    query : Tensor (B, H, n, dh)
    key : Tensor (B, H_kv, past + n, dh)
    scale : float
        Factor of their products, 1 / sqrt(dh).
    sealed : bool
        As in `AttentionRecord`.
    """

    past: int
    past_valid: torch.Tensor | None
    valid: torch.Tensor | None
    weights: torch.Tensor | None = field(default=None, repr=False)
    differentiable: bool = False
    query: torch.Tensor = field(init=False, repr=False)
    key: torch.Tensor = field(init=False, repr=False)
    scale: float = field(init=False)
    sealed: bool = field(init=False, default=False)

    count = 0
    """Pseudo-CLS tokens of a row: none."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pseudo_cls: Any, new_value: Any, scale: float
    ) -> None:
        """Record the layer's queries and keys; the signature is that of `PseudoCLSAttention.attend`."""
        if self.sealed:
            return
        self.query, self.key, self.scale = query, key[:, :, : self.past + query.shape[2]], scale
        if not self.differentiable:
            self.query, self.key = self.query.detach(), self.key.detach()

    def seal(self) -> None:
        """Release the tensors and accept no more."""
        self.query = self.key = None  # type: ignore[assignment]
        self.sealed = True

    def attention(self, first: int, weights: torch.Tensor) -> torch.Tensor:
        """Sum the rows of the head-averaged map from column `first` on, weighted.

        Parameters
        ----------
        first : int
        weights : float32 Tensor (B, M, n - first)
            How much each of those columns counts, for each image.

        Returns
        -------
        float32 Tensor (B, M, n)
            What each column of the sequence receives.
        """
        total = weights.new_zeros(*weights.shape[:2], self.key.shape[2])
        for attention in self._maps(first):
            total += (weights[:, None] @ attention).sum(1)
        return total[..., self.past :] / self.query.shape[1]

    def attention_map(self, first: int) -> torch.Tensor:
        """Average the map over heads, from column `first` on: float32 Tensor (B, n - first, n)."""
        total = torch.zeros((), device=self.query.device)
        for attention in self._maps(first):
            total = total + attention.sum(1)
        return total[..., self.past :] / self.query.shape[1]

    def _maps(self, first: int) -> Iterator[torch.Tensor]:
        """Yield maps of some heads at a time, from column `first` on: float32 (B, some heads, n - first, past + n)."""
        visible, shift = self._visible(first), self._log_weights(first)
        for logits in map_heads(self.query[:, :, first:], self.key, self.scale):
            logits = logits if shift is None else logits + shift
            yield logits.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).nan_to_num(0)

    def _log_weights(self, first: int) -> torch.Tensor | None:
        """Return what weighting adds to logits from column `first` on: (B, 1, Q, n), 0 for a token's own key."""
        if self.weights is None:
            return None
        weights = (self.weights if self.differentiable else self.weights.detach()).to(self.query.device)
        itself = torch.eye(weights.shape[1], dtype=torch.bool, device=weights.device)[first:]
        # The logarithm of 0 has no gradient that is a number.
        gone = weights == 0
        logs = weights.masked_fill(gone, 1.0).log().masked_fill(gone, float("-inf"))
        return logs[:, None, None].masked_fill(itself, 0.0)

    def _visible(self, first: int) -> torch.Tensor:
        """Mark the keys that queries from column `first` on attend to: bool (B or 1, 1, Q, past + n)."""
        keys = torch.arange(self.key.shape[2], device=self.query.device)
        queries = self.past + torch.arange(first, self.query.shape[2], device=self.query.device)
        visible = (keys <= queries[:, None])[None]
        if self.past_valid is not None or self.valid is not None:
            rows = self.query.shape[0]
            valid = torch.ones(rows, self.key.shape[2], dtype=torch.bool, device=self.query.device)
            if self.past_valid is not None:
                valid[:, : self.past] = self.past_valid
            if self.valid is not None:
                valid[:, self.past :] = self.valid
            visible = visible & valid[:, None]
        return visible[:, None]


def reference_row(record: AttentionRecord) -> torch.Tensor:
    """Return the reference token's row of a layer's attention map, over the tracked tokens: float32 (B, M, 1 + k)."""
    visible = None if record.visible is None else record.visible[:, :, :1]
    row = averaged_attention(record.query[:, :, :, :1], record.key, record.scale, visible)[:, :, 0]
    return record.over_all_heads(_on_tracked(row, record.columns))


def roll_down(row: torch.Tensor, record: AttentionRecord, *, residual: bool) -> torch.Tensor:
    """Multiply the rolled-out row with the map of the next lower layer (Eq. 3).

    Parameters
    ----------
    row : float32 Tensor (B, M, 1 + k)
        The reference token's row of the product of all layers above.
    record : AttentionRecord
        The lower layer, with the queries of all tracked tokens.
    residual : bool
        Whether to add the identity for the residual connection and halve, so that rows keep summing to one (Eq. 3
        leaves out this re-normalisation). The first layer of a group enters without.

    Returns
    -------
    float32 Tensor (B, M, 1 + k)
        The columns of tracked tokens are all that is needed: under a causal mask, weight that flows to tokens before
        the image never comes back to its patches.
    """
    if record.averaged_map is not None:
        product = row @ record.averaged_map
    else:
        product = weighted_attention(row, record.query, record.key, record.scale, record.visible)
        product = record.over_all_heads(_on_tracked(product, record.columns))
    return torch.lerp(product, row, 0.5) if residual else product


def _on_tracked(row: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    return row if columns is None else row.gather(2, columns)


def rollout(records: list[AttentionRecord]) -> torch.Tensor:
    """Return the reference token's row of a group's rolled-out attention (Eq. 3).

    Parameters
    ----------
    records : list of AttentionRecord
        The group's layers, lowest first.

    Returns
    -------
    float32 Tensor (B, M, 1 + k)
    """
    row = reference_row(records[-1])
    if len(records) > 1:
        row = row / 2
        row[..., 0].add_(0.5)  # the reference token's own share, through the residual connection
    for depth in range(len(records) - 2, -1, -1):
        row = roll_down(row.to(records[depth].key.device), records[depth], residual=depth > 0)
    return row


def aggregate(records: list[AttentionRecord], how: str) -> torch.Tensor:
    """Combine a group's maps into one row: by rollout, or by an alternative of Tables 4 and 5.

    Parameters
    ----------
    records : list of AttentionRecord
        The group's layers, lowest first.
    how : {"rollout", "mean", "max", "multiply", "last"}

    Returns
    -------
    float32 Tensor (B, M, 1 + k)
    """
    if how == "rollout":
        return rollout(records)
    if how == "last":
        return reference_row(records[-1])
    device = records[-1].key.device
    rows = torch.stack([reference_row(record).to(device) for record in records])
    if how == "mean":
        return rows.mean(0)
    if how == "max":
        return rows.amax(0)
    # A product of many small numbers underflows; in logarithms it does not, and Eq. 4 normalises the scale away.
    logs = rows.clamp_min(torch.finfo(rows.dtype).tiny).log().sum(0)
    return (logs - logs.amax(-1, keepdim=True)).exp()


def importance(row: torch.Tensor, value_norm: torch.Tensor) -> torch.Tensor:
    """Score visual tokens by the attention they receive times the norm of their value vector, normalised (Eq. 4).

    Parameters
    ----------
    row : float32 Tensor (..., 1 + k)
        The reference token's row; its own entry, at index 0, is left out.
    value_norm : Tensor (..., k)

    Returns
    -------
    float32 Tensor (..., k)
        Sums to one over each image.
    """
    weighted = row[..., 1:] * value_norm.float().to(row.device)
    return weighted / weighted.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def accumulate(row: torch.Tensor, layers: int, total: int, before: torch.Tensor | None) -> torch.Tensor:
    """Add a group's row to those of the groups before it: R_g = R_{g-1} + |g| (k_g / N) r_g, over the k_g tokens left.

    A group counts as often as it has layers. Its row sums to one over fewer tokens than those of earlier groups, for
    which k_g / N makes up.

    Parameters
    ----------
    row : float32 Tensor (..., 1 + k)
        r_g, the reference token's row; its own entry, at index 0, is left out.
    layers : int
        |g|.
    total : int
        N, the patches of a whole image.
    before : float32 Tensor (..., k) or None
        R_{g-1} of the tokens that are left. None: this is the first group.

    Returns
    -------
    float32 Tensor (..., k)
    """
    own = row[..., 1:] * (layers * (row.shape[-1] - 1) / total)
    return own if before is None else before.to(own.device) + own


def covered(scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return which share of an image's importance its first tokens hold, for tokens in an order.

    Parameters
    ----------
    scores : Tensor (..., k)
        0 or more.
    order : int64 Tensor (..., k')

    Returns
    -------
    float64 Tensor (..., k')
        Ascending, at most 1; 1 where all scores are 0.
    """
    scores = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
    total = scores.sum(-1, keepdim=True)
    return torch.where(total > 0, scores.gather(-1, order).cumsum(-1) / total, 1.0).clamp_max(1.0)


def keep_most_important(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the indices of the `keep` highest scores, ascending, so that patches stay in their spatial order.

    Parameters
    ----------
    scores : Tensor (..., k)
        Of equal scores the earlier token stays.
    keep : int

    Returns
    -------
    int64 Tensor (..., keep)
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values


def own_importance(records: list[AttentionRecord], aggregation: str) -> torch.Tensor:
    """Score the visual tokens of a group by its own attention (Eq. 4): float32 (B, M, k)."""
    return importance(aggregate(records, aggregation), records[-1].value_norm)


@torch.no_grad()
def decide(records: list[AttentionRecord], aggregation: str, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the visual tokens of a group and choose the most important ones, for a pruner of one's own.

    Returns
    -------
    importance : float32 Tensor (B, M, k)
    kept : int64 Tensor (B, M, keep)
        Indices into the k visual tokens, ascending.
    """
    scores = own_importance(records, aggregation)
    return scores, keep_most_important(scores, keep)


@dataclass
class GroupScores:
    """One group's decision for all images, kept for a trace.

    Attributes
    ----------
    stage : {"tower", "features", "prompt", "decoder", "ahead"}
    group : Group
    candidates : int64 Tensor (..., k)
        Patches, on the original grid, that the group could keep.
    importance : float32 Tensor (..., k) or None
        None if the method ranks nothing.
    kept : int64 Tensor (..., group.keep)
        Patches that stay, -1 for none.
    mixture : float32 Tensor (..., group.keep, k or k + 1) or None
        What they become; see `Choice.mixture`. None: they stay as they are.
    """

    stage: str
    group: Group
    candidates: torch.Tensor
    importance: torch.Tensor | None
    kept: torch.Tensor
    mixture: torch.Tensor | None = None
