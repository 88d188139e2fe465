"""Scenes: objects on coloured tiles, their layout, how they are drawn, and the labels of every patch."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from benchmarks.quality.world.clutter import clutter
from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.grounds import ground
from benchmarks.quality.world.splits import check_split, pair_is_held_out, scene_seed
from benchmarks.quality.world.sprites import COLOURS, PAD, kinds, stamp, tile

PATCH = 14
SIDE = 336
GRID = SIDE // PATCH
"""Patches on a side of a whole scene."""
SIDES = tuple(range(168, SIDE + 1, PATCH))
GREY = (128, 128, 128)
"""The colour of a blank picture."""
MARGIN = 4
"""The least distance of two tiles, in pixels."""
MOST_ALIKE = 5
"""The most objects of one kind in a scene."""

_USUAL, _LARGE = tuple(range(28, 51, 2)), (54, 58, 64)
SIZES = _USUAL + _LARGE
"""Sides of drawings in pixels."""
_PACKED, _CELL = (44, 46, 48, 50), 56
"""Sides of drawings in a crowded scene, and of the cells they stand in."""
_LAYOUT, _PIXELS, _CROWD = 0, 1, 2


class Object(NamedTuple):
    """A drawing on its tile; `x` and `y` are the tile's middle, `size` is the drawing's side, all in pixels."""

    kind: int
    colour: int
    x: int
    y: int
    size: int
    mirrored: bool

    @property
    def name(self) -> str:
        """The name of the kind, one word."""
        return kinds()[self.kind].name

    @property
    def colour_name(self) -> str:
        """The name of the tile's colour, one word."""
        return COLOURS[self.colour]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tile's edges: left, top, right, bottom; the last two are just outside."""
        half = self.size // 2 + PAD
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A scene; its pixels and patch labels are computed at the first use and then kept."""

    split: str
    index: int
    side: int
    seed: int
    objects: tuple[Object, ...]

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.side // PATCH

    @cached_property
    def pixels(self) -> np.ndarray:
        """The picture: (side, side, 3) uint8."""
        draws = Draws(self.seed, self.side, _PIXELS)
        picture = ground(draws, self.side)
        clutter(picture, draws)
        for thing in self.objects:
            _put(picture, thing, gain=draws.between(115, 140))
        return picture

    @cached_property
    def coverage(self) -> np.ndarray:
        """The number of each patch's 196 pixels that each tile covers: (objects, grid, grid) int64."""
        boxes = np.array([thing.box for thing in self.objects])
        edges = np.arange(self.grid) * PATCH
        across = np.minimum(boxes[:, 2:3], edges + PATCH) - np.maximum(boxes[:, 0:1], edges)
        down = np.minimum(boxes[:, 3:4], edges + PATCH) - np.maximum(boxes[:, 1:2], edges)
        return np.maximum(down, 0)[:, :, None] * np.maximum(across, 0)[:, None, :]

    def patch_objects(self, least: float = 0.5) -> np.ndarray:
        """Return the number of the object that covers at least this share of a patch, else -1: (grid, grid) int64."""
        largest = self.coverage.argmax(axis=0)
        covered = self.coverage.max(axis=0) >= least * PATCH * PATCH
        return np.where(covered, largest, -1)

    def patch_kinds(self, least: float = 0.5) -> np.ndarray:
        """Return the kind on every patch, -1 where there is none: (grid, grid) int64."""
        return np.append([thing.kind for thing in self.objects], -1)[self.patch_objects(least)]

    def patch_colours(self, least: float = 0.5) -> np.ndarray:
        """Return the tile's colour on every patch, -1 where there is none: (grid, grid) int64."""
        return np.append([thing.colour for thing in self.objects], -1)[self.patch_objects(least)]

    def counts(self) -> dict[int, int]:
        """Count the objects of each kind in the scene."""
        found: dict[int, int] = {}
        for thing in self.objects:
            found[thing.kind] = found.get(thing.kind, 0) + 1
        return found


