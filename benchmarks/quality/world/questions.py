"""Questions about scenes, each with an unambiguous answer of one word.

Objects are named by kind alone, and only kinds that occur once are named, except where presence or number is asked for.
Answers are balanced within each type by the way scenes are drawn and questions are chosen, so that a model that has not
seen the picture can only guess, as well as `chance` says.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from benchmarks.quality.world.draws import Draws
from benchmarks.quality.world.relations import neighbours
from benchmarks.quality.world.scenes import MOST_ALIKE, SIDE, Scene, draw_scene
from benchmarks.quality.world.splits import check_split, pair_is_held_out, triple_is_held_out
from benchmarks.quality.world.sprites import COLOURS, kinds
from benchmarks.quality.world.wording import (
    NEIGHBOUR_PATTERNS,
    PATTERNS,
    RELATIONS,
    TERSE_NEIGHBOUR_PATTERNS,
    TERSE_PATTERNS,
    Span,
    phrase,
)

TYPES = ("existence", "count", "colour", "corner", *RELATIONS, "larger", "colour_of_neighbour")
NUMBERS = ("one", "two", "three", "four", "five")
CORNERS = ("northwest", "northeast", "southwest", "southeast")
STYLES = ("full", "plain", "terse")
BEFORE, AFTER = "USER: <image>\n", " ASSISTANT:"

_QUESTIONS = 2


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes
    ----------
    type : str
        One of `TYPES`.
    text : str
        The question, with idle words.
    answer : str
        One word.
    spans : tuple of Span
        The content words in `text`: names and relations.
    subjects : tuple of int
        Numbers of the scene's objects that the question names.
    sources : tuple of int
        Numbers of the objects that the answer is read from, if they are others.
    relation : str
        How the source stands to the subject, in questions that relate two objects; else "".
    held_out : {"", "pair", "triple"}
        Whether only the test has such questions: "pair" for a kind on a colour, "triple" for two kinds in a relation.
    """

    type: str
    text: str
    answer: str
    spans: tuple[Span, ...]
    subjects: tuple[int, ...]
    sources: tuple[int, ...]
    relation: str
    held_out: str

    @property
    def prompt(self) -> str:
        """The question as a prompt in LLaVA's form."""
        return BEFORE + self.text + AFTER

    @property
    def prompt_spans(self) -> tuple[Span, ...]:
        """The content words in `prompt`."""
        return tuple(Span(start + len(BEFORE), stop + len(BEFORE), role) for start, stop, role in self.spans)


@dataclass(frozen=True)
class _Draft:
    answer: str
    x: int
    y: int | None = None
    subjects: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    relation: str = ""


def chance(type: str) -> float:
    """Return how often the best guess is right that knows the question but not the picture.

    Raises
    ------
    ValueError
        For an unknown type.
    """
    _check_types([type])
    # Subjects occur once, so the answer to a relation is one of the other kinds.
    options = {"existence": 2, "larger": 2, "count": MOST_ALIKE, "corner": 4, "colour": 8, "colour_of_neighbour": 8}
    return 1 / options.get(type, len(kinds()) - 1)


def answer_words() -> tuple[str, ...]:
    """Return every word that can be an answer."""
    return ("yes", "no", *NUMBERS, *COLOURS, *CORNERS, *(kind.name for kind in kinds()))


