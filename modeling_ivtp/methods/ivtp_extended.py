"""IVTP beyond its paper: importance accumulates over the groups of the tower, and the choice is diverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..model.diversity import SHARPNESS, choose_diverse
from ..model.pruner import Choice, FeatureStep, IVTPPruner, Needs, Pruner
from ..model.rollout import accumulate, reference_row
from ..model.schedule import PruningPlan
from .ivtp import IVTP, IVTPV
from .method import Method

EXTENSION: Mapping[str, str] = {"importance": "accumulated", "choice": "diverse"}
"""The pruning options in which it differs from the published method."""


@dataclass(frozen=True)
class IVTPExtended(IVTP):
    """IVTP with accumulated importance and a diverse choice in both stages; the schedule and its FLOPs are IVTP's own.

    Parameters
    ----------
    options : dict, optional
        As in `IVTP`; `{"sharpness": 1.0}` weighs importance more, `{"choice": "top"}` leaves diversity out.
    """

    name: ClassVar[str] = "ivtp-extended"

    def pruner(self, config: Any) -> IVTPPruner:
        """Make the pruner for a final number of `keep` tokens."""
        return IVTP(self.keep, extended(self.options), positions=self.positions).pruner(config)


@dataclass(frozen=True)
class IVTPExtendedFlat(IVTPV):
    """The first stage of `IVTPExtended` alone: the tower goes to the budget, and the decoder keeps what it gets."""

    name: ClassVar[str] = "ivtp-extended-flat"

    def pruner(self, config: Any) -> IVTPPruner:
        """Make the pruner without layers of the decoder."""
        return IVTPV(self.keep, extended(self.options), positions=self.positions).pruner(config)


@dataclass(frozen=True)
class IVTPExtendedLate(Method):
    """One diverse choice on the features, by all that CLS attends to on the way there.

    The score of a patch is the sum of its attention from CLS over all layers up to the features, each averaged over
    heads: accumulated importance with groups of one layer that drop nothing. The directions are the keys of the layer
    that makes the features.

    Parameters
    ----------
    sharpness : float, default 0.25
        The exponent of the score; 0 is diversity alone.
    """

    sharpness: float = SHARPNESS

    name: ClassVar[str] = "ivtp-extended-late"
    stages: ClassVar[tuple[str, ...]] = ("features",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weight("sharpness")

    def bind(self, config: Any) -> Pruner:
        """Return the pruner that has every layer up to the features recorded.

        Raises
        ------
        ValueError
            If the features are the tower's embeddings, below all layers.
        """
        if config.feature_depth == 0:
            raise ValueError(
                f"{self.name} reads the layers below the features, and vision_feature_layer="
                f"{config.vision_feature_layer} has none."
            )
        return _Late(self, config.feature_depth)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, before the projector."""
        return PruningPlan(patches, features=self.keep)


@dataclass(frozen=True)
class _Late(Pruner):
    """`IVTPExtendedLate` for a tower whose features are the output of its first `depth` layers."""

    method: IVTPExtendedLate
    depth: int

    @property
    def needs(self) -> Needs:
        """The records of all layers below the features."""
        return replace(self.method.needs, recorded_layers=tuple(range(self.depth)))

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan one choice, before the projector."""
        return self.method.plan(config, patches)

    def in_features(self, step: FeatureStep) -> Choice:
        """Keep patches that matter to CLS and differ in the keys of the top layer."""
        scores: torch.Tensor | None = None
        for layer in range(self.depth):
            scores = accumulate(reference_row(step.records[layer])[:, 0], 1, step.features.shape[1], scores)
        assert scores is not None
        keys = step.records[self.depth - 1].flat_patch_keys
        return Choice(choose_diverse(scores, keys, step.keep, self.method.sharpness), scores=scores)


def extended(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return pruning options of the extended method, changed by `options`."""
    sharpness = {"sharpness": None} if options.get("choice") == "top" else {}
    return {**EXTENSION, **sharpness, **options}
