"""CLIP's features of instructions (IVTP Eq. 5), kept for when the same words come again."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from .replayable import computes_from_weights


class InstructionCache:
    """The last windows of instructions with their features.

    A window is kept by its tokens alone, so rows and prompts that say the same share it. Everything is forgotten when
    the text tower's weights change; layers of other libraries, whose output may change without their weights, are
    never answered for. What PyTorch does not count as a change, writing through `.data`, needs a `clear()`.

    Parameters
    ----------
    limit : int, default 128
        Windows that are kept at most, the last used ones; one takes C x P values, 77 x 768 for CLIP-L. 0 keeps none.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._made_by: Hashable = None

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept = {}

    def features(
        self,
        tower: nn.Module,
        ids: torch.Tensor,
        windows: Sequence[tuple[int, ...]],
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Features of windows, computed for those that are not known.

        Parameters
        ----------
        tower : Module
            What `encode` runs.
        ids : int64 Tensor (n, C)
        windows : sequence of tuple of int
            The same on the host, without padding.
        encode : callable
            From ids (m, c) to features (m, c, P).

        Returns
        -------
        Tensor (n, C, P)
            Zeros at padding.
        """
        made_by = _state_of(tower) if self.limit else None
        if made_by is None:
            self.clear()  # adapters may be merged into the weights by the time they are gone
            return _padded(encode(ids[:, : max(map(len, windows))]), ids.shape[1])
        if made_by != self._made_by:
            self.clear()
            self._made_by = made_by
        # Features are padded to the width of their context, and computed in the type that autocast says.
        kind = ids.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        keys = [(window, ids.shape[1], ids.device, computed) for window in windows]
        kept = {key: self._kept.get(key) for key in keys}
        missing = [key for key, known in kept.items() if known is None]
        if missing:
            rows = torch.stack([ids[keys.index(key)] for key in missing])
            made = _padded(encode(rows[:, : max(len(window) for window, *_ in missing)]), ids.shape[1])
            # Clones: a view would keep the features of all its neighbours alive.
            kept |= dict(zip(missing, [one.clone() for one in made], strict=True))
        for key, known in kept.items():
            self._kept.pop(key, None)
            self._kept[key] = known  # type: ignore[assignment]
        for old in list(self._kept)[: max(0, len(self._kept) - self.limit)]:
            self._kept.pop(old, None)
        return torch.stack([kept[key] for key in keys])  # type: ignore[misc]


def _padded(features: torch.Tensor, context: int) -> torch.Tensor:
    return nn.functional.pad(features, (0, 0, 0, context - features.shape[1]))


def _state_of(tower: Any) -> Hashable:
    """What tells one state of a tower from another; None where nothing does."""
    parameters = list(tower.parameters())
    # Changes to inference tensors are not counted.
    if not computes_from_weights(tower) or any(parameter.is_inference() for parameter in parameters):
        return None
    return tuple((parameter.data_ptr(), parameter.dtype, parameter._version) for parameter in parameters)
