"""Systems that IVTP's Table 7 extends from the vision tower to the decoder, marked with a plus there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .method import Method


@dataclass(frozen=True)
class TwoStage(Method):
    """What such systems share: the hand-over between the stages, and how far the second one goes.

    Parameters
    ----------
    tower_tokens : int, optional
        What the tower hands over; default: 1.875 times `keep`, as IVTP does.
    decoder_layers : int, optional
        Layers of the decoder that take part; default: as many as the model's own pruning, 12 of LLaVA-1.5.
    """

    tower_tokens: int | None = None
    decoder_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("tower_tokens", self.keep, optional=True)
        self.check_whole("decoder_layers", 1, optional=True)

    def handed_over(self, patches: int) -> int:
        """Tokens between the stages."""
        return min(patches, self.tower_tokens or round(1.875 * self.keep))

    def depth(self, config: Any) -> int:
        """How many layers of the decoder take part.

        Raises
        ------
        ValueError
            If the model has fewer.
        """
        there = config.text_config.num_hidden_layers
        if self.decoder_layers is None:
            return min(there, config.pruning.decoder_layers or there)
        if self.decoder_layers > there:
            raise ValueError(f"{self.name}: decoder_layers={self.decoder_layers}; the decoder has {there} layers.")
        return self.decoder_layers
