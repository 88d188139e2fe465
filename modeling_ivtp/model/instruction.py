"""The instruction in a prompt: the characters that the person wrote, and the CLIP tokens that cover them.

The first part finds the user turns by the role markers of chat formats, known ones and those that a chat template
reveals. The second part divides CLIP's tokens of these turns into windows of its context length, and finds for each
range of tokens its place in the windows (IVTP Eq. 7).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile, zip_longest
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

Range = tuple[int, int]
"""A half-open range of characters or tokens."""

KNOWN_FORMATS = (
    (r"<\|im_start\|>user\b", r"<\|im_end\|>"),
    (r"<\|start_header_id\|>user<\|end_header_id\|>", r"<\|eot_id\|>"),
    (r"<start_of_turn>user\b", r"<end_of_turn>"),
    (r"<\|user\|>", r"<\|end\|>|<\|assistant\|>"),
    (r"\[INST\]", r"\[/INST\]"),
    (r"###\s*Human:", r"###\s*Assistant:"),
    (r"(?<!\w)USER:", r"(?<!\w)ASSISTANT:"),
    (r"GPT4 Correct User:", r"GPT4 Correct Assistant:|<\|end_of_turn\|>"),
    (r"(?<!\w)User:", r"(?<!\w)Assistant:"),
    (r"(?<!\w)Human:", r"(?<!\w)Assistant:"),
)
"""Regular expressions of what opens and what closes a user turn in the formats of the LLaVA checkpoints on the Hub."""

SYSTEM_INSIDE_TURN = r"<<SYS>>.*?<</SYS>>"
"""A system prompt inside of a user turn, as a regular expression."""

_NEVER = r"(?!)"


def role_markers(text: str, formats: Sequence[tuple[str, str]]) -> list[tuple[bool, int, int]]:
    """Find the role markers of a prompt, by the first format that fits.

    Among formats whose markers are words, the one that opens a turn first fits. A question may name a marker: among the
    user's words, an opening marker only counts where a sentence may begin, and of several words such as `ASSISTANT:`
    that close a turn, the last one counts. So may an answer: there, an opening marker also counts if its turn is
    answered.

    Parameters
    ----------
    text : str
        The prompt.
    formats : sequence of (str, str)
        Regular expressions of what opens and of what closes a user turn, the likeliest format first.

    Returns
    -------
    list of (bool, int, int)
        Whether the marker opens a user turn, and its half-open character range; empty without any marker.
    """
    found = [_markers_of(text, *markers) for markers in formats]
    opened = [markers for markers in found if any(opens for opens, _, _ in markers)]
    by_words = [markers for markers in opened if text[_first_opening(markers)].isalnum()]
    if by_words and by_words[0] is opened[0]:
        return min(by_words, key=_first_opening)
    return next(iter(opened), None) or next(filter(None, found), [])


def _first_opening(markers: Sequence[tuple[bool, int, int]]) -> int:
    return next(start for opens, start, _ in markers if opens)


def _markers_of(text: str, opening: str, closing: str) -> list[tuple[bool, int, int]]:
    found: list[tuple[bool, int, int]] = []
    closings = [match.span() for match in re.finditer(closing, text)]
    last = closings[-1][0] if closings else -1
    # A word that really closes a turn follows a sentence or ends the prompt.
    closed = max((start for start, end in closings if not _amid_words(text, start, end)), default=-1)
    matches = list(re.finditer(f"(?P<opening>{opening})|{closing}", text))
    for match, following in zip_longest(matches, matches[1:]):
        start, end = match.span()
        word = match[0][0].isalnum()
        if match["opening"] is not None:
            among_users_words = found[-1][0] if found else closed < end
            answered = following is not None and following["opening"] is None
            in_answer = word and found != [] and not found[-1][0] and not answered
            if (among_users_words or in_answer) and _amid_words(text, start, start + 1):
                continue
            # In lower case it may be anything but a marker, unless an answer's marker follows.
            if word and not match[0].isupper() and last < end and text[:start].strip():
                continue
        elif word:
            if not found and _amid_words(text, start, end):
                continue
            if found and not found[-1][0] and text[found[-1][1]].isalnum():
                found.pop()
        found.append((match["opening"] is not None, start, end))
    return found


def _amid_words(text: str, start: int, end: int) -> bool:
    """Return whether words surround a range: no sentence ends before it, and the text goes on after it."""
    before = text[:start].rstrip(" \t")
    return before != "" and before[-1] not in "\n.!?>]。！？" and text[end:].strip() != ""


def user_turns(text: str, formats: Sequence[tuple[str, str]]) -> list[Range]:
    """Find the user turns of a prompt between its role markers; a prompt without any is one turn."""
    markers = role_markers(text, formats)
    # A prompt that only closes a turn begins inside of it.
    turns, start = [], None if any(opens for opens, _, _ in markers) else 0
    for opens, first, last in markers:
        if start is not None:
            turns.append((start, first))
        start = last if opens else None
    return turns if start is None else [*turns, (start, len(text))]


def template_markers(render: Callable[[list[Any], bool], str], special_tokens: str) -> tuple[str, str] | None:
    """Learn a chat template's role markers from how it renders a conversation.

    Parameters
    ----------
    render : callable
        Renders a conversation; the second argument asks for a generation prompt after it.
    special_tokens : str
        A regular expression for the prompt's special tokens.

    Returns
    -------
    (str, str) or None
        Regular expressions of what stands before every user's words and of what follows them. None if the template
        cannot render a plain conversation, or puts no words before the user's.
    """
    words = ["probequestion", "probeanswer", "probefollowup"]
    roles = ["user", "assistant", "user"]
    for content in (lambda word: [{"type": "text", "text": word}], lambda word: word):
        chat: Any = [{"role": role, "content": content(word)} for role, word in zip(roles, words, strict=True)]
        try:
            whole = render(chat, True)
            answered = render(chat[:2], False)
        except Exception as error:  # a template is a program and may raise anything
            logger.info(f"The chat template cannot render a plain conversation: {error}")
            continue
        if re.findall("|".join(words), whole) == words:
            break
    else:
        return None
    before, between, again, after = re.split("|".join(words), whole)
    again = again.removeprefix(answered.split(words[1])[-1])
    # Special tokens count as one letter: "<s>[INST]" and "</s>[INST]" have "[INST]" in common.
    letters = re.compile(f"{special_tokens}|.", re.DOTALL)
    opening = "".join(reversed(_common_start(letters.findall(before)[::-1], letters.findall(again)[::-1])))
    after = after.strip() or between  # a template need not have generation prompts
    closing = _common_start(letters.findall(between.lstrip()), letters.findall(after.lstrip()))
    if closing and len(closing[0]) > 1:
        closing = closing[:1]  # a special token closes the turn, whoever speaks next
    if not re.search(r"\w", opening):
        return None
    return _marker_pattern(opening), _marker_pattern("".join(closing))


def _marker_pattern(text: str) -> str:
    """Turn a role marker into a regular expression that allows any white space and never matches inside of a word."""
    text = text.strip()
    if not re.search(r"\w", text):
        return _NEVER
    pattern = r"\s*".join(re.escape(part) for part in text.split())
    return (r"(?<!\w)" if re.match(r"\w", text) else "") + pattern + (r"(?!\w)" if re.search(r"\w$", text) else "")


def _common_start(first: list[str], second: list[str]) -> list[str]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [letter for letter, _ in pairs]


def cover_combining(text: str, offsets: Iterable[Range]) -> list[Range]:
    """Extend CLIP's character ranges over the combining characters that its Unicode normalization left out.

    "e" and a combining accent become one letter, whose range is then that of the "e". CLIP's tokens leave only white
    space uncovered, so any other uncovered character belongs to the token before it.
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


