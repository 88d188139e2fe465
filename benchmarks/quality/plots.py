"""The paper's Fig. 3 and 4: accuracy against visual tokens and against computation."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modeling_ivtp.evaluation.intervals import LEVEL

_INK, _MUTED, _FAINT = "#1c2128", "#656d76", "#e7e9ec"
# Okabe and Ito's colours, which every kind of colour vision tells apart.
_COLOURS = {
    "ivtp-extended": _INK,
    "ivtp": "#d55e00",
    "ivtp-v": "#e69f00",
    "cls-topk": "#0072b2",
    "cls-topk-all-layers": "#56b4e9",
    "random": "#8c959f",
    "oracle": "#009e73",
    "ivtp (retrained)": "#cc79a7",
}
_BESIDE = {"random": 1.2, "ivtp": 1.6, "ivtp-extended": 1.6}
"""The methods in every system's panel, with the width of their lines."""
_TOUCHING = 1.3
"""Factor below which the labels of two ticks on a logarithmic axis touch."""

MAIN = tuple(_COLOURS)
"""The methods of the main comparison; all others are systems beside them."""

Row = Mapping[str, Any]


def label(row: Row) -> str:
    """Return the name of a row: its method, and the mode if that is not inference."""
    return row["method"] if row["mode"] == "inference" else f"{row['method']} ({row['mode']})"


def unpruned_of(rows: Sequence[Row]) -> Row | None:
    """Find the row that the others are measured against."""
    return next((row for row in rows if row["method"] == "unpruned" and row["mode"] == "inference"), None)


def flops_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """Return a unit in which the rows' computation reads well, and how many of it make one TFLOP."""
    return ("GFLOPs", 1e3) if max((row["tflops"] for row in rows), default=1.0) < 0.5 else ("TFLOPs", 1.0)


def place_of(axis: str, rows: Sequence[Row]) -> Callable[[Row], float]:
    """Return the function that places a row on an axis.

    Raises
    ------
    ValueError
        If the axis is neither "tokens" nor "tflops".
    """
    if axis not in ("tokens", "tflops"):
        raise ValueError(f"axis={axis!r}; allowed: tokens, tflops.")
    _, per_tflop = flops_unit(rows)
    return lambda row: row["visual_tokens"] if axis == "tokens" else row["tflops"] * per_tflop


def apart(values: Sequence[float], factor: float = _TOUCHING) -> list[float]:
    """Leave out values that lie within a factor of the next larger one that stays, so that no labels touch."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if not kept or kept[-1] / value >= factor:
            kept.append(value)
    return kept[::-1]


def plot_systems(results: Mapping[str, Any], axis: str) -> Any:
    """Draw a panel for every system, beside IVTP, extended and random: a matplotlib Figure; None without systems.

    Parameters
    ----------
    results : mapping
    axis : {"tokens", "tflops"}
    """
    from matplotlib.figure import Figure

    main = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    place = place_of(axis, main)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in main:
        lines[row["method"]].append((place(row), row["accuracy"]))
    systems = [name for name in lines if name not in (*_COLOURS, "unpruned", "blind")]
    if not systems:
        return None
    columns = 4
    rows = -(-len(systems) // columns)
    figure = Figure(figsize=(10, 0.9 + 2.0 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every = sorted({x for name in (*systems, *_BESIDE) for x, _ in lines[name]})
    ticks = apart(every, 1.4) if axis == "tokens" else [x for x in (2, 3, 4, 6, 8, 12) if every[0] <= x <= every[-1]]
    for number, axes in enumerate(grid.flat):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(colors=_MUTED, length=0, labelsize=8)
        if number >= len(systems):
            axes.set_visible(False)
            continue
        _draw_system(axes, systems[number], lines)
        _scale_panel(axes, every, ticks)
        # The last panel of a column carries its numbers, even where the row below is not full.
        axes.tick_params(labelbottom=number + columns >= len(systems))
    unit = flops_unit(main)[0]
    what = "visual tokens of one image, in the end" if axis == "tokens" else f"{unit} of one question"
    figure.suptitle(
        f"Accuracy of every system (blue) against {what}\n"
        "beside IVTP (orange), extended (black), random (grey) and unpruned (dashed)",
        x=0.01, ha="left", fontsize=11, color=_INK,
    )  # fmt: skip
    return figure


def _draw_system(axes: Any, name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw a system's line and those it is compared with."""
    if lines["unpruned"]:
        axes.axhline(lines["unpruned"][0][1], color=_INK, lw=0.8, ls=(0, (5, 3)))
    for other, width in _BESIDE.items():
        if lines[other]:
            axes.plot(*zip(*sorted(lines[other]), strict=True), color=_COLOURS[other], lw=width, alpha=0.9)
    axes.plot(*zip(*sorted(lines[name]), strict=True), color="#0072b2", lw=2.0, marker="o", ms=4, zorder=4)
    axes.set_title(name, loc="left", fontsize=10, color=_INK, fontweight="bold", pad=4)


