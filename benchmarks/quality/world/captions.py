"""Captions of scenes for CLIP: the objects, sometimes with their colours and places, in at most 60 of CLIP's tokens."""

from collections.abc import Callable

from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.questions import NUMBERS
from benchmarks.quality.world.scenes import Object, Scene
from benchmarks.quality.world.sprites import article, kinds

MOST_TOKENS = 60

_CAPTIONS = 3
_OPENINGS = (
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "a photo with ",
    "a scene with ",
    "here we see ",
    "many things: ",
)
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def caption(scene: Scene, variant: int = 0) -> str:
    """Write a caption of a scene.

    Parameters
    ----------
    scene : Scene
    variant : int
        Another number gives another style, choice and order.
    """
    draws = Draws(scene.seed, scene.side, _CAPTIONS, variant)
    style = draws.pick((_inventory, _inventory, _inventory, _coloured, _placed, _tiles))
    return draws.pick(_OPENINGS) + _listed(style(scene, draws))


def _inventory(scene: Scene, draws: Draws) -> list[str]:
    """List everything in the scene: `a dog`, `two pizzas`."""
    counts = draws.shuffled(list(scene.counts().items()))
    return [_with_article(kind) if n == 1 else f"{NUMBERS[n - 1]} {kinds()[kind].plural}" for kind, n in counts]


def _coloured(scene: Scene, draws: Draws) -> list[str]:
    """List up to six objects with their colours: `a dog on a red tile`."""
    return [f"{_with_article(t.kind)} on {_tile(t)}" for t in draws.sample(scene.objects, 6)]


def _placed(scene: Scene, draws: Draws) -> list[str]:
    """List up to three objects with colours and places, or five with places: `a dog on a red tile at the top left`."""
    colours = draws.chance(1, 2)
    things = draws.sample(scene.objects, 3 if colours else 5)
    return [f"{_with_article(t.kind)}{' on ' + _tile(t) if colours else ''} {_place(scene, t)}" for t in things]


def _tiles(scene: Scene, draws: Draws) -> list[str]:
    """List up to six tiles with their objects: `a red tile with a dog`."""
    return [f"{_tile(t)} with {_with_article(t.kind)}" for t in draws.sample(scene.objects, 6)]


_Style = Callable[[Scene, Draws], list[str]]


def _with_article(kind: int) -> str:
    name = kinds()[kind].name
    return f"{article(name)} {name}"


def _tile(thing: Object) -> str:
    return f"{article(thing.colour_name)} {thing.colour_name} tile"


def _place(scene: Scene, thing: Object) -> str:
    row, column = _ROWS[thing.y * 3 // scene.side], _COLUMNS[thing.x * 3 // scene.side]
    return f"at the {row} {column}".strip().replace("  ", " ") if row or column else "in the middle"


def _listed(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
