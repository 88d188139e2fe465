"""The figure of a trace (Fig. 5 of IVTP): the picture, the words of the instruction, and the page they share.

matplotlib is imported when a figure is drawn, so that a checkpoint's code loads without it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .spelling import spell

if TYPE_CHECKING:
    try:  # an unguarded import, even this one, would count among what a checkpoint's code requires
        from matplotlib.figure import Figure
    except ImportError:
        raise

# Lengths are in points, 72 to the inch; at 144 dots per inch a panel of 24 x 24 patches has 16 whole dots to a patch.
_DPI, _PANEL, _GAP, _MARGIN, _FOOT, _TEXT, _NOTE = 144, 192, 12, 20, 33, 17, 10.5
_COLUMNS, _LINES, _LEADING = 5, 4, 1.62  # panels in a row, lines of an instruction, line height in em
_INK, _MUTED, _FAINT, _ACCENT = "#1c2128", "#656d76", "#e7e9ec", "#f59e0b"
_TINTS = (1.0, 0.937, 0.776), (1.0, 0.729, 0.169)

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts written without spaces, as the inside of a regular expression's brackets: Thai to Khmer, kana, Han."""

_BREAKABLE = re.compile(rf"[{_UNSPACED}][、。！，：；？）」』】]*|[^\s{_UNSPACED}]+(?: ·)?")
"""A piece that a line may end after: one such character or a word, with the sign that follows it."""

_ASIAN_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans GB", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback"),
)

_Letter = tuple[str, float | None]
"""Text and the strength of its mark, 0 to 1; None without one."""


class Panel(NamedTuple):
    """One state of the image: what to call it, and its visual tokens as a mask (rows, columns) of patches."""

    label: str
    mask: Tensor


def plot_module(name: str) -> Any:
    """Import a module that only a figure needs.

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
    """Cut out what the grid covers: (rows * c, columns * c, 3) floats in 0 to 1, with c pixels to a patch's side.

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
    np, pil = plot_module("numpy"), plot_module("PIL.Image")
    picture, (rows, columns) = _as_rgb(image), grid
    cell = math.ceil(768 / max(grid))
    side = min(picture.width / columns, picture.height / rows)
    left, upper = (picture.width - side * columns) / 2, (picture.height - side * rows) / 2
    cut = (left, upper, left + side * columns, upper + side * rows)
    return np.asarray(picture.resize((columns * cell, rows * cell), pil.Resampling.LANCZOS, box=cut)) / 255


def _as_rgb(image: Any) -> Any:
    """Convert a picture in any of the allowed forms to a PIL.Image.Image."""
    np, pil, ops = plot_module("numpy"), plot_module("PIL.Image"), plot_module("PIL.ImageOps")
    if isinstance(image, str | os.PathLike):
        try:
            with pil.open(image) as file:
                return ops.exif_transpose(file).convert("RGB")
        except pil.UnidentifiedImageError as error:
            raise ValueError(f"image={os.fspath(image)!r} is not an image file") from error
    if isinstance(image, pil.Image):
        return image.convert("RGB")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image of type {type(image).__name__}: expected a PIL image, a NumPy array or a path")
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
    return pil.fromarray(np.round(colors * (255 / top)).astype(np.uint8))


def dim(picture: Any, mask: Tensor) -> Any:
    """Turn dropped patches grey and dark, but leave them legible.

    Parameters
    ----------
    picture : numpy.ndarray
        (rows * c, columns * c, 3) floats in 0 to 1, as `square` returns it.
    mask : Tensor
        (rows, columns) bool, on the CPU: the patches that were kept.
    """
    cell = picture.shape[0] // mask.shape[0]
    kept = mask.numpy().repeat(cell, 0).repeat(cell, 1)[..., None]
    grey = (picture @ [0.299, 0.587, 0.114])[..., None]
    return picture * kept + (0.38 * (0.82 * grey + 0.18 * picture) + 0.08) * ~kept