def move_to_prompt(
    offsets: Sequence[Range], pieces: Sequence[Range], replacements: Sequence[tuple[int, int, int, int]]
) -> list[Range]:
    """Move ranges from the joined pieces of an instruction into the prompt with its placeholders expanded.

    Parameters
    ----------
    offsets : sequence of (int, int)
        Ranges in the pieces, which are joined by one character each.
    pieces : sequence of (int, int)
        Ranges of the pieces in the prompt.
    replacements : sequence of (int, int, int, int)
        Range of each placeholder in the prompt, and of its replacement in the expanded prompt, ascending.

    Returns
    -------
    list of (int, int)
    """
    ends = [end for _, end, _, _ in replacements]
    growth = [0, *(new_end - end for _, end, _, new_end in replacements)]
    starts, shifts, length = [], [], 0
    for start, end in pieces:
        starts.append(length)
        shifts.append(start + growth[bisect_right(ends, start)] - length)
        length += end - start + 1
    moves = [shifts[bisect_right(starts, start) - 1] for start, _ in offsets]
    return [(start + move, end + move) for (start, end), move in zip(offsets, moves, strict=True)]


def window_bounds(words: Sequence[int | None], room: int) -> list[Range]:
    """Divide CLIP's tokens into windows of at most `room`, and cut only words that do not fit into one window.

    Parameters
    ----------
    words : sequence of int or None
        The number of each token's word.
    room : int
    """
    bounds, start = [], 0
    while len(words) - start > room:
        cut = start + room
        while cut > start and words[cut - 1] == words[cut]:
            cut -= 1
        bounds.append((start, cut if cut > start else start + room))
        start = bounds[-1][1]
    return [*bounds, (start, len(words))] if words else []


def window_spans(spans: Sequence[Range], bounds: Sequence[Range], context: int) -> list[list[int]]:
    """Turn ranges of CLIP's tokens into ranges over the row's windows, counted from the end.

    A range that crosses into another window is limited to the window that holds most of it, the first of equals.

    Parameters
    ----------
    spans : sequence of (int, int)
        Ranges of CLIP's tokens; an empty one becomes [0, 0].
    bounds : sequence of (int, int)
        From `window_bounds`.
    context : int
        CLIP's context length C. A window holds its tokens after a start token.
    """
    starts = [start for start, _ in bounds]
    ranges = []
    for first, last in spans:
        if first == last:
            ranges.append([0, 0])
            continue
        touched = range(bisect_right(starts, first) - 1, bisect_right(starts, last - 1))
        window = max(touched, key=lambda number: min(last, bounds[number][1]) - max(first, bounds[number][0]))
        start, end = bounds[window]
        shift = (window - len(bounds)) * context + 1 - start
        ranges.append([max(first, start) + shift, min(last, end) + shift])
    return ranges
