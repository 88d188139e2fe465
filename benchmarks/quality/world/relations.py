"""Unambiguous relations of objects: left of, right of, above, below and next to.

They are computed in integers: squared distances and slopes.
"""

import numpy as np

from benchmarks.quality.world.scenes import Scene

_FAR = 1 << 40
_NEXT_TO = 40
"""Largest gap in pixels between two tiles that stand next to each other."""


def neighbours(scene: Scene) -> dict[str, list[tuple[int, int]]]:
    """Return for every relation the pairs (object, its neighbour), by their numbers in the scene.

    *Left of* an object is the nearest one whose middle lies within a slope of 3:5 of the horizontal, provided that
    every other object to that side, within a slope of 6:5, is at least 1.3 times as far; likewise for the other three.
    *Next to* an object is the one with the smallest gap between the tiles, at most 40 pixels, provided that it is the
    nearest by the middles too and every other gap is more than half as large again, and 10 pixels.
    """
    x = np.array([thing.x for thing in scene.objects])
    y = np.array([thing.y for thing in scene.objects])
    right, down = x[None, :] - x[:, None], y[None, :] - y[:, None]
    distance = right**2 + down**2
    directions = {"left_of": (-right, down), "right_of": (right, down), "above": (-down, right), "below": (down, right)}
    found = {name: _ahead(distance, forward, abs(aside)) for name, (forward, aside) in directions.items()}
    found["next_to"] = _beside(scene, distance, abs(right), abs(down))
    return found


def _ahead(distance: np.ndarray, forward: np.ndarray, aside: np.ndarray) -> list[tuple[int, int]]:
    rivals = np.where((forward > 0) & (5 * aside <= 6 * forward), distance, _FAR)
    nearest = rivals.argmin(axis=1)
    rows = np.arange(len(rivals))
    first = rivals[rows, nearest]
    rivals[rows, nearest] = _FAR
    clear = (first < _FAR) & (5 * aside[rows, nearest] <= 3 * forward[rows, nearest])
    clear &= 100 * rivals.min(axis=1) >= 169 * first
    return [(int(i), int(nearest[i])) for i in np.flatnonzero(clear)]


def _beside(scene: Scene, distance: np.ndarray, across: np.ndarray, down: np.ndarray) -> list[tuple[int, int]]:
    half = np.array([thing.box[2] - thing.x for thing in scene.objects])
    reach = half[:, None] + half[None, :]
    gap = np.sqrt(np.maximum(across - reach, 0) ** 2 + np.maximum(down - reach, 0) ** 2).astype(np.int64)
    rows = np.arange(len(gap))
    gap[rows, rows] = _FAR
    nearest = gap.argmin(axis=1)
    first = gap[rows, nearest]
    gap[rows, nearest] = _FAR
    apart = distance.copy()
    apart[rows, rows] = _FAR
    clear = (first <= _NEXT_TO) & (2 * gap.min(axis=1) >= 3 * first + 20) & (apart.argmin(axis=1) == nearest)
    return [(int(i), int(nearest[i])) for i in np.flatnonzero(clear)]
