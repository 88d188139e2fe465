"""The splits of scenes, and the combinations that only the test may show.

Every scene has a global seed; the splits own ranges of seeds that cannot overlap. On top of it some combinations are
held out, by rule and not by list: they occur in test scenes and questions at their natural rate, and never elsewhere.

- *Pairs* of kind and tile colour: 32 of 512, every colour four times. No training or validation scene holds one.
- *Triples* of relation and two kinds: about one in ten. No training or validation question asks about one. Left and
  right are one relation seen from both ends, as are above and below; nearness and size hold for both kinds alike.
"""

from benchmarks.quality.world.sprites import COLOURS, kinds

SPLITS = ("train", "validation", "test")
SCENES_PER_SPLIT = 1_000_000_000

_HORIZONTAL, _VERTICAL, _NEAR, _SIZE = range(4)
_CANONICAL = {
    "left_of": (_HORIZONTAL, False),
    "right_of": (_HORIZONTAL, True),
    "above": (_VERTICAL, False),
    "below": (_VERTICAL, True),
    "next_to": (_NEAR, False),
    "larger": (_SIZE, False),
}


def scene_seed(split: str, index: int) -> int:
    """Return the global seed of a split's scene.

    Raises
    ------
    ValueError
        For an unknown split, or an index outside of it.
    """
    check_split(split)
    if not 0 <= index < SCENES_PER_SPLIT:
        raise ValueError(f"Scene index {index} is outside the split {split!r}; allowed are 0 … {SCENES_PER_SPLIT - 1}.")
    return SPLITS.index(split) * SCENES_PER_SPLIT + index


def check_split(split: str) -> None:
    """Raise ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; allowed are {', '.join(SPLITS)}.")


def pair_is_held_out(kind: int, colour: int) -> bool:
    """Return whether a kind on a colour is held out for the test: every second kind, each with one colour."""
    return kind % 2 == 0 and colour == (kind // 2 * 3 + 1) % len(COLOURS)


def triple_is_held_out(relation: str, subject: int, other: int) -> bool:
    """Return whether a question that relates two kinds is held out for the test.

    Parameters
    ----------
    relation : {"left_of", "right_of", "above", "below", "next_to", "larger"}
    subject : int
        The kind that the question names.
    other : int
        The kind that stands in the relation to it.

    Raises
    ------
    ValueError
        For an unknown relation.
    """
    if relation not in _CANONICAL:
        raise ValueError(f"Unknown relation {relation!r}; allowed are {', '.join(_CANONICAL)}.")
    axis, turned = _CANONICAL[relation]
    first, second = (other, subject) if turned else (subject, other)
    if axis in (_NEAR, _SIZE):
        first, second = min(subject, other), max(subject, other)
    # A fixed scramble of 12 bits: neighbouring kinds must not share their fate.
    mixed = (first * len(kinds()) + second) * 4 + axis
    return (mixed * 2654435761 % 2**32 >> 16) % 10 == 0
