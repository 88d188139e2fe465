"""The drawings: kinds, tile colours, and stamps of any size ready to be put on a canvas."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

WORLD = Path(__file__).parent
SHEET, INDEX, GROUNDS = "sprites.png", "sprites.json", "grounds.png"
SPRITE = 64

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
RGB = np.array(
    [
        (206, 32, 41),
        (245, 130, 20),
        (253, 218, 50),
        (38, 150, 70),
        (40, 95, 215),
        (120, 50, 165),
        (255, 158, 200),
        (38, 38, 44),
    ],
    dtype=np.int64,
)
PAD = 3
"""Pixels of the tile on each side of a drawing."""


@dataclass(frozen=True)
class Kind:
    """A thing that can be drawn: its name of one word, the plural, and the emoji's code point."""

    name: str
    plural: str
    codepoint: str


@lru_cache(maxsize=1)
def kinds() -> tuple[Kind, ...]:
    """Return all kinds, in the order of the sheet; a kind's place is its number.

    Raises
    ------
    FileNotFoundError
        If the index is missing.
    """
    return tuple(Kind(**row) for row in json.loads(_existing(INDEX).read_text()))


@lru_cache(maxsize=1)
def kind_numbers() -> dict[str, int]:
    """Return the number of every kind by its name."""
    return {kind.name: number for number, kind in enumerate(kinds())}


def article(name: str) -> str:
    """Return the article of a name: `a` or `an`."""
    return "an" if name[0] in "aeiou" else "a"


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Return 16 hexadecimal digits that identify this world: a hash of kinds, colours, drawings and grounds."""
    digest = hashlib.sha256(repr((COLOURS, RGB.tolist(), PAD)).encode())
    for file in (INDEX, SHEET, GROUNDS):
        digest.update(_existing(file).read_bytes())
    return digest.hexdigest()[:16]


@cache
def stamp(kind: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a drawing with the white rim of a sticker, on the canvas of its tile of `size + 2 * PAD` pixels.

    Returns
    -------
    added : (tile, tile, 3) uint16
        What the drawing adds to the picture.
    kept : (tile, tile, 3) uint16
        How much of the picture it leaves, of 256.
    """
    # Bicubic weights need no transcendental function: the same everywhere. RGBa is RGBA with the alpha multiplied in.
    drawing = _sheet()[kind].resize((size, size), Image.Resampling.BICUBIC)
    tile = Image.new("RGBa", (size + 2 * PAD, size + 2 * PAD))
    tile.paste(drawing, (PAD, PAD))
    painted = np.asarray(tile).astype(np.uint16)
    alpha = painted[..., 3:]
    rim = np.asarray(tile.getchannel("a").filter(ImageFilter.MaxFilter(3))).astype(np.uint16)[..., None]
    rim = (rim - alpha) * 4 // 5
    keep = 255 - alpha - rim
    added = painted[..., :3] + rim
    return np.minimum(added, 255 - keep), (keep + (keep >> 7)).repeat(3, axis=-1)


@cache
def tile(size: int, colour: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a rounded square of a colour with a darker edge.

    Returns
    -------
    pixels : (tile, tile, 3) uint16
    shown : (tile, tile, 3) uint16
        How much of each pixel shows, of 256.
    """
    side = size + 2 * PAD
    outer, inner = _rounded(side, 0), _rounded(side, 1)
    edge = RGB[colour] * 3 // 4
    pixels = (RGB[colour] * inner + edge * (256 - inner)) >> 8
    return pixels.astype(np.uint16), outer.astype(np.uint16).repeat(3, axis=-1)


def _rounded(side: int, inset: int) -> np.ndarray:
    """Return how much of each pixel a rounded square covers, (side, side, 1) of 256, from four by four samples."""
    samples = 8 * np.arange(0, side, dtype=np.int64)[:, None] + np.array([1, 3, 5, 7])
    radius, centre = (side // 5 - inset) * 8, 4 * side
    beyond = np.maximum(np.abs(samples.reshape(-1) - centre) - (centre - inset * 8 - radius), 0)
    inside = beyond[:, None] ** 2 + beyond[None, :] ** 2 <= radius * radius
    return inside.reshape(side, 4, side, 4).sum(axis=(1, 3), dtype=np.int64)[..., None] * 16


@lru_cache(maxsize=1)
def _sheet() -> list[Image.Image]:
    with Image.open(_existing(SHEET)) as image:
        sheet = image.convert("RGBA").convert("RGBa")
    columns = sheet.width // SPRITE
    corners = [(i % columns * SPRITE, i // columns * SPRITE) for i in range(len(kinds()))]
    return [sheet.crop((x, y, x + SPRITE, y + SPRITE)) for x, y in corners]


@lru_cache(maxsize=1)
def photographs() -> np.ndarray:
    """Return the photographs that serve as grounds: (photographs, height, width, 3) uint8."""
    with Image.open(_existing(GROUNDS)) as image:
        strip = np.asarray(image.convert("RGB"))
    side = strip.shape[0]
    return strip.reshape(side, -1, side, 3).swapaxes(0, 1).copy()


def _existing(file: str) -> Path:
    path = WORLD / file
    if not path.is_file():
        raise FileNotFoundError(
            f"The quality world needs {path}, which is missing; `python -m benchmarks.quality.build_sprites` writes it "
            f"beside {', '.join(name for name in (SHEET, INDEX, GROUNDS) if name != file)}."
        )
    return path