def object_range(side: int) -> tuple[int, int]:
    """Return the fewest and most objects of scenes of a side: 6 to 12 at 336 pixels, 2 to 4 at 168."""
    area = side * side
    return max(2, 6 * area // SIDE**2), max(4, 12 * area // SIDE**2)


def draw_scene(split: str, index: int, side: int = SIDE, *, crowded: bool = False) -> Scene:
    """Draw the scene of a split with an index, the same everywhere and always.

    Parameters
    ----------
    split : {"train", "validation", "test"}
    index : int
        From 0 to 999,999,999. Scenes of different splits never share a seed.
    side : int
        Height and width in pixels, a multiple of 14 from 168 to 336. Smaller scenes hold fewer objects, of the same
        sizes. A scene of another side is another scene.
    crowded : bool
        Draw more objects, up to as many as fit: they may cover the ground completely. Only training asks about such
        scenes.

    Raises
    ------
    ValueError
        For an unknown split, an index outside of it, or a side that is not allowed.
    FileNotFoundError
        If the sprite sheet is missing.
    """
    check_split(split)
    if side not in SIDES:
        raise ValueError(f"side={side!r} is not allowed; choose a multiple of {PATCH}: {', '.join(map(str, SIDES))}.")
    seed = scene_seed(split, index)
    draws = Draws(seed, side, _CROWD if crowded else _LAYOUT)
    cells = (side // _CELL) ** 2
    which = _cast(draws, *((cells // 3, cells) if crowded else object_range(side)))
    layout = _packed if crowded else _layout
    objects = []
    for kind, (size, x, y) in zip(which, layout(draws, side, len(which)), strict=True):
        allowed = [c for c in range(len(COLOURS)) if split == "test" or not pair_is_held_out(kind, c)]
        objects.append(Object(kind, draws.pick(allowed), x, y, size, draws.chance(1, 2)))
    return Scene(split, index, side, seed, tuple(objects))


def _cast(draws: Draws, fewest: int, most: int) -> list[int]:
    """Draw the kinds of `fewest` to `most` objects.

    In half of the scenes all kinds differ. In the other half two kinds occur in numbers that add up to six (fewer on
    small canvases), the first number drawn evenly: one and five, two and four, and so on. So every number is equally
    likely for a question about either kind, and only the question says which of the two is meant.
    """
    if draws.chance(1, 2):
        return draws.sample(range(len(kinds())), draws.between(fewest, most))
    number = draws.between(max(fewest, min(8, most)), most)
    crowd = min(MOST_ALIKE + 1, number)
    one = draws.between(1, crowd - 1)
    first, second, *rest = draws.sample(range(len(kinds())), 2 + number - crowd)
    return draws.shuffled([first] * one + [second] * (crowd - one) + rest)


def _layout(draws: Draws, side: int, number: int) -> list[tuple[int, int, int]]:
    """Draw sizes and places of tiles that keep their distance, in random order."""
    while True:
        sizes = sorted((draws.pick(_LARGE if draws.chance(1, 12) else _USUAL) for _ in range(number)), reverse=True)
        placed: list[tuple[int, int, int]] = []
        for size in sizes:
            half = size // 2 + PAD
            for _ in range(40):
                x, y = draws.between(half + 2, side - half - 2), draws.between(half + 2, side - half - 2)
                if all(max(abs(x - u), abs(y - v)) >= half + s // 2 + PAD + MARGIN for s, u, v in placed):
                    placed.append((size, x, y))
                    break
        if len(placed) == number:
            return draws.shuffled(placed)


def _packed(draws: Draws, side: int, number: int) -> list[tuple[int, int, int]]:
    """Draw sizes and places of tiles in adjacent cells."""
    starts = range((side % _CELL + _CELL) // 2, side, _CELL)
    cells = draws.sample([(x, y) for x in starts for y in starts], number)
    return [(draws.pick(_PACKED), x, y) for x, y in cells]


def _put(picture: np.ndarray, thing: Object, gain: int) -> None:
    """Draw an object on the picture, darker or lighter by the factor `gain` / 128."""
    left, top, right, bottom = thing.box
    pixels, shown = tile(thing.size, thing.colour)
    added, kept = stamp(thing.kind, thing.size)
    if thing.mirrored:
        added, kept = added[:, ::-1], kept[:, ::-1]
    # 255 * 140 < 2**16: sixteen bits are enough, and fast.
    painted = np.minimum(((pixels * kept >> 8) + added) * np.uint16(gain) >> 7, 255)
    beneath = picture[top:bottom, left:right]
    beneath[...] = painted * shown + beneath * (256 - shown) >> 8
