"""The paper's Fig. 3 and 4: accuracy against visual tokens and against computation."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.intervals import LEVEL

_INK, _MUTED, _FAINT = "#1c2128", "#656d76", "#e7e9ec"
# Okabe and Ito's colours, which stay apart for every kind of colour vision.
_COLOURS = {
    "ivtp": "#d55e00",
    "ivtp-v": "#e69f00",
    "cls-topk": "#0072b2",
    "random": "#8c959f",
    "oracle": "#009e73",
    "ivtp (retrained)": "#cc79a7",
}
_OTHERS = ("#56b4e9", "#7c5cbf", "#5f6b2d", "#a0522d")


def label(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    return row["method"] if row["mode"] == "inference" else f"{row['method']} ({row['mode']})"


def unpruned_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that the others are measured against."""
    return next((row for row in rows if row["method"] == "unpruned" and row["mode"] == "inference"), None)


def flops_unit(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """A unit in which computation reads well, and how many of it are one TFLOP."""
    return ("GFLOPs", 1e3) if max((row["tflops"] for row in rows), default=1.0) < 0.5 else ("TFLOPs", 1.0)


def plot(results: Mapping[str, Any], axis: str) -> Any:
    """Accuracy against visual tokens or TFLOPs, one line per method with its interval: a matplotlib Figure.

    Parameters
    ----------
    results : mapping
    axis : {"tokens", "tflops"}

    Raises
    ------
    ValueError
        For another axis.
    """
    if axis not in ("tokens", "tflops"):
        raise ValueError(f"axis={axis!r}; allowed: tokens, tflops.")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    main = [row for row in results["rows"] if not row["table"]]
    unit, per_tflop = flops_unit(main)

    def at(row: Mapping[str, Any]) -> float:
        return row["visual_tokens"] if axis == "tokens" else row["tflops"] * per_tflop

    lines: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in main:
        if row["method"] not in ("unpruned", "blind"):
            lines[label(row)].append(row)
    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, length=0, labelsize=10)
    axes.grid(axis="y", color=_FAINT, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xscale("log", base=2 if axis == "tokens" else 10)
    ends: list[tuple[float, float, str, str]] = []
    spare = iter(_OTHERS * len(lines))
    for name, points in lines.items():
        points = sorted(points, key=at)
        colour = _COLOURS.get(name) or next(spare)
        x = [at(row) for row in points]
        y = [row["accuracy"] for row in points]
        lows, highs = ([row["interval"][end] for row in points] for end in (0, 1))
        axes.fill_between(x, lows, highs, color=colour, alpha=0.13, lw=0)
        bold = name.startswith("ivtp") and name != "ivtp-v"
        axes.plot(x, y, color=colour, lw=2.6 if bold else 1.8, marker="o", ms=6 if bold else 4.5, zorder=3 + bold)
        ends.append((x[0], y[0], name, colour))
    unpruned = unpruned_of(main)
    blind = next((row for row in main if row["method"] == "blind"), None)
    if unpruned is not None:
        axes.axhspan(*unpruned["interval"], color=_INK, alpha=0.07, lw=0)
        axes.axhline(unpruned["accuracy"], color=_INK, lw=1.2, ls=(0, (5, 3)))
        axes.plot(at(unpruned), unpruned["accuracy"], marker="D", ms=7, color=_INK, zorder=5)
    if blind is not None:
        axes.axhline(blind["accuracy"], color=_MUTED, lw=1.2, ls=(0, (1, 2)))
    every = sorted({at(row) for row in main})
    low, high = (min(every), max(every)) if every else (1, 2)
    span = max(high / low, 1.01)
    axes.set_xlim(low / span ** (0.08 + 0.011 * max(map(len, lines), default=0)), high * span**0.04)
    if unpruned is not None:
        axes.annotate(
            "unpruned",
            (high, unpruned["accuracy"]),
            (-10, 7),
            textcoords="offset points",
            ha="right",
            color=_INK,
            fontsize=10,
        )
    if blind is not None:
        axes.annotate(
            "blind",
            (high, blind["accuracy"]),
            (0, 6),
            textcoords="offset points",
            ha="right",
            color=_MUTED,
            fontsize=10,
        )
    if axis == "tokens":
        axes.set_xticks(every, [str(k) for k in every])
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
    _label_ends(axes, ends)
    axes.set_xlabel(
        "visual tokens of one image, in the end"
        if axis == "tokens"
        else f"{unit} of one question, both towers and decoder",
        color=_MUTED,
    )
    axes.set_title(
        "Accuracy against " + ("visual tokens" if axis == "tokens" else "computation"),
        loc="left", color=_INK, fontsize=14, fontweight="bold", pad=26,
    )  # fmt: skip
    asked = results["questions"]
    number = sum(asked["types"][kind] for kind in asked["headline"])
    said = f"{number:,} held-out questions; logarithmic scale; bands are {LEVEL:.0%} intervals"
    axes.text(0, 1.03, said, transform=axes.transAxes, color=_MUTED, fontsize=10)
    return figure


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
            fontweight="bold" if name.startswith("ivtp") and name != "ivtp-v" else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=6,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.5, "shrinkB": 5},
        )  # fmt: skip
