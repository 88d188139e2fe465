"""Spatial pooling (IVTP Table 1): the grid of features, averaged cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..model.pruner import Choice, FeatureStep
from ..model.schedule import PruningPlan
from .method import Method


@dataclass(frozen=True)
class SpatialPooling(Method):
    """Averages the tower's features over `keep` equal cells of the grid.

    The grid of cells is the squarest that has `keep` cells; cells divide the grid of patches as adaptive average
    pooling does. A cell's token takes the place of the patch in the middle of the cell.
    """

    name: ClassVar[str] = "spatial_pooling"
    stages: ClassVar[tuple[str, ...]] = ("features",)

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan one choice, after the tower."""
        if patches != config.num_patches:
            raise ValueError(f"{self.name} needs the whole grid of patches, and some are dropped before it already.")
        cells(self.keep, *config.grid)
        return PruningPlan(patches, features=self.keep)

    def in_features(self, step: FeatureStep) -> Choice:
        """Average each cell; the mixture is the same for all images."""
        rows, columns = step.grid
        if step.patches.shape[1] != rows * columns:
            raise ValueError(
                f"{self.name} needs the whole grid of {rows} x {columns} patches; {step.patches.shape[1]} came."
            )
        vertical, horizontal = cells(step.keep, rows, columns)
        device = step.patches.device
        tall = pooling(rows, vertical, device)
        wide = pooling(columns, horizontal, device)
        mixture = torch.einsum("ar,bc->abrc", tall, wide).reshape(step.keep, rows * columns)
        middle = torch.tensor(middles(rows, vertical), device=device)[:, None] * columns
        middle = (middle + torch.tensor(middles(columns, horizontal), device=device)).flatten()
        order = middle.argsort()
        images = step.patches.shape[0]
        return Choice(middle[order].expand(images, -1), mixture=mixture[order].expand(images, -1, -1))


def cells(number: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the squarest grid of so many cells that fits: (rows of cells, columns of cells).

    Raises
    ------
    ValueError
        If no grid fits.
    """
    fits = [
        (tall, number // tall)
        for tall in range(1, number + 1)
        if number % tall == 0 and tall <= rows and number // tall <= columns
    ]
    if not fits:
        near = [
            n
            for n in range(1, rows * columns)
            if any(n % t == 0 and t <= rows and n // t <= columns for t in range(1, n + 1))
        ]
        closest = sorted(sorted(near, key=lambda n: abs(n - number))[:3])
        raise ValueError(
            f"spatial_pooling: keep={number} is no grid within {rows} x {columns} patches; nearest: "
            f"{', '.join(map(str, closest))}."
        )
    return min(fits, key=lambda sides: (abs(sides[0] - sides[1]), sides[0]))


def bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """Return first and last-plus-one of each part, as adaptive average pooling cuts them."""
    return [(part * size // parts, -(-(part + 1) * size // parts)) for part in range(parts)]


def middles(size: int, parts: int) -> list[int]:
    """Return the middle of each part."""
    return [(first + end - 1) // 2 for first, end in bounds(size, parts)]


def pooling(size: int, parts: int, device: torch.device) -> torch.Tensor:
    """Return the matrix that averages over each part: float32 (parts, size)."""
    matrix = torch.zeros(parts, size, device=device)
    for part, (first, end) in enumerate(bounds(size, parts)):
        matrix[part, first:end] = 1 / (end - first)
    return matrix
