"""The wording of questions: many ways to ask the same, idle words around them, and the spans of content words.

In the patterns `<…>` marks words of a relation or property; `{x}` and `{y}` are names, `{ax}` is a name with its
article and `{xs}` a plural. Idle words are drawn independently of everything else, so they tell nothing.
"""

import re
from functools import cache, lru_cache
from typing import NamedTuple

from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.sprites import article, kinds

RELATIONS = ("left_of", "right_of", "above", "below", "next_to")

_SIDES = {"left_of": "left", "right_of": "right"}
_HEIGHTS = {"above": "above", "below": "below"}

PATTERNS: dict[str, tuple[str, ...]] = {
    "existence": (
        "Is there {ax} in the picture?",
        "Do you see {ax} here?",
        "Can you find {ax} anywhere?",
        "Does the picture show {ax}?",
        "Is {ax} among the things in this image?",
    ),
    "count": (
        "<How many> {xs} are there?",
        "<How many> {xs} do you see?",
        "<How many> {xs} does the picture show?",
        "What is the <number> of {xs} in the image?",
        "<Count> the {xs}.",
    ),
    "colour": (
        "Which <colour> is the tile <behind> the {x}?",
        "What <colour> is the tile of the {x}?",
        "On which <colour> does the {x} stand?",
        "What is the <colour> of the square <behind> the {x}?",
        "The {x} is on a tile of which <colour>?",
    ),
    "corner": (
        "In which <corner> is the {x}?",
        "Which <corner> of the picture holds the {x}?",
        "In which <quarter> of the picture do you see the {x}?",
        "The {x} is nearest to which <corner>?",
    ),
    "larger": (
        "Which is <larger>, the {x} or the {y}?",
        "What is <bigger>, the {x} or the {y}?",
        "Of the {x} and the {y}, which one is <larger>?",
        "Is the {x} or the {y} the <larger> one?",
    ),
    "next_to": (
        "What does the {x} stand <next to>?",
        "What stands <next to> the {x}?",
        "What is <closest> to the {x}?",
        "Which thing is the <nearest neighbour> of the {x}?",
    ),
}
for _relation, _word in _SIDES.items():
    PATTERNS[_relation] = (
        f"What is <{_word} of> the {{x}}?",
        f"What stands to the <{_word}> of the {{x}}?",
        f"Which thing is the nearest one <{_word} of> the {{x}}?",
        f"What comes next on the <{_word}> side of the {{x}}?",
    )
for _relation, _word in _HEIGHTS.items():
    PATTERNS[_relation] = (
        f"What is <{_word}> the {{x}}?",
        f"What stands <{_word}> the {{x}}?",
        f"Which thing is the nearest one <{_word}> the {{x}}?",
        f"What comes next <{_word}> the {{x}}?",
    )

_WHERE = {"left_of": "left of", "right_of": "right of", "above": "above", "below": "below", "next_to": "next to"}
NEIGHBOUR_PATTERNS: dict[str, tuple[str, ...]] = {
    relation: (
        f"Which <colour> is the tile of the thing <{where}> the {{x}}?",
        f"What <colour> is <behind> the thing <{where}> the {{x}}?",
        f"The thing <{where}> the {{x}} is on a tile of which <colour>?",
    )
    for relation, where in _WHERE.items()
}
"""Patterns of `colour_of_neighbour`, by the relation of the neighbour to the object named."""

TERSE_PATTERNS: dict[str, str] = {
    "existence": "{x}",
    "count": "<how many> {xs}",
    "colour": "<colour> {x}",
    "corner": "<corner> {x}",
    "larger": "<larger> {x} {y}",
} | {relation: f"<{where}> {{x}}" for relation, where in _WHERE.items()}
"""The fewest words for each type of question."""
TERSE_NEIGHBOUR_PATTERNS = {relation: f"<colour> <{where}> {{x}}" for relation, where in _WHERE.items()}

OPENINGS = (
    "",
    "",
    "",
    "Please tell me: ",
    "Tell me about this picture. ",
    "Look at the picture. ",
    "Look carefully at this image, please. ",
    "Take a good look and answer. ",
    "I have a question for you. ",
    "I would like to know this. ",
    "Hello! ",
    "Hi, a quick question: ",
    "Here is a picture with many small things. ",
    "You are given an image of a little world. ",
    "Be so kind and help me. ",
    "My friend sent me this photo and now I wonder: ",
    "Let us play a game. ",
    "This one is easy, I think. ",
    "Consider the scene in front of you. ",
    "There is a lot to see here. ",
    "Ignore the small dots and lines. ",
    "Now, ",
    "Tell me, if you can: ",
    "Answer with one word: ",
    "In a single word, please: ",
)
CLOSINGS = (
    "",
    "",
    "",
    "",
    " Answer with one word.",
    " Answer the question using a single word or phrase.",
    " Reply in a single word, please.",
    " One word is enough.",
    " Thank you!",
    " Thanks in advance.",
    " Please be brief.",
    " Take your time.",
    " I am curious.",
    " No need to explain.",
    " Just say it in a word.",
    " What do you think?",
)


class Span(NamedTuple):
    """The characters from `start` to before `stop` of a text, and their role: `object` or `relation`."""

    start: int
    stop: int
    role: str


def phrase(pattern: str, draws: Draws, x: int, y: int | None = None, idle: bool = True) -> tuple[str, tuple[Span, ...]]:
    """Fill in a pattern about one or two kinds, with idle words around it or without.

    Returns
    -------
    str
        The text.
    tuple of Span
        Its content words.
    """
    named = {"x": kinds()[x], "y": kinds()[x if y is None else y]}
    opening, closing = (draws.pick(OPENINGS), draws.pick(CLOSINGS)) if idle else ("", "")
    text, spans = opening, []
    for position, (role, piece) in enumerate(_pieces(pattern)):
        if role == "object":
            kind = named[piece.strip("as")]
            if piece.startswith("a"):
                text += article(kind.name) + " "
            piece = kind.plural if piece.endswith("s") else kind.name
        if position == 0 and opening.endswith((": ", ", ")):
            piece = piece[0].lower() + piece[1:]
        if role:
            spans.append(Span(len(text), len(text) + len(piece), role))
        text += piece
    return text + closing, tuple(spans)


@cache
def _pieces(pattern: str) -> tuple[tuple[str, str], ...]:
    """Cut a pattern into plain text, names (`object`) and marked words (`relation`)."""
    roles = {"{": "object", "<": "relation"}
    pieces = re.findall(r"<[^>]*>|\{[^}]*\}|[^<{]+", pattern)
    return tuple((roles.get(piece[0], ""), piece.strip("<>{}")) for piece in pieces)


def words_of(text: str) -> list[str]:
    """Return the words of a text, as they are written."""
    return re.findall(r"[A-Za-z]+", text)


@lru_cache(maxsize=1)
def all_words() -> tuple[str, ...]:
    """Return every word that a question may contain, in every spelling (capital or not), sorted."""
    patterns = [p for group in (*PATTERNS.values(), *NEIGHBOUR_PATTERNS.values()) for p in group]
    plain = ["".join(piece for role, piece in _pieces(pattern) if role != "object") for pattern in patterns]
    names = [f"{kind.name} {kind.plural} {article(kind.name)}" for kind in kinds()]
    found = {word for text in (*plain, *OPENINGS, *CLOSINGS, *names) for word in words_of(text)}
    return tuple(sorted(found | {text[0].lower() + text[1:] for p in plain for text in words_of(p)[:1]}))
