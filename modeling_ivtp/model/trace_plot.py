"""The picture after every panel of a trace: as the model sees it, and with what was dropped dimmed."""

from __future__ import annotations

import codecs
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor


def plot_module(name: str) -> Any:
    """A module that only a picture needs.

    Raises
    ------
    ImportError
        If it is not installed, with the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError("PruningTrace.plot needs matplotlib: pip install ivtp-llava[plot]") from error


def square(image: Any, grid: tuple[int, int]) -> Any:
    """The part of the picture that the grid covers, as (rows * c, columns * c, 3) floats in 0 to 1, c pixels a patch.

    Resizing the shortest side and cutting out the centre, as CLIP's image processor does, takes the largest centred
    square; here it is cut from the original, so that it is as sharp as the original allows.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or path
        An array is (H, W), (H, W, C) or (C, H, W), in 0 to 255 or, for floats, 0 to 1.
    grid : tuple of int
        Rows and columns of patches.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        If `image` is no such picture.
    """
    np, pil, ops = plot_module("numpy"), plot_module("PIL.Image"), plot_module("PIL.ImageOps")
    if isinstance(image, str | os.PathLike):
        try:
            with pil.open(image) as file:
                picture = ops.exif_transpose(file).convert("RGB")
        except pil.UnidentifiedImageError as error:
            raise ValueError(f"image={os.fspath(image)!r} is not an image file") from error
    elif isinstance(image, pil.Image):
        picture = image.convert("RGB")
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
            array = np.moveaxis(array, 0, 2)
        if array.size == 0 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(f"image of shape {image.shape}: expected (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4")
        top = 1 if np.issubdtype(array.dtype, np.floating) else 255
        if array.min() < 0 or not array.max() <= top:
            raise ValueError(
                f"image of {array.dtype} from {array.min():.4g} to {array.max():.4g}: expected integers in 0 to 255 or "
                "floats in 0 to 1, a picture as it is before the processor normalises it"
            )
        colors = array[..., :3].repeat(3 if array.shape[2] == 1 else 1, axis=2)
        picture = pil.fromarray(np.round(colors * (255 / top)).astype(np.uint8))
    else:
        raise ValueError(f"image of type {type(image).__name__}: expected a PIL image, a NumPy array or a path")
    rows, columns = grid
    cell = math.ceil(768 / max(grid))
    side = min(picture.width / columns, picture.height / rows)
    left, upper = (picture.width - side * columns) / 2, (picture.height - side * rows) / 2
    cut = (left, upper, left + side * columns, upper + side * rows)
    return np.asarray(picture.resize((columns * cell, rows * cell), pil.Resampling.LANCZOS, box=cut)) / 255


def dim(picture: Any, mask: Tensor) -> Any:
    """The picture, grey and dark but still legible where a patch was dropped.

    Parameters
    ----------
    picture : numpy.ndarray
        (rows * c, columns * c, 3) floats in 0 to 1, as `square` makes it.
    mask : Tensor
        (rows, columns) bool, on the CPU: the patches that were kept.
    """
    cell = picture.shape[0] // mask.shape[0]
    kept = mask.numpy().repeat(cell, 0).repeat(cell, 1)[..., None]
    grey = (picture @ [0.299, 0.587, 0.114])[..., None]
    return picture * kept + (0.38 * (0.82 * grey + 0.18 * picture) + 0.08) * ~kept


def as_image(picture: Any) -> Any:
    """Floats in 0 to 1 as a PIL.Image.Image."""
    return plot_module("PIL.Image").fromarray((picture * 255).round().astype("uint8"))


UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts written without spaces, as the inside of a regular expression's brackets: Thai to Khmer, kana, Han."""


class Token(Protocol):
    """What is read of a token of the instruction."""

    @property
    def position(self) -> int:
        """Logical column in the prompt."""

    @property
    def text(self) -> str:
        """The tokenizer's text of it, in any of the common spellings."""

    @property
    def relevance(self) -> float:
        """C_s of Eq. 7, or nan."""

    @property
    def is_key(self) -> bool:
        """Whether it passed the threshold."""


@dataclass(frozen=True)
class MarkedText:
    """The text that tokens spell, its key words marked by relevance (C_s, Eq. 7).

    Attributes
    ----------
    text : str
    strengths : tuple of float or None
        One per character: 1 for the most relevant key token, 0 for the least, 0.5 where all are alike or their
        relevance is not known, None for what is no key token.
    low, high : float
        Relevance of the least and of the most relevant key token; nan where no relevance is known.
    """

    text: str
    strengths: tuple[float | None, ...]
    low: float
    high: float