def questions(
    scene: Scene, number: int | None = None, types: Sequence[str] = TYPES, variant: int = 0, style: str = "full"
) -> list[Question]:
    """Draw different questions about a scene; the types take turns.

    Parameters
    ----------
    scene : Scene
    number : int, optional
        The most questions; default: all there are, about 40 with all types. No scene allows every type.
    types : sequence of str
    variant : int
        Another number gives another choice, order and wording.
    style : {"full", "plain", "terse"}
        A sentence with idle words around it, the sentence alone, or its fewest words.

    Raises
    ------
    ValueError
        For an unknown type or style.
    """
    _check_types(types)
    if style not in STYLES:
        raise ValueError(f"Unknown style {style!r}; allowed are {', '.join(STYLES)}.")
    draws = Draws(scene.seed, scene.side, _QUESTIONS, variant)
    unique = {kind for kind, number in scene.counts().items() if number == 1}
    related = neighbours(scene) if set(types) & {*RELATIONS, "colour_of_neighbour"} else {}
    pools = {}
    for type in draws.shuffled(list(dict.fromkeys(types))):
        if type in RELATIONS:
            drafts = _beside(scene, draws, unique, type, related[type])
        elif type == "colour_of_neighbour":
            drafts = _two_hops(scene, unique, related)
        else:
            drafts = _DRAFTS[type](scene, draws, unique)
        pools[type] = iter(draws.shuffled(drafts))
    return list(islice(_in_turn(scene, draws, pools, style), number))


def sample_questions(
    split: str,
    number: int,
    types: Sequence[str] = TYPES,
    *,
    start: int = 0,
    side: int = SIDE,
    held_out: bool | None = None,
) -> Iterator[tuple[Scene, Question]]:
    """Draw an even sample of a split: as many questions of each type, at most one for a scene.

    Parameters
    ----------
    split : {"train", "validation", "test"}
    number : int
        Number of questions.
    types : sequence of str
        The types, which take turns.
    start : int
        Index of the first scene.
    side : int
        Height and width of the scenes.
    held_out : bool, optional
        True: only questions that are held out for the test; False: only others; None: both.

    Raises
    ------
    ValueError
        For an unknown split or type, a side that is not allowed, or held-out questions of a split without any.
    """
    _check_types(types)
    check_split(split)
    if held_out and split != "test":
        raise ValueError(f"The split {split!r} has no held-out questions; only 'test' has.")
    index = start
    for place in range(number):
        fitting: list[Question] = []
        while not fitting:
            scene = draw_scene(split, index, side)
            asked = questions(scene, types=[types[place % len(types)]])
            fitting = [q for q in asked if held_out is None or bool(q.held_out) == held_out]
            index += 1
        yield scene, fitting[0]


def _in_turn(scene: Scene, draws: Draws, pools: dict[str, Iterator[_Draft]], style: str) -> Iterator[Question]:
    while pools:
        for type in list(pools):
            draft = next(pools[type], None)
            if draft is None:
                del pools[type]
            else:
                yield _worded(scene, draws, type, draft, style)


def _worded(scene: Scene, draws: Draws, type: str, draft: _Draft, style: str) -> Question:
    two_hops = type == "colour_of_neighbour"
    if style == "terse":
        pattern = TERSE_NEIGHBOUR_PATTERNS[draft.relation] if two_hops else TERSE_PATTERNS[type]
    else:
        pattern = draws.pick(NEIGHBOUR_PATTERNS[draft.relation] if two_hops else PATTERNS[type])
    text, spans = phrase(pattern, draws, draft.x, draft.y, idle=style == "full")
    shown = [scene.objects[number] for number in draft.subjects + draft.sources]
    held_out = "pair" if any(pair_is_held_out(thing.kind, thing.colour) for thing in shown) else ""
    if _draft_is_held_out(scene, draft):
        held_out = "triple"
    return Question(type, text, draft.answer, spans, draft.subjects, draft.sources, draft.relation, held_out)


def _draft_is_held_out(scene: Scene, draft: _Draft) -> bool:
    if not draft.relation:
        return False
    other = draft.y if draft.y is not None else scene.objects[draft.sources[0]].kind
    return triple_is_held_out(draft.relation, draft.x, other)


def _allowed(scene: Scene, drafts: list[_Draft]) -> list[_Draft]:
    return [draft for draft in drafts if scene.split == "test" or not _draft_is_held_out(scene, draft)]


def _existence(scene: Scene, draws: Draws, unique: set[int]) -> list[_Draft]:
    """Draft as many questions about kinds that are there as about others, all kinds equally often in both."""
    counts = scene.counts()
    present = draws.sample(list(counts), 6)
    absent = draws.sample([kind for kind in range(len(kinds())) if kind not in counts], len(present))
    yes = [_Draft("yes", kind, subjects=_of_kind(scene, kind)) for kind in present]
    return yes + [_Draft("no", kind) for kind in absent]


