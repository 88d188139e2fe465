"""The report of a speed benchmark: JSON for the record, a page with tables, a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.sizes import human_bytes
from ..files.tables import markdown_table
from .timing import FEWEST

_INK, _MUTED, _FAINT = "#1c2128", "#656d76", "#e7e9ec"
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#5f6b2d", "#7c5cbf")
_MARKS = ("o", "s", "^", "D", "v", "P")


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page with the tables."""
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# Speed, {results['shape']}, {results['date']}\n",
        f"{machine['device']}, {machine['threads']} of {machine['cpus']} CPUs' threads; {versions}; "
        f"{settings['dtype']}, {settings['attention']} in all arms{_graphs(settings)}; "
        f"answers of {settings['new_tokens']} tokens; "
        f"medians of {settings['repeats']} interleaved runs, each paired with stock's; "
        f"{interval(settings['repeats'])}.\n",
        f"`{results['command']}`\n",
        "## Speed-up over stock LLaVA\n",
        markdown_table(
            ("arm", "batch", "text", "prefill", "implied", "reached", "products", "decode per token", "end to end",
             "tower"),
            [
                (row["arm"], row["batch"], row["text_tokens"], times(row["prefill"]), f"{row['implied']:.2f}",
                 reached(row, results["rows"]), products(row),
                 *(times(row[part]) for part in ("decode", "end_to_end", "tower")))
                for row in results["rows"] if row["arm"] != "stock"
            ],
        ),
        "Implied: the speed-up that the prefill's FLOPs imply; reached: the measured share of it, for arms with "
        "+graphs against stock+graphs, for all others against stock, whose prompts are launched; products: how many "
        "times as fast as stock's the arm's matrix products are by themselves.\n",
        *(f"{note}\n" for note in results.get("notes", ())),
        "## Costs\n",
        markdown_table(
            ("arm", "batch", "text", "final tokens", "layer-averaged", "tower, ms", "prefill, ms", "choosing", "words",
             "decode, ms", "end to end, s", "KV cache", "peak memory"),
            [
                (row["arm"], row["batch"], row["text_tokens"], row["final_tokens"],
                 f"{row['layer_averaged_tokens']:.1f}", *(_spread(row[part]) for part in ("tower", "prefill")),
                 *("" if row[share] is None else f"{row[share]:.1%}" for share in ("selection_share", "words_share")),
                 _spread(row["decode"]),
                 f"{row['end_to_end']['seconds']:.2f}", human_bytes(row["kv_bytes"]),
                 "" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"]))
                for row in results["rows"]
            ],
        ),
        f"Choosing: the share of the prefill that scoring and selecting take, {_in_layers(results)}; words: the share "
        "of CLIP's text tower, which reads the instruction anew in every run here; both for a prefill that is "
        "launched, not replayed. Peak memory: on a GPU, beside the weights.\n",
    ]  # fmt: skip
    if results["growth"]:
        lines += [
            "## Growth\n",
            "Prefill time as a line over the FLOPs of an arm's cases: fixed time, rate, and how far the cases lie from "
            "the line.\n",
            markdown_table(
                ("arm", "fixed, ms", "TFLOP/s", "cases", "furthest below", "furthest above", "typical distance"),
                [_line(fit) for fit in results["growth"]],
            ),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(fit: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a row of the growth table."""
    shares = [case["share"] for case in fit["residuals"]]
    rate = "" if fit["rate"] is None else f"{fit['rate']:.3g}"
    typical = sorted(map(abs, shares))[len(shares) // 2]
    fixed = f"{1000 * fit['fixed']:.1f}"
    return fit["arm"], fixed, rate, len(shares), f"{min(shares):+.1%}", f"{max(shares):+.1%}", f"{typical:.1%}"


def _in_layers(results: Mapping[str, Any]) -> str:
    """Say whether the layers' own work for choosing was counted; earlier versions left it out."""
    counted = all(row.get("in_layers") for row in results["rows"])
    return f"with{'' if counted else 'out'} the work that layers do for it alone"


def _graphs(settings: Mapping[str, Any]) -> str:
    return ", all compiled, with static caches" if settings["compiled"] else ""


def reached(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of the implied speed-up that was measured, in %; "" where none is implied.

    An arm with graphs is compared with stock with graphs, if `rows` has it: pruning implies no gain from graphs.
    """
    if row["implied"] < 1.005:
        return ""
    gained = row["prefill"]["speed_up"][0]
    same = ("batch", "text_tokens")
    for other in rows:
        if row["arm"].endswith("+graphs") and other["arm"] == "stock+graphs" and all(row[n] == other[n] for n in same):
            gained = other["prefill"]["seconds"] / row["prefill"]["seconds"]
    return f"{gained / row['implied']:.0%}"


def products(row: Mapping[str, Any]) -> str:
    """Return the speed-up of the matrix products alone; "" where it was not measured or nothing was pruned."""
    measured = row.get("products")
    return "" if measured is None or row["implied"] < 1.005 else f"{measured['speed_up'][0]:.2f}"


def interval(repeats: int) -> str:
    """Say which interval stands in brackets after a ratio."""
    return "95% bootstrap intervals" if repeats >= FEWEST else "the range of all pairs in brackets"


def times(part: Mapping[str, Any]) -> str:
    """Format a speed-up with its interval."""
    value, low, high = part["speed_up"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _spread(part: Mapping[str, Any]) -> str:
    low, high = (1000 * value for value in part["quartiles"])
    return f"{1000 * part['seconds']:.1f} ({low:.1f} to {high:.1f})"


def plot(results: Mapping[str, Any]) -> Any:
    """Plot prefill and end-to-end speed-ups against batch, or against text tokens for every batch: a Figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows = [row for row in results["rows"] if row["arm"] != "stock"]
    axis, other = (
        ("text_tokens", "batch") if len({row["text_tokens"] for row in rows}) > 1 else ("batch", "text_tokens")
    )
    several = len({row[other] for row in rows}) > 1
    series = list(dict.fromkeys((row["arm"], row[other]) for row in rows))
    figure = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("Prefill", f"End to end, {results['settings']['new_tokens']} tokens")
    for axes, part, title in zip(panels, ("prefill", "end_to_end"), titles, strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_MUTED)
        axes.tick_params(colors=_MUTED, length=0)
        axes.grid(axis="y", color=_FAINT)
        axes.set_axisbelow(True)
        axes.axhline(1, color=_INK, lw=1, ls=(0, (5, 3)))
        axes.set_xscale("log", base=2)
        for number, (arm, held) in enumerate(series):
            points = sorted((row for row in rows if (row["arm"], row[other]) == (arm, held)), key=lambda row: row[axis])
            alone = len(points) == 1  # a single point shows neither line nor area, and stands beside the others
            aside = 2 ** (0.1 * (number - (len(series) - 1) / 2)) if alone else 1
            x, colour = [aside * row[axis] for row in points], _COLOURS[number % len(_COLOURS)]
            mark = _MARKS[number // len(_COLOURS) % len(_MARKS)]
            y, low, high = zip(*(row[part]["speed_up"] for row in points), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            if alone:
                axes.plot([*x, *x], [*low, *high], color=colour, alpha=0.4, lw=5, solid_capstyle="butt")
            axes.plot(x, y, color=colour, marker=mark, ms=4, lw=2, label=f"{arm}, batch {held}" if several else arm)
            if part == "prefill":
                implied = [row["implied"] for row in points]
                axes.plot(x, implied, color=colour, lw=1, ls=":", marker="_" if alone else None, ms=16)
        every = sorted({row[axis] for row in rows})
        axes.set_xticks(every, [str(value) for value in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(axis.replace("_", " "), color=_MUTED)
        axes.set_title(title, loc="left", color=_INK, fontweight="bold")
    panels[0].set_ylabel("times as fast as stock", color=_MUTED)
    # Beside the panels, where it covers no curve.
    panels[1].legend(frameon=False, labelcolor=_INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(
        f"{results['shape']}, {results['machine']['device']}; dotted or dash: what FLOPs imply",
        x=0.01, ha="left", fontsize=10, color=_MUTED,
    )  # fmt: skip
    return figure


def name_of(results: Mapping[str, Any]) -> str:
    """Return the name of results without their date: speed-SHAPE-DTYPE, then `compiled` and the label, if any."""
    settings = results["settings"]
    parts = [
        "speed",
        results["shape"],
        settings["dtype"],
        "compiled" if settings["compiled"] else "",
        settings["label"],
    ]
    return "-".join(part for part in parts if part)


def write(results: Mapping[str, Any], out: Path, file: Path | None = None) -> Path:
    """Write JSON, page and plot into a folder, and return the JSON's path.

    Parameters
    ----------
    results : mapping
    out : Path
    file : Path, optional
        The file of an earlier part of the same run, which is replaced. Other results are never overwritten.
    """
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while file is None:
        stem = f"{name_of(results)}-{results['date']}{'' if number == 1 else f'-{number}'}"
        free = out / f"{stem}.json"
        file = None if free.exists() else free
        number += 1
    saves: dict[str, Callable[[Path], Any]] = {
        ".png": lambda part: plot(results).savefig(part, dpi=144),
        ".md": lambda part: part.write_text(markdown(results)),
        ".json": lambda part: part.write_text(json.dumps(results, indent=1) + "\n"),
    }
    for suffix, save in saves.items():
        part = file.with_suffix(f".part{suffix}")
        save(part)
        part.replace(file.with_suffix(suffix))
    return file