def mark(tokens: Sequence[Token]) -> MarkedText:
    """The text of `tokens`, with what a reader needs to see which words were key, and how much so."""
    text, owners = _characters(tokens)
    known = [token.relevance for token in tokens if token.is_key and math.isfinite(token.relevance)]
    low, high = min(known, default=math.nan), max(known, default=math.nan)

    def strength(token: Token) -> float:
        return (token.relevance - low) / (high - low) if high > low and math.isfinite(token.relevance) else 0.5

    keys = [[strength(tokens[place]) for place in owner if tokens[place].is_key] for owner in owners]
    return MarkedText(text, tuple(max(key) if key else None for key in keys), low, high)


def key_words(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The words that hold a key token, in reading order.

    A word counts as a whole when any of its tokens is key; in scripts without spaces adjacent key characters are
    joined instead.
    """
    text, owners = _characters(tokens)
    key = [any(tokens[token].is_key for token in owner) for owner in owners]
    for word in re.finditer(rf"[^\W{UNSPACED}]+(?:['’-][^\W{UNSPACED}]+)*", text):
        key[word.start() : word.end()] = [any(key[word.start() : word.end()])] * len(word[0])
    runs = "".join(letter if marked else " " for letter, marked in zip(text, key, strict=True)).split()
    return tuple(re.sub(r"^[^\w]+(?=\w)|(?<=\w)[^\w]+$", "", run) for run in runs)


def _characters(tokens: Sequence[Token]) -> tuple[str, list[tuple[int, ...]]]:
    """The text the tokens spell and, for each of its characters, the places of the tokens it came from.

    Tokens that are not neighbours in the prompt are set apart, and so are bare numbers of tokens, `<id>`. Otherwise a
    space is where a tokenizer put its mark: the first word of a line has none, however many tokens it is cut into.
    """
    pieces = _token_bytes(tokens)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    letters: list[str] = []
    owners: list[tuple[int, ...]] = []
    pending: list[int] = []
    for place, piece in enumerate(pieces):
        bare = re.fullmatch(r"<-?\d+>", tokens[place].text)
        if place and (bare or tokens[place].position != tokens[place - 1].position + 1):
            letters.append(" ")
            owners.append(())
        for byte in piece:
            pending.append(place)
            for letter in decoder.decode(bytes([byte])):
                letters.append(letter)
                owners.append(tuple(dict.fromkeys(pending)))
                pending = []
    return "".join(letters), owners


def _token_bytes(tokens: Sequence[Token]) -> list[bytes]:
    """UTF-8 of every token, whichever spelling the tokenizer has for spaces and for parts of characters."""
    texts = [token.text for token in tokens]
    parts = [re.fullmatch("<0x([0-9A-Fa-f]{2})>", text) for text in texts]
    plain = [
        bytes.fromhex(part[1]) if part else text.replace("▁", " ").encode("utf-8", "replace")
        for text, part in zip(texts, parts, strict=True)
    ]
    alphabet = _byte_alphabet()
    if any(parts) or not all(letter in alphabet for text in texts for letter in text):
        return plain
    spelt = [bytes(alphabet[letter] for letter in text) for text in texts]
    try:
        b"".join(spelt).decode()
    except UnicodeDecodeError:
        # "café" is written in that alphabet too, but there it is no UTF-8
        return spelt if any("Ġ" in text for text in texts) else plain
    return spelt


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes, by which byte-level tokenizers write a space as `Ġ`: character to byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


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


if TYPE_CHECKING:
    try:  # an unguarded import, even this one, would count among what a checkpoint's code requires
        from matplotlib.figure import Figure
    except ImportError:
        raise

# Lengths are in inches; at 144 dots each, a panel of 24 x 24 patches has 16 whole dots to a patch.
_DPI = 144
_PANEL, _GAP, _MARGIN, _FOOT = 384 / _DPI, 24 / _DPI, 40 / _DPI, 66 / _DPI
_COLUMNS, _LINES, _LEADING = 5, 4, 1.62  # panels in a row, lines of an instruction, line height in em
_INK, _MUTED, _FAINT, _ACCENT = "#1c2128", "#656d76", "#e7e9ec", "#f59e0b"
_TINTS = (1.0, 0.937, 0.776), (1.0, 0.729, 0.169)


class Group(Protocol):
    """What is read of a group of layers."""

    @property
    def stage(self) -> str:
        """`"tower"` or `"decoder"`."""

    @property
    def layers(self) -> tuple[int, int]:
        """First and last layer, counted from 0."""

    @property
    def kept(self) -> Tensor:
        """(k_out,) int64: patches that stayed."""


class Panel(NamedTuple):
    """One state of the image: what to call it, and its visual tokens as a mask (rows, columns) of patches."""

    label: str
    mask: Tensor


def choose_panels(
    groups: Sequence[Group], grid: tuple[int, int], stages: str | int | Sequence[int] | None = None
) -> list[Panel]:
    """The whole image, then what each group that `stages` chooses left of it.

    Parameters
    ----------
    groups : sequence of Group
        All groups of one image, in the order they ran.
    grid : tuple of int
        Rows and columns of patches.
    stages : str, int or sequence of int, optional
        `"all"`, `"tower"`, `"decoder"`, or places in `groups`. By default the end of the tower, half of the decoder's
        pruning and its end.

    Raises
    ------
    ValueError
        If `stages` is none of these.
    """
    panels = [Panel("as the model sees it", torch.ones(grid, dtype=torch.bool))]
    for group in _chosen(groups, stages):
        mask = torch.zeros(grid, dtype=torch.bool)
        mask.view(-1)[group.kept.cpu()] = True
        panels.append(Panel(_label(group, groups), mask))
    return panels


def _chosen(groups: Sequence[Group], stages: str | int | Sequence[int] | None) -> list[Group]:
    if stages is None:
        tower, decoder = ([group for group in groups if group.stage == stage] for stage in ("tower", "decoder"))
        halfway = (len(decoder) - 1) // 2
        return [*tower[-1:], *decoder[halfway:-1][:1], *decoder[-1:]]
    allowed = f"expected 'all', 'tower', 'decoder' or places from 0 to {len(groups) - 1}"
    if isinstance(stages, str):
        if stages not in ("all", "tower", "decoder"):
            raise ValueError(f"stages={stages!r}: {allowed}")
        return [group for group in groups if stages in ("all", group.stage)]
    for place in (stages := [stages] if isinstance(stages, int) else stages):
        if place not in range(-len(groups), len(groups)):
            raise ValueError(f"stages={stages!r} holds {place!r}: {allowed}")
    return [groups[place] for place in stages]


def _label(group: Group, groups: Sequence[Group]) -> str:
    if group.stage == "tower" and group is [other for other in groups if other.stage == "tower"][-1]:
        return "after the vision tower"
    stage, count = "vision" if group.stage == "tower" else group.stage, group.layers[1] + 1
    return f"after {count} {stage} layer{'' if count == 1 else 's'}"


def draw(
    picture: Any,
    panels: Sequence[Panel],
    instruction: MarkedText,
    caption: Sequence[str],
    title: str | None = None,
    size: float | None = None,
) -> Figure:
    """Set title, instruction and caption, which tells how tall the page is, then draw from the top down.

    Parameters
    ----------
    picture : numpy.ndarray
        (rows * c, columns * c, 3) floats in 0 to 1, c pixels a patch, as `square` makes it.
    panels : sequence of Panel
        At least one, all of one grid.
    instruction : MarkedText
        What the image was pruned for; may be empty.
    caption : sequence of str
        The facts below the panels.
    title : str, optional
        A line or two above the instruction.
    size : float, optional
        Width in inches.
    """
    grid = panels[0].mask.shape
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = math.ceil(len(panels) / rows)
    block = columns * _PANEL + (columns - 1) * _GAP
    tall = _PANEL * grid[0] / grid[1]

    low, high = instruction.low, instruction.high
    ends = (f"relevance {low:.2f}", f"{high:.2f}")
    bold, plain = Font(17, title or "", "bold"), Font(17, instruction.text)
    small, number = Font(10.5, "".join([*caption, *ends, "·"])), Font(15, "0123456789", "bold")
    heading = bold.set(title or "", [None] * len(title or ""), block, 2)
    question = plain.set(instruction.text, instruction.strengths, block, _LINES)
    footer = small.pack(caption, block)
    if high > low and small.width(footer[-1] + "".join(ends)) + 1.1 > block:
        footer.append("")
    leading = _LEADING * plain.em
    head = leading * (heading.lines + question.lines) + (0.16 if heading.lines + question.lines else 0.0)
    height = 2 * _MARGIN + head + rows * (tall + _FOOT) + 0.06 + _LEADING * small.em * len(footer)

    page = _Page(block + 2 * _MARGIN, height, size)
    page.paragraph(bold, heading, height - _MARGIN)
    page.paragraph(plain, question, height - _MARGIN - leading * heading.lines)
    for place, (label, mask) in enumerate(panels):
        left = _MARGIN + place % columns * (_PANEL + _GAP)
        bottom = height - _MARGIN - head - place // columns * (tall + _FOOT) - tall
        page.panel(left, bottom, dim(picture, mask), mask)
        page.write(number, left, bottom - 0.32, str(int(mask.sum())), _INK)
        page.write(small, left + _PANEL, bottom - 0.32, label, _MUTED, "right")
    for line, words in enumerate(reversed(footer)):
        page.write(small, _MARGIN, _MARGIN + _LEADING * small.em * line, words, _MUTED)
    if high > low:
        page.legend(small, _MARGIN + block, _MARGIN, ends)
    # IPython knows figures only once pyplot is imported, which a plot should not need
    page.figure._repr_png_ = partial(_png, page.figure)
    return page.figure


class _Page:
    """A figure of `width` by `height` inches, in which all else is told, drawn `size` inches wide."""

    def __init__(self, width: float, height: float, size: float | None) -> None:
        self.width, self.height, self.scale = width, height, (size or width) / width
        measures = (width * self.scale, height * self.scale)
        self.figure = plot_module("matplotlib.figure").Figure(measures, dpi=_DPI, facecolor="white", layout="none")
        self._inches = plot_module("matplotlib.transforms").Affine2D().scale(self.scale) + self.figure.dpi_scale_trans
        self._box = plot_module("matplotlib.patches").FancyBboxPatch

    def write(self, font: Font, x: float, y: float, words: str, color: str, align: str = "left") -> None:
        properties = font.properties.copy()
        properties.set_size(font.em * 72 * self.scale)
        style = {"color": color, "ha": align, "va": "baseline", "parse_math": False, "usetex": False}
        self.figure.text(x, y, words, fontproperties=properties, transform=self._inches, **style)

    def fill(self, x: float, y: float, width: float, height: float, color: Any, corner: float = 0.0) -> None:
        box = self._box((x, y), width, height, f"round,pad=0,rounding_size={corner}")
        box.set(facecolor=color, edgecolor="none", transform=self._inches, zorder=0)
        self.figure.add_artist(box)

    def paragraph(self, font: Font, paragraph: Paragraph, top: float) -> None:
        """Lines of text downwards from `top`, over the tint of what is marked in them."""
        for line, left, right, strength in paragraph.tints:
            pad, y = 0.06 * font.em, top - font.em * (1.27 + _LEADING * line)
            self.fill(_MARGIN + left - pad, y, right - left + 2 * pad, 1.24 * font.em, _tint(strength), 0.2 * font.em)
        for line, x, words in paragraph.words:
            self.write(font, _MARGIN + x, top - font.em * (1 + _LEADING * line), words, _INK)

    def panel(self, left: float, bottom: float, shown: Any, mask: Tensor) -> None:
        """The picture, the kept regions of `mask` (rows, columns) outlined, and the kept share as a bar below."""
        rows, columns = mask.shape
        height = _PANEL * rows / columns
        place = (left / self.width, bottom / self.height, _PANEL / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        axes.imshow(shown, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
        if not mask.all():
            lines = plot_module("matplotlib.collections").LineCollection(
                _outline(mask.tolist()), snap=True, clip_on=False
            )
            lines.set(color="white", linewidth=0.9 * self.scale, capstyle="projecting")
            axes.add_collection(lines, autolim=False)
        self.fill(left, bottom - 0.1, _PANEL, 0.045, _FAINT)
        self.fill(left, bottom - 0.1, _PANEL * float(mask.float().mean()), 0.045, _ACCENT)

    def legend(self, font: Font, right: float, bottom: float, ends: tuple[str, str]) -> None:
        """From the palest to the deepest tint, with what these stand for at the two ends."""
        self.write(font, right, bottom, ends[1], _MUTED, "right")
        right -= font.width(ends[1]) + 0.08
        for step in range(5):
            self.fill(right - 0.13 * (5 - step), bottom - 0.02, 0.13, 0.14, _tint(step / 4))
        self.write(font, right - 5 * 0.13 - 0.08, bottom, ends[0], _MUTED, "right")


def _tint(strength: float) -> list[float]:
    return [pale + (deep - pale) * strength for pale, deep in zip(*_TINTS, strict=True)]


def _outline(mask: list[list[bool]]) -> list[list[tuple[int, int]]]:
    """Where a True cell of a mask meets a False one or the rim: straight segments, in cells, as long as can be."""
    segments = []
    for upright, cells in ((False, mask), (True, [list(column) for column in zip(*mask, strict=True)])):
        rim = [False] * len(cells[0])
        for y, (above, below) in enumerate(pairwise([rim, *cells, rim])):
            edges = [False, *(a != b for a, b in zip(above, below, strict=True)), False]
            turns = [x for x, (a, b) in enumerate(pairwise(edges)) if a != b]
            for ends in zip(turns[::2], turns[1::2], strict=True):
                segments.append([(y, x) if upright else (x, y) for x in ends])
    return segments


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