def as_image(picture: Any) -> Any:
    """Convert floats in 0 to 1 to a PIL.Image.Image."""
    return plot_module("PIL.Image").fromarray((picture * 255).round().astype("uint8"))


@dataclass(frozen=True)
class MarkedText:
    """The text that tokens spell, its key words marked by relevance (C_s, Eq. 7).

    Attributes
    ----------
    text : str
    strengths : tuple of float or None
        One per character: 1 for the most relevant key token, 0 for the least, 0.5 where all are alike or their
        relevance is not known, None where no token is key.
    low, high : float
        Relevance of the least and of the most relevant key token; nan where no relevance is known.
    """

    text: str
    strengths: tuple[float | None, ...]
    low: float = math.nan
    high: float = math.nan


def mark(tokens: Sequence[Any]) -> MarkedText:
    """Join a sequence of TokenTrace to the text they spell, with its key words marked by relevance."""
    text, owners = _characters(tokens)
    known = [token.relevance for token in tokens if token.is_key and math.isfinite(token.relevance)]
    low, high = min(known, default=math.nan), max(known, default=math.nan)

    def strength(token: Any) -> float:
        return (token.relevance - low) / (high - low) if high > low and math.isfinite(token.relevance) else 0.5

    strengths = ([strength(token) for token in owner if token.is_key] for owner in owners)
    return MarkedText(text, tuple(max(keys, default=None) for keys in strengths), low, high)


def key_words(tokens: Sequence[Any]) -> tuple[str, ...]:
    """List the words that hold a key token of a sequence of TokenTrace, in reading order.

    A word counts as a whole when any of its tokens is key; in scripts without spaces adjacent key characters are
    joined instead.
    """
    text, owners = _characters(tokens)
    key = [any(token.is_key for token in owner) for owner in owners]
    for word in re.finditer(rf"[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*", text):
        key[word.start() : word.end()] = [any(key[word.start() : word.end()])] * len(word[0])
    runs = "".join(letter if is_key else " " for letter, is_key in zip(text, key, strict=True)).split()
    return tuple(re.sub(r"^[^\w]+(?=\w)|(?<=\w)[^\w]+$", "", run) for run in runs)


def _characters(tokens: Sequence[Any]) -> tuple[str, list[list[Any]]]:
    """Spell the tokens and list, for each character, the tokens it came from.

    Tokens that are not neighbours in the prompt are set apart, and so are token numbers, `<id>`. Otherwise a space
    stands where the tokenizer put its mark: the first word of a line has none, however many tokens it is cut into.
    """
    text, ranges = spell([token.text for token in tokens])
    letters: list[tuple[str, list[Any]]] = [(letter, []) for letter in text]
    for token, (first, end) in zip(tokens, ranges, strict=True):
        for _, owners in letters[first:end]:
            owners.append(token)
    for place in range(len(tokens) - 1, 0, -1):
        token = tokens[place]
        if re.fullmatch(r"<-?\d+>", token.text) or token.position != tokens[place - 1].position + 1:
            letters.insert(ranges[place][0], (" ", []))
    return "".join(letter for letter, _ in letters), [owners for _, owners in letters]


def _letters(text: MarkedText, weight: str) -> tuple[list[str], list[_Letter]]:
    """Choose the fonts that matplotlib tries in turn, and replace by a box what none of them can draw."""
    manager, own = plot_module("matplotlib.font_manager"), plot_module("matplotlib").rcParams["font.family"]
    shown = [
        (" " if letter.isspace() else letter, strength)
        for letter, strength in zip(text.text, text.strengths, strict=True)
        if letter.isspace() or (letter.isprintable() and letter not in "\ufe0e\ufe0f")  # selectors of emoji
    ]
    families, drawable = list[str](), set[str]()
    wanted, installed = {letter for letter, _ in shown}, {font.name for font in manager.fontManager.ttflist}
    for name in (*own, *(name for name in _ASIAN_FONTS if name in installed)):
        if name in own or not wanted <= drawable:
            font = manager.get_font(manager.findfont(manager.FontProperties(family=name, weight=weight)))
            families.append(name)
            drawable |= {letter for letter in {*wanted, "□"} if font.get_char_index(ord(letter))}
    box = "□" if "□" in drawable else "?"
    return families, [(letter if letter in drawable else box, strength) for letter, strength in shown]


