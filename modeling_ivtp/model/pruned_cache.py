"""A KV cache whose layers differ in length, because later layers never saw the tokens that were dropped.

transformers counts positions with `get_seq_length()` and sizes masks with `get_mask_sizes()`. A pruned layer answers
the first *logically*, as if nothing had been dropped, and the second *physically*, with the entries it stores and their
offset from the logical count. So generation, masks and RoPE positions go on as for an unpruned cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .cache_index import CacheIndex, join_masks
from .visual_sequence import VisualSequence

_EMPTY = CacheIndex()
"""The index of all layers that were reset: they share it as they share one after a prompt."""


class PrunedDynamicLayer(DynamicLayer):
    """`DynamicLayer` that stores fewer entries than the sequence has tokens."""

    is_pruned = True

    def __init__(self, cache_index: CacheIndex | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache_index = cache_index or CacheIndex()

    @property
    def entries(self) -> int:
        """Number of stored entries."""
        return super().get_seq_length()

    def leave_out(self, tokens: int) -> None:
        """Do nothing: a dynamic layer allocates as it grows. A static one makes less room."""

    def get_seq_length(self) -> int:
        """Return the logical length, which the sequence would have without pruning."""
        return self.entries + self.cache_index.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of entries with the new ones, and their offset from the logical count."""
        return self.entries + query_length, self.cache_index.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as far as `CacheIndex.cropped` allows."""
        if tokens_to_remove > 0:  # earlier versions of transformers pass the length to keep
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if self.is_initialized and tokens_to_remove:
            self.cache_index = self.cache_index.cropped(self.entries - abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Remove everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cache_index = _EMPTY

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self.cache_index = self.cache_index.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.cache_index = self.cache_index.repeat_rows(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows."""
        super().batch_select_indices(indices)
        self.cache_index = self.cache_index.select_rows(indices)


