"""The picture of a trace: what one image lost on its way, under the instruction (Fig. 5 of IVTP, ECCV 2024)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .trace_picture import dim, plot_module
from .trace_type import Font, Paragraph
from .trace_words import MarkedText

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
