"""IVTP itself, and its first stage alone (IVTP-V), as systems beside the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ivtp_policy import IVTPPolicy
from ..pruning_policy import Policy
from .method import Method


@dataclass(frozen=True)
class IVTP(Method):
    """The two stages of IVTP with a model's own options, at another budget.

    Parameters
    ----------
    options : dict, optional
        Any fields of `IVTPPruningConfig` on top of the model's.
    """

    options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "ivtp"
    stages: ClassVar[tuple[str, ...]] = ("tower", "decoder")

    def bind(self, config: Any) -> Policy:
        """IVTP as the model's options say."""
        fixed = {"enabled": True, "visual_tokens": self.keep, "tower_tokens": None, "positions": self.positions}
        return IVTPPolicy(config.pruning.changed(**fixed | self.options))


@dataclass(frozen=True)
class IVTPV(IVTP):
    """The first stage of IVTP alone: the vision tower goes to the budget by itself."""

    name: ClassVar[str] = "ivtp-v"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def bind(self, config: Any) -> Policy:
        """IVTP without layers of the decoder."""
        fixed = {"decoder_layers": 0, "guidance": "visual_cls"}
        return IVTP(self.keep, {**self.options, **fixed}, positions=self.positions).bind(config)