class PrunedStaticLayer(StaticLayer):
    """`StaticLayer` sized for the entries that are kept instead of for all tokens.

    An empty one treats a prompt as a dynamic layer does: the new tokens attend to themselves alone. So attention keeps
    its causal kernels, and the layer's length is known without a look at the device.

    Parameters
    ----------
    max_cache_len : int
        Entries that it can hold.
    logical_len : int
        Tokens for which the stock layer was made that it replaces; `reset` goes back to that size.
    """

    is_pruned = True
    is_initialized: bool
    max_cache_len: int
    empty: bool = True
    """Tell whether nothing is stored yet."""
    _spare: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self, max_cache_len: int, logical_len: int, cache_index: CacheIndex | None = None, **kwargs: Any
    ) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.logical_len = logical_len
        self.cache_index = cache_index or CacheIndex()

    @property
    def entries(self) -> int:
        """Number of stored entries. Reads a tensor unless the layer is empty: only a first prompt compiles."""
        return 0 if self.empty else int(self.cumulative_length)

    def leave_out(self, tokens: int) -> None:
        """Make room for `tokens` fewer, as long as nothing is allocated."""
        if not self.is_initialized:
            self.max_cache_len -= tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values and return those to attend to: all entries, or in an empty layer the new ones alone."""
        stored = super().update(key_states, value_states, *args, **kwargs)
        if not self.empty:
            return stored
        self.empty = False
        return key_states, value_states

    def get_seq_length(self) -> Any:
        """Return the logical length, which the sequence would have without pruning."""
        return self.cache_index.dropped + (0 if self.empty else super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of entries to attend to, and their offset from the logical count."""
        return query_length if self.empty else self.max_cache_len, self.cache_index.dropped

    def get_max_length(self) -> int:
        """Return the number of tokens, counted logically, for which there is room."""
        return self.max_cache_len + self.cache_index.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as far as `CacheIndex.cropped` allows."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}; allowed: a number of tokens, negated.")
        if self.is_initialized and tokens_to_remove:
            self.cache_index = self.cache_index.cropped(self.entries + tokens_to_remove)
            self.cumulative_length.add_(tokens_to_remove)  # in place: compiled code knows its address

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate, or reuse the tensors from before a `reset` if they fit: compiled code knows their addresses."""
        spare, self._spare = self._spare, None
        entries: int = self.max_cache_len
        fits = spare is not None and all(
            old.shape == (*new.shape[:2], entries, new.shape[3]) and (old.dtype, old.device) == (new.dtype, new.device)
            for old, new in zip(spare, (key_states, value_states), strict=True)
        )
        if not fits:
            del spare
            super().lazy_initialization(key_states, value_states)
            return
        self.keys, self.values = spare  # type: ignore[misc]
        self.keys.zero_()
        self.values.zero_()  # an infinite value would count, even where nothing attends to it
        self.is_initialized = True

    def reset(self) -> None:
        """Remove everything and take the stock size again: the next prompt may drop less."""
        if self.is_initialized:
            self.cumulative_length.zero_()
            self._spare = self.keys, self.values
        self.keys = self.values = None
        self.is_initialized, self.empty = False, True
        self.max_cache_len = self.logical_len
        self.cache_index = _EMPTY

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self.cache_index = self.cache_index.select_rows(beam_idx)


PrunedLayer = PrunedDynamicLayer | PrunedStaticLayer


def _holds_nothing(layer: Any) -> bool:
    return not layer.is_initialized or getattr(layer, "empty", False)


def is_pruned(cache: Cache | None) -> bool:
    """Return whether a cache holds a prompt whose layers may differ in length.

    The last layer tells: a token that was dropped below never reaches it.
    """
    if cache is None or not getattr(cache, "layers", ()):
        return False
    last: Any = cache.layers[-1]
    return getattr(last, "is_pruned", False) and not _holds_nothing(last)


def prepare_layers(cache: Cache, num_layers: int, past_mask: torch.Tensor | None, length: int) -> None:
    """Replace the layers of a cache by pruned ones that hold the same entries, so that their lengths may differ.

    Parameters
    ----------
    cache : Cache
        Dynamic or static, empty or not; changed in place.
    num_layers : int
        Layers of the decoder; a `DynamicCache()` made without config grows lazily and is filled up to it.
    past_mask : bool Tensor (B, past) or None
        The 2D attention mask of the tokens that are in the cache already.
    length : int
        Tokens that are to come, counted logically.

    Raises
    ------
    ValueError
        For a kind of cache whose layers cannot differ in length, or a static one that is too short.
    """
    if not isinstance(getattr(cache, "layers", None), list):
        raise ValueError(_unsupported(type(cache).__name__))
    while len(cache.layers) < num_layers:
        layer_class = cache.layer_class_to_replicate
        if layer_class is not DynamicLayer:
            raise ValueError(_unsupported(getattr(layer_class, "__name__", type(cache).__name__)))
        cache.layers.append(DynamicLayer())
    # Sliding layers hold their window; full ones decide how long the sequence may be, for all of them.
    capacity = max(getattr(layer, "logical_len", getattr(layer, "max_cache_len", 0)) for layer in cache.layers)
    needed = int(cache.get_seq_length()) + length
    if any(isinstance(layer, StaticLayer) for layer in cache.layers) and capacity < needed:
        raise ValueError(f"The static cache has room for {capacity} tokens; the prompt needs {needed}: max_cache_len.")
    empty = filled = CacheIndex()
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_pruned", False):
            if _holds_nothing(layer):
                layer.cache_index = empty
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer):
            raise ValueError(_unsupported(type(layer).__name__))
        past = int(layer.get_seq_length())
        if past and filled.stored != past:
            filled = CacheIndex(stored=past, croppable=past, key_mask=past_mask)
        cache.layers[index] = _as_pruned(layer, filled if past else empty, capacity)


def _as_pruned(layer: CacheLayerMixin, cache_index: CacheIndex, capacity: int) -> PrunedLayer:
    """Make a pruned layer of a stock one, with its entries."""
    pruned: PrunedLayer
    carried = ["keys", "values", "device"]
    carried += ["dtype"] if hasattr(layer, "dtype") else []  # until transformers 5.23
    if isinstance(layer, StaticLayer):
        if layer.is_initialized:
            capacity = layer.max_cache_len
        pruned = PrunedStaticLayer(capacity, capacity, cache_index)
        carried += ["batch_size", "num_heads", "k_head_dim", "v_head_dim"]
        pruned.cumulative_length = layer.cumulative_length
        pruned.empty = not layer.is_initialized or int(layer.cumulative_length) == 0
    else:
        pruned = PrunedDynamicLayer(cache_index)
    if layer.is_initialized:
        for name in carried:
            setattr(pruned, name, getattr(layer, name))
        pruned.is_initialized = True
    return pruned


def _unsupported(name: str) -> str:
    return (
        f"Pruning needs cache layers that may differ in length, and {name} cannot. Use a DynamicCache or StaticCache "
        '(cache_implementation="dynamic", "static" or "offloaded"), or switch pruning off: '
        "model.set_pruning(enabled=False)."
    )


def reading(cache: Cache) -> Cache:
    """Return a dynamic cache with the entries of another one; what is written to it leaves that one alone.

    Parameters
    ----------
    cache : Cache
        From `prepare_layers`.
    """
    copy = DynamicCache()
    for layer in cache.layers:
        held: Any = layer
        other: Any = PrunedDynamicLayer(held.cache_index)
        if not _holds_nothing(held):
            # A dynamic layer joins old and new entries in new tensors.
            other.keys, other.values = held.keys[:, :, : held.entries], held.values[:, :, : held.entries]
            other.dtype, other.device, other.is_initialized = held.keys.dtype, held.keys.device, True
        copy.layers.append(other)
    return copy


def key_value_shape(config: Any) -> tuple[int, int]:
    """Return the number of heads of keys and values, and their width, from a decoder's configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


