"""Clutter: small shapes, lines and dots that are no objects."""

from functools import lru_cache

import numpy as np

from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.grounds import DIRECTIONS, THEMES
from benchmarks.quality.world.sprites import RGB

Shape = tuple[np.ndarray, np.ndarray, int, int]

_VIVID = RGB.tolist()


def clutter(picture: np.ndarray, draws: Draws) -> None:
    """Draw small shapes, lines and dots on a ground, in place; a larger ground gets more."""
    side = picture.shape[0]
    shapes = _shapes()
    places, colours, lengths = [], [], []
    for _ in range(draws.between(8, 36) * side * side // 336**2):
        rows, columns, height, width = draws.pick(draws.pick(shapes))
        places.append((rows + draws.below(side - height)) * side + columns + draws.below(side - width))
        vivid = draws.pick(_VIVID) if draws.chance(1, 3) else draws.pick(draws.pick(THEMES))
        colours.append([min(255, max(0, value + draws.between(-25, 25))) for value in vivid])
        lengths.append(len(rows))
    if places:
        picture.reshape(-1, 3)[np.concatenate(places)] = np.repeat(np.array(colours, np.uint8), lengths, axis=0)


@lru_cache(maxsize=1)
def _shapes() -> tuple[tuple[Shape, ...], ...]:
    """Return discs, rings, crosses, triangles, diamonds and lines: rows and columns of pixels, height and width."""
    families: list[list[np.ndarray]] = [[] for _ in range(6)]
    for size in range(3, 18, 2):
        y, x = np.arange(size)[:, None] - size // 2, np.arange(size)[None, :] - size // 2
        squared, radius = x * x + y * y, size // 2
        families[0].append(squared <= radius * radius + 1)
        if size > 5:
            families[1].append((squared <= radius * radius + 1) & (squared > (radius - 2) ** 2 + 1))
            families[2].append(np.minimum(abs(x), abs(y)) <= size // 9)
            families[3].append((2 * abs(x) <= y + radius) & (abs(y) <= radius))
            families[4].append(abs(abs(x) + abs(y) - radius) <= 1)
    for length in (10, 16, 24, 36):
        for along, over in DIRECTIONS:
            for turn in (1, -1):
                steps = np.arange(length * 2)
                rows, columns = steps * over // 128, steps * along // 128 * turn
                mask = np.zeros((length + 2, length + 2), bool)
                for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    mask[rows + down, columns - int(columns.min()) + right] = True
                families[5].append(mask)
    return tuple(tuple((*np.nonzero(mask), *mask.shape) for mask in family) for family in families)
