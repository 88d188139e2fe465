"""Methods that IVTP's Table 7 extends from the vision tower to the decoder, marked with a plus there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .method import Method


@dataclass(frozen=True)
class TwoStage(Method):
    """The options of such methods: the hand-over between the stages, and the layers of the second one.

    Parameters
    ----------
    tower_tokens : int, optional
        Tokens that the tower hands over; default: 1.875 times `keep`, as in IVTP.
    decoder_layers : int, optional
        Layers of the decoder that take part; default: those of the model's own pruning, 12 for LLaVA-1.5.
    """

    tower_tokens: int | None = None
    decoder_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("tower_tokens", self.keep or 1, optional=True)
        self.check_whole("decoder_layers", 1, optional=True)

    def handed_over(self, patches: int) -> int:
        """Return the number of tokens between the stages.

        Raises
        ------
        ValueError
            If `tower_tokens` is below the final number.
        """
        self.check_whole("tower_tokens", self.keep, optional=True)
        return min(patches, self.tower_tokens or round(1.875 * self.keep))

    def depth(self, config: Any) -> int:
        """Return the number of decoder layers that take part.

        Raises
        ------
        ValueError
            If the model has fewer.
        """
        layers = config.text_config.num_hidden_layers
        if self.decoder_layers is None:
            return min(layers, config.pruning.decoder_layers or layers)
        if self.decoder_layers > layers:
            raise ValueError(f"{self.name}: decoder_layers={self.decoder_layers}; the decoder has {layers} layers.")
        return self.decoder_layers
