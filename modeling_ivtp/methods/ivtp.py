"""IVTP itself, and its first stage alone (IVTP-V), as methods beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..model.pruner import IVTPPruner, Pruner
from ..model.schedule import PruningPlan
from .method import Method


@dataclass(frozen=True)
class IVTP(Method):
    """The two stages of IVTP with the model's own pruning options, at another budget.

    A coverage of the model stays in force, with `keep` as its ceiling.

    Parameters
    ----------
    options : dict, optional
        Fields of `IVTPPruningConfig` that replace the model's. A hand-over that the model fixes stays, unless it is
        below `keep`.
    """

    options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "ivtp"
    stages: ClassVar[tuple[str, ...]] = ("tower", "decoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        own = ("enabled", "visual_tokens", "positions")
        if not isinstance(self.options, Mapping) or set(own) & set(self.options):
            raise ValueError(
                f"{self.name}: options={self.options!r}; allowed: a dict of fields of IVTPPruningConfig other than "
                f"{', '.join(own)}."
            )

    def bind(self, config: Any) -> Pruner:
        """Return IVTP's pruner with the model's options."""
        return self.at(self.final_tokens(config, config.num_patches)).pruner(config)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan groups of layers; see `plan_pruning`."""
        plan = self.pruner(config).plan(config, patches)
        return PruningPlan(patches) if plan is None else plan

    def pruner(self, config: Any) -> IVTPPruner:
        """Make the pruner for a final number of `keep` tokens."""
        fixed = config.pruning.at_budget(self.keep) | {"positions": self.positions}
        return IVTPPruner(config.pruning.changed(**fixed | dict(self.options)))


@dataclass(frozen=True)
class IVTPV(IVTP):
    """The first stage of IVTP alone: the vision tower goes to the budget by itself."""

    name: ClassVar[str] = "ivtp-v"
    stages: ClassVar[tuple[str, ...]] = ("tower",)

    def pruner(self, config: Any) -> IVTPPruner:
        """Make the pruner without layers of the decoder."""
        # Without the second stage there is no hand-over, and no question that a coverage could follow.
        fixed = {"decoder_layers": 0, "guidance": "visual_cls", "tower_tokens": None}
        fixed |= {"coverage": None, "min_visual_tokens": None}
        return IVTP(self.keep, {**self.options, **fixed}, positions=self.positions).pruner(config)
