"""Random sampling (IVTP Table 1): the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, FeatureStep
from ..model.schedule import PruningPlan
from .method import Method


@dataclass(frozen=True)
class Random(Method):
    """Keeps patches of the finished features at random.

    The draw depends on an image's own pixels and the seed, so an image keeps the same patches in any batch.

    Parameters
    ----------
    seed : int, default 0
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    stages: ClassVar[tuple[str, ...]] = ("features",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("seed", 0)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, after the tower."""
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Draw for each image."""
        patches = step.patches.shape[1]
        kept = []
        for pixels in step.pixel_values:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + fingerprint(pixels)) % 2**63)
            kept.append(torch.randperm(patches, generator=generator)[: step.keep].sort().values)
        return Choice(torch.stack(kept).to(step.patches.device))


def fingerprint(pixels: torch.Tensor) -> int:
    """Compute a number from an image's pixels that differs between images."""
    bits = pixels.detach().float().cpu().contiguous().view(torch.int32).flatten().long()
    factors = torch.arange(1, len(bits) + 1) * 2_654_435_761 % 2**31
    return int((bits * factors % 2**31).sum())
