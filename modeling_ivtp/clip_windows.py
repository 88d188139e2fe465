"""CLIP's tokens of an instruction: in windows of its context length, and their places in the prompt (IVTP Eq. 7)."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

Range = tuple[int, int]


def with_composed(text: str, offsets: Iterable[Range]) -> list[Range]:
    """Extend CLIP's character ranges over the combining characters that its Unicode normalization left out.

    "e" and a combining accent become one letter, whose range is then that of the "e". CLIP's tokens leave nothing but
    white space uncovered, so whatever else is uncovered belongs to the token before it.
    """
    offsets = list(offsets)
    covered = bytearray(len(text))
    for start, end in offsets:
        covered[start:end] = b"\1" * (end - start)
    extended = []
    for start, end in offsets:
        while end < len(text) and not covered[end] and not text[end].isspace():
            end += 1
        extended.append((start, end))
    return extended


def moved(
    offsets: Sequence[Range], pieces: Sequence[Range], replacements: Sequence[tuple[int, int, int, int]]
) -> list[Range]:
    """Move ranges from the joined pieces of an instruction into the prompt with its placeholders expanded.

    Parameters
    ----------
    offsets : sequence of (int, int)
        Ranges in the pieces joined by one character each.
    pieces : sequence of (int, int)
        Ranges of the pieces in the prompt.
    replacements : sequence of (int, int, int, int)
        Range of each placeholder in the prompt, and of what replaced it in the expanded prompt, ascending.

    Returns
    -------
    list of (int, int)
    """
    ends = [end for _, end, _, _ in replacements]
    growth = [0, *(new_end - end for _, end, _, new_end in replacements)]
    joined, shifts, place = [], [], 0
    for start, end in pieces:
        joined.append(place)
        shifts.append(start + growth[bisect_right(ends, start)] - place)
        place += end - start + 1
    moves = [shifts[bisect_right(joined, start) - 1] for start, _ in offsets]
    return [(start + move, end + move) for (start, end), move in zip(offsets, moves, strict=True)]


def window_bounds(words: Sequence[int | None], room: int) -> list[Range]:
    """Divide CLIP's tokens into windows of at most `room`, between words where a word fits into one window."""
    bounds, start = [], 0
    while len(words) - start > room:
        cut = start + room
        while cut > start and words[cut - 1] == words[cut]:
            cut -= 1
        bounds.append((start, cut if cut > start else start + room))
        start = bounds[-1][1]
    return [*bounds, (start, len(words))] if words else []


def places(spans: Sequence[Range], bounds: Sequence[Range], context: int) -> list[list[int]]:
    """Turn ranges of CLIP's tokens into places in the row's windows, counted from the end.

    A range that crosses into another window is confined to the window that holds most of it, the first of equals.
    """
    starts = [start for start, _ in bounds]
    found = []
    for first, last in spans:
        if first == last:
            found.append([0, 0])
            continue
        touched = range(bisect_right(starts, first) - 1, bisect_right(starts, last - 1))
        window = max(touched, key=lambda number: min(last, bounds[number][1]) - max(first, bounds[number][0]))
        start, end = bounds[window]
        shift = (window - len(bounds)) * context + 1 - start
        found.append([max(first, start) + shift, min(last, end) + shift])
    return found