def _scale_panel(axes: Any, every: Sequence[float], ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter

    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    axes.set_xlim(every[0] * 0.92, every[-1] * 1.08)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.2, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def tokens_of_pictures(kept: Mapping[str, Sequence[int]], patches: int, layers: int) -> list[float]:
    """Return how many visual tokens a decoder layer gets of each picture, averaged over all layers.

    Parameters
    ----------
    kept : mapping
        Tokens that stay of each picture after a layer, by its number as a string, from 0 on.
    patches, layers : int
        Of a whole picture, and of the decoder.
    """
    tops = sorted(map(int, kept))
    spans = [after - top for top, after in zip(tops, [*tops[1:], layers - 1], strict=True)]
    counts = zip(*(kept[str(top)] for top in tops), strict=True)
    whole = patches * (tops[0] + 1)
    return [(whole + sum(n * span for n, span in zip(own, spans, strict=True))) / layers for own in counts]


def plot_kept(rows: Sequence[Row], types: Sequence[str], patches: int, layers: int) -> Any:
    """Draw how many tokens adaptive systems keep of a picture, by the type of the question: a matplotlib Figure.

    Parameters
    ----------
    rows : sequence of mapping
        Those without tokens of single pictures (`kept`) are left out; if there are no others, the figure is None.
    types : sequence of str
        The type of each question, of which each has one picture.
    patches, layers : int
        As in `tokens_of_pictures`.
    """
    from matplotlib.figure import Figure

    adaptive = [row for row in rows if row.get("kept")]
    if not adaptive:
        return None
    kinds = list(dict.fromkeys(types))
    figure = Figure(
        figsize=(1.6 + 3.8 * len(adaptive), 1.4 + 0.32 * len(kinds)), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(1, len(adaptive), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, adaptive, strict=True):
        tokens = tokens_of_pictures(row["kept"], patches, layers)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_MUTED)
        axes.tick_params(colors=_MUTED, length=0, labelsize=9)
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.axvline(sum(tokens) / len(tokens), color=_MUTED, lw=1.0, ls=(0, (5, 3)))
        for place, kind in enumerate(reversed(kinds)):
            own = [n for n, of in zip(tokens, types, strict=False) if of == kind]
            axes.plot(own, [place] * len(own), marker="|", ms=9, mew=1.0, lw=0, color="#0072b2", alpha=0.45)
            axes.plot(sum(own) / len(own), place, marker="o", ms=6, color=_INK, zorder=4)
        axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in reversed(kinds)])
        axes.set_ylim(-0.6, len(kinds) - 0.4)
        axes.set_title(row["method"], loc="left", fontsize=10, color=_INK, fontweight="bold", pad=6)
        axes.set_xlabel("visual tokens of a picture, averaged over layers", color=_MUTED, fontsize=9)
    figure.suptitle(
        "Visual tokens by type of question\npictures (lines), their mean (dot), the mean of all (dashed)",
        x=0.01, ha="left", fontsize=10, color=_MUTED,
    )  # fmt: skip
    return figure


def plot(results: Mapping[str, Any], axis: str) -> Any:
    """Draw accuracy against visual tokens or TFLOPs, one line per method with its interval: a matplotlib Figure.

    Parameters
    ----------
    results : mapping
    axis : {"tokens", "tflops"}

    Raises
    ------
    ValueError
        For another axis.
    """
    from matplotlib.figure import Figure

    main = [row for row in results["rows"] if not row["table"] and row["method"] in (*_COLOURS, "unpruned", "blind")]
    place = place_of(axis, main)
    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, length=0, labelsize=10)
    axes.grid(axis="y", color=_FAINT, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xscale("log", base=2 if axis == "tokens" else 10)
    ends = _draw_methods(axes, main, place)
    _scale(axes, axis, main, place, longest=max((len(name) for _, _, name, _ in ends), default=0))
    _draw_bounds(axes, main, place)
    _label_ends(axes, ends)
    axes.set_xlabel(
        "visual tokens of one image, in the end"
        if axis == "tokens"
        else f"{flops_unit(main)[0]} of one question, both towers and decoder",
        color=_MUTED,
    )
    axes.set_title(
        "Accuracy against " + ("visual tokens" if axis == "tokens" else "computation"),
        loc="left", color=_INK, fontsize=14, fontweight="bold", pad=26,
    )  # fmt: skip
    asked = results["questions"]
    number = sum(asked["types"][kind] for kind in asked["headline"])
    subtitle = f"{number:,} held-out questions; logarithmic scale; bands are {LEVEL:.0%} intervals"
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, color=_MUTED, fontsize=10)
    return figure


