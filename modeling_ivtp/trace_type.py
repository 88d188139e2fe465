"""Typesetting for the picture of a trace: fonts, widths, and text broken into lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .trace_picture import plot_module
from .trace_words import UNSPACED

_ASIAN_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans GB", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback"),
)
_BREAKABLE = re.compile(rf"\s+|[{UNSPACED}]|[^\s{UNSPACED}]{{1,32}}(?![^\s{UNSPACED}])|[^\s{UNSPACED}]{{1,8}}")
"""White space, or what a line may end after: such a character, a word, a piece of what is too long for a word."""


@dataclass
class Paragraph:
    """A text broken into lines; lengths in inches from the left edge, lines counted from 0.

    Attributes
    ----------
    words : list of (line, x, text)
    tints : list of (line, left, right, strength)
        Stretches to mark, with the greatest strength among their characters.
    lines : int
        How many there are.
    """

    words: list[tuple[int, float, str]]
    tints: list[tuple[int, float, float, float]]
    lines: int = 0


class Font:
    """A font in one size, and text set in it; lengths are in inches.

    What no installed font can draw is set as a box, so that nothing warns when the figure is drawn.

    Parameters
    ----------
    points : float
        Size of the type.
    text : str
        All that is going to be set, by which fallback fonts are chosen.
    weight : str
        `"normal"` or `"bold"`.
    """

    def __init__(self, points: float, text: str, weight: str = "normal") -> None:
        fonts = plot_module("matplotlib.font_manager")

        def drawable(path: Any) -> set[str]:
            font = fonts.get_font(path)
            return {letter for letter in set(text) if font.get_char_index(ord(letter))}

        text += "□…"
        path = fonts.findfont(fonts.FontProperties(weight=weight))
        families, self.drawable = [fonts.get_font(path).family_name], drawable(path)
        installed = {entry.name for entry in fonts.fontManager.ttflist}
        for name in _ASIAN_FONTS:
            if name in installed and not set(text) <= self.drawable:
                more = drawable(fonts.findfont(fonts.FontProperties(family=name, weight=weight))) - self.drawable
                families += [name] if more else []
                self.drawable |= more
        self.em = points / 72
        self.properties = fonts.FontProperties(family=families, size=points, weight=weight)
        self._measure = plot_module("matplotlib.textpath").text_to_path.get_text_width_height_descent
        self._widths: dict[str, float] = {}

    def spell(self, letter: str) -> str:
        """`letter` as it can be drawn; joiners and selectors of emoji vanish, and so do control characters."""
        if letter.isspace():
            return " "
        if letter in "\ufe0e\ufe0f" or not letter.isprintable():
            return ""
        return letter if letter in self.drawable else "□" if "□" in self.drawable else "?"

    def width(self, text: str) -> float:
        """Advance width; measured between bars, because spaces at the ends would count for nothing."""
        if text not in self._widths:
            bars, both = (self._measure(f"|{inner}|", self.properties, False)[0] for inner in ("", text))
            self._widths[text] = (both - bars) / 72
        return self._widths[text]

    def set(self, text: str, strengths: Sequence[float | None], width: float, lines: int) -> Paragraph:
        """Break `text` into at most `lines` lines of `width`, cut with an ellipsis; tint what has a strength."""
        letters = [(spelt, tint) for letter, tint in zip(text, strengths, strict=True) if (spelt := self.spell(letter))]
        text, strengths = "".join(letter for letter, _ in letters), [tint for _, tint in letters]
        made, x, gap = Paragraph([], []), 0.0, 0.0
        for word in _BREAKABLE.finditer(text):
            if word[0].isspace():
                gap = self.width(" ") if x else 0.0
                continue
            start = word.start()
            while start < word.end():
                end = word.end()
                if not x or x + gap + self.width(text[start:end]) > width:
                    if made.lines == lines:
                        self._cut(made, width)
                        return made
                    made.lines, x, gap = made.lines + 1, 0.0, 0.0
                while end - start > 1 and self.width(text[start:end]) > width:
                    end -= 1
                self._place(made, x + gap, text[start:end], strengths[start:end])
                x, gap, start = x + gap + self.width(text[start:end]), 0.0, end
        return made

    def pack(self, facts: Sequence[str], width: float) -> list[str]:
        """Lines of `width` that hold as many whole facts as fit; a fact is broken only where it alone is too long."""
        lines: list[str] = []
        for fact in facts:
            longer = f"{lines[-1]}  ·  {fact}" if lines else fact
            if lines and self.width(longer) <= width:
                lines[-1] = longer
            else:
                words = self.set(fact, [None] * len(fact), width, 9).words
                lines += [" ".join(word for _, _, word in line) for _, line in groupby(words, key=lambda word: word[0])]
        return lines

    def _place(self, made: Paragraph, x: float, text: str, strengths: Sequence[float | None]) -> None:
        line = made.lines - 1
        made.words.append((line, x, text))
        for marked, stretch in groupby(range(len(text)), key=lambda place: strengths[place] is not None):
            places = list(stretch)
            left, right = x + self.width(text[: places[0]]), x + self.width(text[: places[-1] + 1])
            if marked:
                strength = max(strengths[place] or 0.0 for place in places)
                if made.tints and made.tints[-1][0] == line and made.tints[-1][2] > left - 1e-6:
                    _, left, _, other = made.tints.pop()
                    strength = max(strength, other)
                made.tints.append((line, left, right, strength))

    def _cut(self, made: Paragraph, width: float) -> None:
        """End the last line with an ellipsis, at the cost of the words it takes the place of."""
        room = width - self.width("…")
        line, x, text = made.words.pop()
        while x and x + self.width(text) > room:
            line, x, text = made.words.pop()
        while len(text) > 1 and x + self.width(text) > room:
            text = text[:-1]
        end = x + self.width(text)
        made.words += [(line, x, text), (line, end, "…")]
        made.tints = [
            (at, left, right if at < line else min(right, end), strength)
            for at, left, right, strength in made.tints
            if at < line or left < end - 1e-6
        ]
