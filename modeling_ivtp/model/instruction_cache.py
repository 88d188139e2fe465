"""CLIP's features of instructions (IVTP Eq. 5), kept for when the same words come again."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from .replayable import computes_from_weights


class InstructionCache:
    """The features of the last windows of instructions.

    A window is found by its tokens alone, so rows and prompts with the same words share it. All features are dropped
    when the text tower's weights change. A tower with layers of other libraries is never cached, because their output
    may change without their weights. PyTorch does not count writes through `.data`: call `clear()` after them.

    Parameters
    ----------
    limit : int, default 128
        Most windows that are kept, the last used ones. One takes C x P values, 77 x 768 for CLIP-L. 0 keeps none.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self._features: dict[Hashable, torch.Tensor] = {}
        self._tower_state: Hashable = None

    def __len__(self) -> int:
        return len(self._features)

    def clear(self) -> None:
        """Drop all features."""
        self._features = {}

    def features(
        self,
        tower: nn.Module,
        ids: torch.Tensor,
        windows: Sequence[tuple[int, ...]],
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the features of windows, and compute those that are not known.

        Parameters
        ----------
        tower : Module
            The text tower that `encode` runs.
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
        state = _state_of(tower) if self.limit else None
        if state is None:
            self.clear()  # adapters may be merged into the weights before the tower can be cached again
            return _padded(encode(ids[:, : max(map(len, windows))]), ids.shape[1])
        if state != self._tower_state:
            self.clear()
            self._tower_state = state
        # Features are padded to the width of their context, and computed in the dtype that autocast sets.
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        keys = [(window, ids.shape[1], ids.device, dtype) for window in windows]
        found = {key: self._features.get(key) for key in keys}
        missing = [key for key, features in found.items() if features is None]
        if missing:
            rows = torch.stack([ids[keys.index(key)] for key in missing])
            computed = _padded(encode(rows[:, : max(len(window) for window, *_ in missing)]), ids.shape[1])
            # Clones: a view would keep the features of all its neighbours alive.
            found |= dict(zip(missing, [features.clone() for features in computed], strict=True))
        for key, features in found.items():
            self._features.pop(key, None)
            self._features[key] = features  # type: ignore[assignment]
        for old in list(self._features)[: max(0, len(self._features) - self.limit)]:
            self._features.pop(old, None)
        return torch.stack([found[key] for key in keys])  # type: ignore[misc]


def _padded(features: torch.Tensor, context: int) -> torch.Tensor:
    return nn.functional.pad(features, (0, 0, 0, context - features.shape[1]))


def _state_of(tower: Any) -> Hashable:
    """Describe a tower's weights so that any change shows; None if a change might not show."""
    parameters = list(tower.parameters())
    # PyTorch does not count changes of inference tensors.
    if not computes_from_weights(tower) or any(parameter.is_inference() for parameter in parameters):
        return None
    return tuple((parameter.data_ptr(), parameter.dtype, parameter._version) for parameter in parameters)