def _draw_methods(axes: Any, main: Sequence[Row], place: Callable[[Row], float]) -> list[tuple[float, float, str, str]]:
    """Draw the line and the interval of every method, and return their left ends: x, y, name and colour."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in main:
        if row["method"] not in ("unpruned", "blind"):
            lines[label(row)].append(row)
    ends = []
    for name, points in lines.items():
        points = sorted(points, key=place)
        colour, bold = _COLOURS[name], _is_bold(name)
        x = [place(row) for row in points]
        y = [row["accuracy"] for row in points]
        lows, highs = ([row["interval"][end] for row in points] for end in (0, 1))
        axes.fill_between(x, lows, highs, color=colour, alpha=0.13, lw=0)
        axes.plot(x, y, color=colour, lw=2.6 if bold else 1.8, marker="o", ms=6 if bold else 4.5, zorder=3 + bold)
        ends.append((x[0], y[0], name, colour))
    return ends


def _is_bold(name: str) -> bool:
    return name.startswith("ivtp") and name != "ivtp-v"


def _draw_bounds(axes: Any, main: Sequence[Row], place: Callable[[Row], float]) -> None:
    """Draw what bounds the methods: the unpruned model with its interval above, the blind one below."""
    unpruned, blind = unpruned_of(main), next((row for row in main if row["method"] == "blind"), None)
    right = max(map(place, main), default=2)
    if unpruned is not None:
        axes.axhspan(*unpruned["interval"], color=_INK, alpha=0.07, lw=0)
        axes.axhline(unpruned["accuracy"], color=_INK, lw=1.2, ls=(0, (5, 3)))
        axes.plot(place(unpruned), unpruned["accuracy"], marker="D", ms=7, color=_INK, zorder=5)
    if blind is not None:
        axes.axhline(blind["accuracy"], color=_MUTED, lw=1.2, ls=(0, (1, 2)))
    for row, name, offset, colour in ((unpruned, "unpruned", (-10, 7), _INK), (blind, "blind", (0, 6), _MUTED)):
        if row is not None:
            axes.annotate(
                name,
                (right, row["accuracy"]),
                offset,
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=10,
            )


def _scale(axes: Any, axis: str, main: Sequence[Row], place: Callable[[Row], float], longest: int) -> None:
    """Set limits and ticks, with room on the left for names of up to `longest` letters."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    every = sorted({place(row) for row in main})
    low, high = (min(every), max(every)) if every else (1, 2)
    span = max(high / low, 1.01)
    axes.set_xlim(low / span ** (0.08 + 0.011 * longest), high * span**0.04)
    if axis == "tokens":
        ticks = apart(every)
    else:
        ticks = [
            tick
            for power in range(-6, 5)
            for step in (1, 1.5, 2, 3, 5, 7)
            if low <= (tick := step * 10.0**power) <= high
        ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    bottom = min([row["interval"][0] for row in main], default=0.0)
    axes.set_ylim(max(0.0, bottom - 0.05), 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each method's name left of its line, moved up or down where names would touch."""
    bottom, top = axes.get_ylim()
    gap = 0.048 * (top - bottom)
    heights: list[float] = []
    for _, y, _, _ in sorted(ends, key=lambda end: end[1]):
        heights.append(max([y, *(height + gap for height in heights[-1:])]))
    over = heights[-1] - (top - gap / 2) if heights else 0.0
    for place in range(len(heights) - 1, -1, -1):
        if over <= 0:
            break
        heights[place] = min(heights[place], (heights[place + 1] - gap) if place + 1 < len(heights) else top - gap / 2)
    for (x, y, name, colour), height in zip(sorted(ends, key=lambda end: end[1]), heights, strict=True):
        axes.annotate(
            name, (x, y), (axes.get_xlim()[0], height), textcoords="data", color=colour, fontsize=10.5, va="center",
            fontweight="bold" if _is_bold(name) else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=6,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.5, "shrinkB": 5},
        )  # fmt: skip