def _runs(line: Sequence[_Letter], points: float) -> list[tuple[float, str, float | None]]:
    """Split a line at spaces and where a mark begins or ends: the gap before in points, the text, its strength."""
    runs, gap = [], 0.0
    for (blank, marked), run in groupby(line, key=lambda letter: (letter[0] == " ", letter[1] is not None)):
        letters, strengths = zip(*run, strict=True)
        if not blank:
            runs.append((gap, "".join(letters), max(strengths) if marked else None))
        gap = (0.33 if blank else 0.08) * points
    return runs


def _lines(
    text: MarkedText, width: float, most: int, points: float, color: str = _INK, weight: str = "normal"
) -> list[Any]:
    """Set a text in boxes, at most `most` lines of `width` points; one that is longer ends with an ellipsis."""
    families, letters = _letters(text, weight)
    font = plot_module("matplotlib.font_manager").FontProperties(family=families, size=points, weight=weight)
    measure = plot_module("matplotlib.textpath").text_to_path.get_text_width_height_descent
    length = cache(lambda run: measure(run, font, False)[0])

    def fits(line: Sequence[_Letter]) -> bool:
        return sum(gap + length(run) for gap, run, _ in _runs(line, points)) <= width

    lines: list[slice] = []
    for piece in _BREAKABLE.finditer("".join(letter for letter, _ in letters)):
        if len(lines) > most:
            break
        step = len(piece[0]) if fits(letters[slice(*piece.span())]) else 1
        for end in range(piece.start() + step, piece.end() + 1, step):
            if lines and fits(letters[lines[-1].start : end]):
                lines[-1] = slice(lines[-1].start, end)
            else:
                lines.append(slice(end - step, end))
    shown = [letters[line] for line in lines[:most]]
    if len(lines) > most:
        while shown[-1] and not fits([*shown[-1], ("…", None)]):
            shown[-1].pop()
        shown[-1].append(("…", None))
    return [_line(_runs(line, points), font, color) for line in shown]


def _line(runs: Sequence[tuple[float, str, float | None]], font: Any, color: str) -> Any:
    """Pack the runs of a line into a box of `_LEADING` em, the marked ones on their tint."""
    box, height = plot_module("matplotlib.offsetbox"), _LEADING * font.get_size()
    row = [box.DrawingArea(0, height, 0, 0.38 * height)]  # holds every line of a text to one height
    for gap, text, strength in runs:
        style = {"fontproperties": font, "color": color, "parse_math": False, "usetex": False}
        if strength is not None:
            tint = [pale + (deep - pale) * strength for pale, deep in zip(*_TINTS, strict=True)]
            style |= {"color": _INK, "bbox": {"boxstyle": _highlight, "facecolor": tint, "linewidth": 0}}
        row += [box.DrawingArea(gap, 0), box.TextArea(text, textprops=style)]
    return box.HPacker(children=row, align="baseline", pad=0, sep=0)


def _highlight(left: float, bottom: float, width: float, height: float, em: float) -> Any:
    """Outline a tint: more room above the words than below, where only some letters reach."""
    box = plot_module("matplotlib.patches").BoxStyle.Round(pad=0, rounding_size=0.2)
    return box(left - 0.08 * em, bottom - 0.02 * em, width + 0.16 * em, height + 0.18 * em, em)


def _text(*pieces: _Letter) -> MarkedText:
    """Join pieces, each of one strength, to a text."""
    return MarkedText("".join(text for text, _ in pieces), tuple(mark for text, mark in pieces for _ in text))