def _count(scene: Scene, draws: Draws, unique: set[int]) -> list[_Draft]:
    """Draft questions about the two kinds whose numbers add up (`scenes._cast`); one that occurs once may be any."""
    counts = scene.counts()
    asked = [kind for kind, number in counts.items() if number > 1]
    if len(asked) == 1:
        asked += draws.sample(sorted(unique), 1)
    return [_Draft(NUMBERS[counts[kind] - 1], kind, subjects=_of_kind(scene, kind)) for kind in asked]


def _colour(scene: Scene, draws: Draws, unique: set[int]) -> list[_Draft]:
    things = enumerate(scene.objects)
    return [_Draft(thing.colour_name, thing.kind, subjects=(n,)) for n, thing in things if thing.kind in unique]


def _corner(scene: Scene, draws: Draws, unique: set[int]) -> list[_Draft]:
    """Draft questions about objects at least a twelfth of the side away from the middle lines."""
    drafts = []
    for number, thing in enumerate(scene.objects):
        right, down = 2 * thing.x - scene.side, 2 * thing.y - scene.side
        if thing.kind in unique and 6 * min(abs(right), abs(down)) >= scene.side:
            drafts.append(_Draft(CORNERS[2 * (down > 0) + (right > 0)], thing.kind, subjects=(number,)))
    return drafts


def _larger(scene: Scene, draws: Draws, unique: set[int]) -> list[_Draft]:
    """Draft questions about pairs of which one is at least 1.3 times as large, named in random order."""
    alone = [(number, thing) for number, thing in enumerate(scene.objects) if thing.kind in unique]
    pairs = []
    for (i, one), (j, other) in combinations(alone, 2):
        if 10 * max(one.size, other.size) >= 13 * min(one.size, other.size):
            larger = one if one.size > other.size else other
            first, second = (one, other) if draws.chance(1, 2) else (other, one)
            pairs.append(_Draft(larger.name, first.kind, second.kind, subjects=(i, j), relation="larger"))
    return draws.sample(_allowed(scene, pairs), 6)


def _beside(scene: Scene, draws: Draws, unique: set[int], relation: str, pairs: list[tuple[int, int]]) -> list[_Draft]:
    """Draft questions about neighbours; repeated kinds are the answer no more often than kinds that occur once."""
    counts, drafts = scene.counts(), []
    for subject, source in pairs:
        one, other = scene.objects[subject], scene.objects[source]
        if one.kind in unique and draws.chance(1, counts[other.kind]):
            drafts.append(_Draft(other.name, one.kind, subjects=(subject,), sources=(source,), relation=relation))
    return _allowed(scene, drafts)


def _two_hops(scene: Scene, unique: set[int], related: dict[str, list[tuple[int, int]]]) -> list[_Draft]:
    drafts = []
    for relation, pairs in related.items():
        for subject, source in pairs:
            one, other = scene.objects[subject], scene.objects[source]
            if one.kind in unique:
                drafts.append(
                    _Draft(other.colour_name, one.kind, subjects=(subject,), sources=(source,), relation=relation)
                )
    return _allowed(scene, drafts)


def _of_kind(scene: Scene, kind: int) -> tuple[int, ...]:
    return tuple(number for number, thing in enumerate(scene.objects) if thing.kind == kind)


_DRAFTS: dict[str, Callable[[Scene, Draws, set[int]], list[_Draft]]] = {
    "existence": _existence,
    "count": _count,
    "colour": _colour,
    "corner": _corner,
    "larger": _larger,
}


def _check_types(types: Sequence[str]) -> None:
    if not types:
        raise ValueError(f"No question types given; allowed are {', '.join(TYPES)}.")
    for type in types:
        if type not in TYPES:
            raise ValueError(f"Unknown question type {type!r}; allowed are {', '.join(TYPES)}.")