def allocate(
    cache: Cache, entries: Sequence[int], *, length: int, heads: int, head_dim: int, like: torch.Tensor
) -> None:
    """Allocate an empty static cache ahead of a prompt, each layer with the size that it will need.

    A graph that is compiled or captured needs its addresses before it runs.

    Parameters
    ----------
    cache : Cache
        From `prepare_layers`; dynamic layers are left alone.
    entries : sequence of int
        What each layer will store of the prompt.
    length : int
        Tokens of the prompt, counted logically.
    heads, head_dim : int
        Of keys and values.
    like : Tensor (B, ...)
        For its rows, dtype and device.
    """
    for layer, left in zip(cache.layers, entries, strict=True):
        if isinstance(layer, PrunedStaticLayer) and not layer.is_initialized:
            layer.leave_out(length - left)
            shape = like.new_empty(like.shape[0], heads, 0, head_dim)
            layer.lazy_initialization(shape, shape)


def release(cache: Cache | None) -> None:
    """Undo `allocate` after a prompt that failed, since the next one may need another size."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, PrunedStaticLayer) and layer.is_initialized and layer.empty:
            layer.reset()


def fill(
    cache: Cache,
    stored: Sequence[tuple[torch.Tensor, torch.Tensor]],
    cache_indices: Sequence[tuple[int, int, torch.Tensor | None, torch.Tensor | None]],
    numbers: Sequence[int],
    croppable: int,
    extra: int = 0,
) -> None:
    """Put a prompt that ran elsewhere into an empty dynamic cache.

    Parameters
    ----------
    cache : Cache
        From `prepare_layers`; changed in place.
    stored : sequence of (Tensor, Tensor)
        Keys and values of each layer, (B, H_kv, entries, dh).
    cache_indices : sequence of (int, int, Tensor or None, Tensor or None)
        `stored`, `dropped`, `key_mask` and `position_shift` of the layers' different cache indices.
    numbers : sequence of int
        Which of `cache_indices` each layer has.
    croppable : int
        See `CacheIndex`.
    extra : int, default 0
        Entries at the end that are left out.
    """
    shared = [
        CacheIndex(entries - extra, dropped, croppable, None if mask is None else mask[:, : entries - extra], shift)
        for entries, dropped, mask, shift in cache_indices
    ]
    for layer, (keys, values), number in zip(cache.layers, stored, numbers, strict=True):
        filled: Any = layer
        entries = keys.shape[2] - extra
        filled.keys, filled.values, filled.cache_index = keys[:, :, :entries], values[:, :, :entries], shared[number]
        filled.device, filled.dtype, filled.is_initialized = keys.device, keys.dtype, True


def padding_mask(layer: PrunedLayer, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Make a pruned layer's padding mask for a pass that drops nothing, in the form `create_causal_mask` takes.

    Works on shapes alone, so that a decoding step with a static cache compiles.

    Parameters
    ----------
    layer : PrunedDynamicLayer or PrunedStaticLayer
    attention_mask : Tensor (B, logical length) or None
        The 2D mask of the whole sequence, new tokens included.
    new : int
        New tokens.

    Returns
    -------
    bool Tensor (B, logical length) or None
        None: nothing is masked.
    """
    cache_index = layer.cache_index
    stored = cache_index.stored if cache_index.key_mask is None else cache_index.key_mask
    later: torch.Tensor | int
    if attention_mask is not None:
        later = attention_mask[:, cache_index.stored + cache_index.dropped :].bool()
    elif cache_index.key_mask is None:
        return None
    elif isinstance(layer, StaticLayer):
        # Entries that are not filled yet lie in the future of every query: the causal pattern hides them.
        later = layer.max_cache_len - cache_index.stored
    else:
        later = layer.entries - cache_index.stored + new
    return join_masks(cache_index.dropped, stored, later)