def draw(
    picture: Any,
    panels: Sequence[Panel],
    instruction: MarkedText,
    caption: Sequence[str],
    title: str | None = None,
    size: float | None = None,
) -> Figure:
    """Draw a page: title, instruction, panels and caption below each other.

    Parameters
    ----------
    picture : numpy.ndarray
        (rows * c, columns * c, 3) floats in 0 to 1, as `square` returns it.
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
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = math.ceil(len(panels) / rows)
    unit = size * 72 / (columns * (_PANEL + _GAP) - _GAP + 2 * _MARGIN) if size else 1.0
    side, gap, margin, foot = (unit * length for length in (_PANEL, _GAP, _MARGIN, _FOOT))
    block, tall = columns * (side + gap) - gap, side * panels[0].mask.shape[0] / panels[0].mask.shape[1]
    low, high = instruction.low, instruction.high
    scale = [(" · relevance ", None), (f"{low:.2f}", 0.0), (" to ", None), (f"{high:.2f}", 1.0)]
    facts = _text((" · ".join(caption), None), *scale[: 4 * (high > low)])
    head = _lines(_text((title or "", None)), block, 2, unit * _TEXT, weight="bold")
    head += _lines(instruction, block, _LINES, unit * _TEXT)
    notes = _lines(facts, block, 9, unit * _NOTE, _MUTED)

    top = margin + unit * (_LEADING * _TEXT * len(head) + (12 if head else 0))
    width, height = block + 2 * margin, top + rows * (tall + foot) + unit * (_LEADING * _NOTE * len(notes) + 6) + margin
    inches = (size or width / 72, height / 72)
    figure = plot_module("matplotlib.figure").Figure(inches, dpi=_DPI, facecolor="white", layout="none")
    box = plot_module("matplotlib.offsetbox")
    for lines, y, align in ((head, height - margin, 1), (notes, margin - 6 * unit, 0)):
        if lines:
            column = box.VPacker(children=lines, align="left", pad=0, sep=0)
            style = {"xycoords": "figure points", "box_alignment": (0, align), "frameon": False, "pad": 0}
            figure.add_artist(box.AnnotationBbox(column, (margin, y), **style))
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left, bottom = margin + column * (side + gap), height - top - row * (tall + foot) - tall
        axes = figure.add_axes((left / width, bottom / height, side / width, tall / height))
        _draw_panel(axes, dim(picture, panel.mask), panel, unit)
    # IPython knows figures only once pyplot is imported, which a plot should not need
    figure._repr_png_ = partial(_png, figure)
    return figure


def _draw_panel(axes: Any, shown: Any, panel: Panel, unit: float) -> None:
    """Show a picture with its kept regions outlined; below it the kept share as a bar, the number and the label."""
    collections, patches = plot_module("matplotlib.collections"), plot_module("matplotlib.patches")
    (rows, columns), mask = panel.mask.shape, panel.mask
    axes.set_axis_off()
    axes.imshow(shown, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
    axes.autoscale(False)
    if not mask.all():
        style = {"color": "white", "linewidth": 0.9 * unit, "capstyle": "projecting", "snap": True, "clip_on": False}
        axes.add_collection(collections.LineCollection(_outline(mask.tolist()), **style))
    for share, color in ((1.0, _FAINT), (float(mask.float().mean()), _ACCENT)):
        bar = patches.Rectangle((0, rows + 0.02 * columns), share * columns, 0.017 * columns, color=color, linewidth=0)
        axes.add_patch(bar).set_clip_on(False)
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "usetex": False}
    number = {"color": _INK, "size": 15 * unit, "weight": "bold"} | place
    axes.annotate(str(int(mask.sum())), (0, 0), (0, -23 * unit), **number)
    axes.annotate(panel.label, (1, 0), (0, -23 * unit), color=_MUTED, size=10.5 * unit, ha="right", **place)


def _outline(mask: list[list[bool]]) -> list[list[tuple[int, int]]]:
    """Find where a True cell meets a False one or the rim: straight segments, in cells, as long as can be."""
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
    """Render a figure for a notebook."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
