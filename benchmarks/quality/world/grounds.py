"""Grounds behind the objects: textures and photographs.

A ground is a *field*, a height of 0 … 255 for every pixel, seen through a *ramp* of a few matching colours; or a
photograph, blurred and tinted. Everything is computed in integers.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.sprites import photographs

Field = np.ndarray

# Sets of muted colours that go together; the tiles are the only saturated areas of a scene.
THEMES = (
    ((222, 205, 170), (196, 172, 132), (164, 138, 100), (236, 224, 198)),  # sand
    ((92, 124, 140), (130, 164, 172), (62, 92, 112), (168, 196, 198)),  # sea
    ((98, 122, 88), (132, 152, 110), (70, 92, 70), (164, 176, 134)),  # moss
    ((148, 148, 146), (116, 118, 122), (178, 176, 170), (88, 90, 96)),  # stone
    ((112, 94, 118), (150, 124, 142), (82, 72, 98), (186, 158, 166)),  # heather
    ((168, 122, 98), (196, 152, 122), (136, 96, 80), (216, 182, 154)),  # clay
    ((226, 226, 220), (206, 208, 206), (238, 234, 222), (190, 196, 200)),  # paper
    ((66, 74, 92), (48, 54, 72), (92, 100, 118), (120, 122, 134)),  # night
    ((182, 196, 206), (152, 174, 192), (206, 214, 218), (128, 150, 172)),  # mist
    ((142, 112, 82), (112, 86, 64), (172, 140, 104), (92, 72, 58)),  # wood
    ((204, 176, 170), (178, 146, 146), (222, 202, 192), (154, 124, 130)),  # blush
    ((120, 136, 124), (152, 162, 146), (182, 186, 168), (94, 112, 106)),  # sage
    ((134, 150, 112), (168, 166, 118), (104, 130, 116), (196, 188, 146)),  # meadow
    ((104, 116, 136), (172, 150, 142), (134, 128, 142), (204, 178, 158)),  # dusk
)
DIRECTIONS = ((64, 0), (62, 17), (55, 32), (45, 45), (32, 55), (17, 62), (0, 64))


def ground(draws: Draws, side: int) -> np.ndarray:
    """Draw a ground, (side, side, 3) uint8."""
    if draws.chance(1, 6):
        picture = _photograph(draws, side)
    else:
        field = draws.pick(FIELDS)(draws, side)
        if draws.chance(3, 4):
            field = _grained(field, draws)
        picture = np.take(_ramp(draws), field, axis=0)
    return picture


def smooth(grid: np.ndarray, side: int, eased: bool = False) -> np.ndarray:
    """Enlarge a small uint8 grid, (height, width[, channels]), to `side` by `side` by interpolation.

    Parameters
    ----------
    grid : uint8 array
    side : int
        The new height and width.
    eased : bool
        Ease in and out between values, which hides the lattice of random values.
    """
    rows, down = _between(grid.shape[0], side, eased)
    columns, across = _between(grid.shape[1], side, eased)
    channels = grid.shape[2:]
    # Two dimensions only: NumPy is slow where the last one is short.
    across = across.repeat(channels[0]) if channels else across
    left = grid[:, columns].reshape(len(grid), -1).astype(np.uint16)
    right = grid[:, columns + 1].reshape(len(grid), -1)
    wide = (left * (256 - across) + right * across) >> 8
    down = down[:, None]
    high = np.take(wide, rows, axis=0)
    high *= 256 - down
    high += np.take(wide, rows + 1, axis=0) * down
    high >>= 8
    return high.astype(np.uint8).reshape(side, side, *channels)


@lru_cache(maxsize=512)
def _between(values: int, side: int, eased: bool) -> tuple[np.ndarray, np.ndarray]:
    position = np.arange(side) * ((values - 1) * 256 - 1) // (side - 1)
    share = position % 256
    if eased:
        share = share * share * (768 - 2 * share) >> 16
    return position // 256, share.astype(np.uint16)


@lru_cache(maxsize=16)
def _axes(side: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(side, dtype=np.int32)[:, None], np.arange(side, dtype=np.int32)[None, :]


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """Return fine noise, int16, from which every grained field takes a piece."""
    raw = Draws(2, 336).bytes(4, 512, 512).astype(np.int16)
    return raw.sum(axis=0, dtype=np.int16) // 4 - 127


def _ramp(draws: Draws) -> np.ndarray:
    """Draw colours for the heights 0 to 255, (256, 3) uint8."""
    theme = draws.sample(draws.pick(THEMES), draws.between(2, 4))
    shift = draws.between(-16, 16)
    stops = np.array([[min(255, max(0, v + shift + draws.between(-12, 12))) for v in c] for c in theme], np.uint8)
    return smooth(stops[None].repeat(2, axis=0), 256)[0]


def _grained(field: Field, draws: Draws) -> Field:
    side = field.shape[0]
    top, left = draws.below(512 - side), draws.below(512 - side)
    piece = _grain()[top : top + side, left : left + side] >> draws.between(0, 2)
    return np.clip(field + piece, 0, 255).astype(np.uint8)


def _noise(draws: Draws, side: int) -> Field:
    cells = draws.between(3, 7)
    total = smooth(draws.bytes(cells, cells), side, eased=True).astype(np.uint16) * 4
    total += smooth(draws.bytes(3 * cells, 3 * cells), side, eased=True).astype(np.uint16) * 2
    total += smooth(draws.bytes(9 * cells, 9 * cells), side)
    return (total // 7).astype(np.uint8)


def _stretched(heights: np.ndarray) -> Field:
    low, high = int(heights.min()), int(heights.max())
    return ((heights - low) * 255 // max(1, high - low)).astype(np.uint8)


def _slope(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    along, over = draws.pick(DIRECTIONS)
    return _stretched(x * along * draws.pick((-1, 1)) + y * over)


def _glow(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    return _stretched((x - draws.below(side)) ** 2 + (y - draws.below(side)) ** 2)


def _wave(draws: Draws, phase: np.ndarray, period: int) -> Field:
    """Draw bands along a phase in sixteenths of a pixel: sharp, soft or like a saw."""
    level = (phase % (16 * period)) * 510 // (16 * period)
    style = draws.below(3)
    if style == 0:
        return (level // 256 * 200).astype(np.uint8)
    return (np.minimum(level, 510 - level) if style == 1 else level // 2).astype(np.uint8)


def _stripes(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    along, over = draws.pick(DIRECTIONS)
    phase = x * along * draws.pick((-1, 1)) + y * over >> 2
    if draws.chance(1, 2):
        cells = draws.between(2, 5)
        phase = phase + smooth(draws.bytes(cells, cells), side, eased=True).astype(np.int32) * draws.between(1, 4)
    return _wave(draws, phase, draws.between(10, 60))


def _plaid(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    period = draws.between(16, 60)
    return (_wave(draws, x * 16, period) >> 1) + (_wave(draws, y * 16, period) >> 1)


def _checks(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    size = draws.between(10, 44)
    board = ((x // size + y // size) % 2 * 160).astype(np.uint8)
    return board + (_noise(draws, side) >> 2)


def _spots(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    period = draws.between(14, 48)
    x = x + y // period % 2 * (period // 2)
    distance = (x % period - period // 2) ** 2 + (y % period - period // 2) ** 2
    return ((distance * 16 < period * period * draws.between(1, 3)) * np.uint8(200)).astype(np.uint8)


def _bricks(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    height = draws.between(14, 32)
    width = height * 2
    row = y // height
    x = x + row % 2 * height
    mortar = (y % height < 2) | (x % width < 2)
    bricks = draws.bytes(32, 32)[row % 32, x // width % 32] // 2 + 100
    return np.where(mortar, 10, bricks).astype(np.uint8)


def _blobs(draws: Draws, side: int) -> Field:
    y, x = _axes(side // 4)
    total = np.zeros((side // 4, side // 4), np.int32)
    for _ in range(draws.between(5, 12)):
        reach = draws.between(8, 30) ** 2
        distance = (x - draws.below(side // 4)) ** 2 + (y - draws.below(side // 4)) ** 2
        total += np.maximum(reach - distance, 0) * 200 // reach
    return smooth(np.minimum(total, 255).astype(np.uint8), side)


def _camouflage(draws: Draws, side: int) -> Field:
    levels = draws.between(3, 5)
    cells = draws.between(4, 9)
    heights = smooth(draws.bytes(cells, cells), side, eased=True).astype(np.uint16)
    return (heights * levels // 256 * (255 // (levels - 1))).astype(np.uint8)


def _rings(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    squared = (x - draws.between(-side // 2, side)) ** 2 + (y - draws.between(-side // 2, side)) ** 2
    distance = np.sqrt((squared * 256).astype(np.float64)).astype(np.int32)  # IEEE: exact everywhere
    cells = draws.between(2, 4)
    distance += smooth(draws.bytes(cells, cells), side, eased=True).astype(np.int32) * draws.between(0, 4)
    return _wave(draws, distance, draws.between(10, 44))


def _weave(draws: Draws, side: int) -> Field:
    y, x = _axes(side)
    period = draws.between(4, 12)
    over = (x // period + y // period) % 2
    shade = np.where(over == 1, x % period, y % period) * 160 // period
    return (shade + (_slope(draws, side) >> 2)).astype(np.uint8)


def _photographed(draws: Draws, side: int) -> Field:
    return _crop(draws, side)[..., 1]


FIELDS: tuple[Callable[[Draws, int], Field], ...] = (
    _noise, _noise, _slope, _glow, _stripes, _stripes, _plaid, _checks, _spots, _bricks, _blobs, _camouflage, _rings,
    _weave, _photographed,
)  # fmt: skip


def _crop(draws: Draws, side: int) -> np.ndarray:
    """Cut a piece out of a photograph, perhaps mirrored, and enlarge it, which blurs it: (side, side, 3) uint8."""
    photograph = draws.pick(list(_pyramid()[draws.below(3)]))
    size = draws.between(24 + photograph.shape[0] // 8, photograph.shape[0])
    top, left = draws.below(photograph.shape[0] - size + 1), draws.below(photograph.shape[1] - size + 1)
    piece = photograph[top : top + size, left : left + size]
    return smooth(piece[:, :: draws.pick((1, -1))], side)


@lru_cache(maxsize=1)
def _pyramid() -> tuple[np.ndarray, ...]:
    """Return the photographs at full, half and quarter size: enlarged again, they are sharp, soft and blurred."""
    levels = [photographs()]
    for _ in range(2):
        number, height, width, _channels = levels[-1].shape
        blocks = levels[-1].reshape(number, height // 2, 2, width // 2, 2, 3)
        levels.append((blocks.sum(axis=(2, 4), dtype=np.uint16) // 4).astype(np.uint8))
    return tuple(levels)


def _photograph(draws: Draws, side: int) -> np.ndarray:
    """Draw a piece of a photograph, its colours shifted towards one muted colour."""
    tint = np.array(draws.pick(draws.pick(THEMES)), np.uint16)
    share = draws.between(40, 150)
    return (_crop(draws, side).astype(np.uint16) * (256 - share) + tint * share >> 8).astype(np.uint8)