def layer_segments(cache: Cache, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
    """Find runs of cache layers that share a cache index, and with it a mask: (first, last) layer, both inside.

    Only the layers from `first` to `last` are looked at, by default all of them.
    """
    segments: list[tuple[int, int]] = []
    for index in range(first, len(cache.layers) if last is None else last + 1):
        if segments and cache.layers[index].cache_index is cache.layers[index - 1].cache_index:
            segments[-1] = (segments[-1][0], index)
        else:
            segments.append((index, index))
    return segments


@dataclass
class CacheSpan:
    """Consecutive decoder layers that share a cache index, during one pass that drops tokens.

    Without a cache it is any consecutive layers.

    Attributes
    ----------
    first, last : int
        Both inside.
    layers : list of PrunedDynamicLayer or PrunedStaticLayer
        Empty without a cache.
    entries : int
        Entries that each of them stores before the pass.
    past_valid : bool Tensor (B, entries) or None
        Which entries are tokens of their row. None: all.
    """

    first: int
    last: int
    layers: list[Any] = field(default_factory=list)
    entries: int = 0
    past_valid: torch.Tensor | None = None

    @property
    def cache_index(self) -> CacheIndex:
        """The index that the layers share."""
        return self.layers[0].cache_index if self.layers else CacheIndex()

    def begin(self, sequence: VisualSequence) -> torch.Tensor | None:
        """Make room for a sequence and return its padding mask in the form that `create_causal_mask` takes.

        Returns
        -------
        bool Tensor (B, cache_index.dropped + entries + n) or None
            Columns count logically, so the first `cache_index.dropped` ones are never read. None: nothing is masked.
        """
        if not self.layers:
            return sequence.valid
        for layer in self.layers:
            layer.leave_out(sequence.length - sequence.size)
        past = self.entries if self.past_valid is None else self.past_valid
        new = sequence.size if sequence.valid is None else sequence.valid
        return join_masks(self.cache_index.dropped, past, new)

    def end(self, sequence: VisualSequence, renumbered: torch.Tensor | None) -> None:
        """Describe what the layers hold after the pass; `renumbered` (B, 1) is how far positions went down."""
        if self.layers:
            extended = self.cache_index.extended(self.entries, self.past_valid, sequence, renumbered)
            for layer in self.layers:
                layer.cache_index = extended


def cache_spans(cache: Cache | None, first: int, last: int, attention_mask: torch.Tensor | None) -> Iterator[CacheSpan]:
    """Yield layers `first` to `last`, cut where the cache index changes: earlier turns may have been pruned otherwise.

    Parameters
    ----------
    cache : Cache or None
        With layers from `prepare_layers`.
    first, last : int
        Both inside.
    attention_mask : Tensor (B, logical length) or None
        The 2D mask of the whole sequence.
    """
    if cache is None:
        if first <= last:
            yield CacheSpan(first, last)
        return
    for start, end in layer_segments(cache, first, last):
        layers: list[Any] = cache.layers[start : end + 1]
        entries = layers[0].entries
        valid = layers[0].cache_index.valid_entries(entries, attention_mask)
        yield CacheSpan(start, end, layers, entries, valid)
