"""Tables in the paper's shape: all systems at one budget (Table 1), and what the decoder's stage adds (Table 7)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.methods import ADAPTIVE, COMPACT
from benchmarks.quality.plots import flops_unit, label
from modeling_ivtp.evaluation.intervals import paired_interval
from modeling_ivtp.files.tables import markdown_table

STAGES = (("topk", "topk+"), ("tome", "tome+"), ("ivtp-v", "ivtp"))
"""Systems in the vision tower alone, each with the one that continues it in the decoder."""

Row = Mapping[str, Any]


def percent(share: float | None) -> str:
    """Format a share in %, or a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def with_interval(row: Row) -> str:
    """Format a row's accuracy and half its interval, in %."""
    low, high = row["interval"]
    return f"{percent(row['accuracy'])} ± {50 * (high - low):.1f}"


def table_1(rows: Sequence[Row], budget: int, questions: int, types: Sequence[str]) -> str:
    """Return the table of all systems at one budget: tokens, computation, choosing, types, accuracy.

    Parameters
    ----------
    rows : sequence of mapping
        All rows; those of the main comparison are listed, and those with renumbered positions are a column.
    budget : int
        Visual tokens in the last layers.
    questions : int
        Number of questions.
    types : sequence of str
        Question types, a column each.
    """
    main = [row for row in rows if not row["table"]]
    compact = {
        row["method"].removesuffix(" positions=compact"): row
        for row in rows
        if row["table"] == COMPACT and row["visual_tokens"] == budget
    }
    listed = [row for row in main if row["visual_tokens"] == budget or row["method"] in ("unpruned", "blind")]
    unit, per_tflop = flops_unit(main)
    timed = any("selection_seconds" in row for row in listed)
    header = (
        "method",
        "final tokens",
        "layer-averaged",
        unit,
        *(["choosing, ms"] if timed else []),
        *types,
        "accuracy",
        *(["renumbered"] if compact else []),
    )
    lines = [
        (
            label(row),
            row["final_tokens"],
            f"{row['layer_averaged_tokens']:.1f}",
            f"{row['tflops'] * per_tflop:.4g}",
            *([selection(row, questions)] if timed else []),
            *(percent(row["by_type"][kind]["accuracy"]) for kind in types),
            with_interval(row),
            *([with_interval(compact[row["method"]]) if row["method"] in compact else ""] if compact else []),
        )
        for row in listed
    ]
    return markdown_table(header, lines)


def selection(row: Row, questions: int) -> str:
    """Format the time of choosing for one question, in ms, and its share of the prefill."""
    taken, prefill = row.get("selection_seconds"), row.get("prefill_seconds")
    if not prefill or row["method"] in ("unpruned", "blind"):
        return ""
    return f"{1000 * taken / questions:.2f} ({taken / prefill:.0%})"


def points(difference: float, interval: tuple[float, float]) -> str:
    """Format a difference of accuracies and its interval, in points."""
    low, high = interval
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def ablation_differences(rows: Sequence[Row], right: Mapping[str, Any]) -> str:
    """Return a table for each of the paper's tables and budgets: the paired differences between its settings.

    Parameters
    ----------
    rows : sequence of mapping
        All rows: the ablations, and the rows of the methods that they change at their budgets.
    right : mapping of str to bool array
        Right and wrong for each row on the questions that count, by `METHOD@TOKENS`.
    """
    settings: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["table"]:
            settings[row["table"], row["visual_tokens"]].append(row)
    parts = []
    for (table, budget), group in settings.items():
        changed = {row["method"].partition(" ")[0] for row in group}
        own = {row["method"] for row in rows if row["visual_tokens"] == budget and not row["table"]} & changed
        names = [name for name in (*sorted(own), *(row["method"] for row in group)) if f"{name}@{budget}" in right]
        lines = []
        for place, name in enumerate(names[1:], 1):
            answers = right[f"{name}@{budget}"]
            others = [right[f"{other}@{budget}"] for other in names[:place]]
            cells = [points(answers.mean() - other.mean(), paired_interval(answers, other)) for other in others]
            lines.append((_setting(name), *cells, *[""] * (len(names) - 1 - place)))
        if lines:
            header = ("setting", *map(_setting, names[:-1]))
            parts.append(f"### {table} at {budget} visual tokens\n\n{markdown_table(header, lines)}")
    return "\n".join(parts)


def adaptive_against_fixed(rows: Sequence[Row], right: Mapping[str, Any]) -> str:
    """Return the table of budgets of their own against fixed ones; empty without any.

    Parameters
    ----------
    rows : sequence of mapping
        All rows.
    right : mapping of str to bool array
        Right and wrong for each row on the questions that count, by `METHOD@TOKENS`.
    """
    adaptive = [row for row in rows if row["table"] == ADAPTIVE and "coverage" in row["options"]]
    fixed = [row for row in rows if row["method"] == "ivtp-extended" and not row["table"]]
    fixed += [row for row in rows if row["table"] == ADAPTIVE and row not in adaptive]
    fixed.sort(key=lambda row: (row["table"], -row["visual_tokens"]))
    if not adaptive or not fixed:
        return ""
    unit, per_tflop = flops_unit(rows)
    lines = [
        (
            row["options"]["coverage"],
            row["visual_tokens"],
            f"{row['final_tokens']:.1f}",
            f"{row['tflops'] * per_tflop:.4g}",
            with_interval(row),
            *(_paired(row, other, right) for other in fixed),
        )
        for row in adaptive
    ]
    to = [
        f"to {row['visual_tokens']} for each"
        + (f" of {row['options']['tower_tokens']} from the tower" if row["table"] else "")
        + f" ({row['tflops'] * per_tflop:.4g} {unit})"
        for row in fixed
    ]
    return markdown_table(("coverage", "at most", "average", unit, "accuracy in %", *to), lines)


def _paired(one: Row, other: Row, right: Mapping[str, Any]) -> str:
    """Format the paired difference of two rows in points."""
    answers, others = (right[f"{row['method']}@{row['visual_tokens']}"] for row in (one, other))
    return points(answers.mean() - others.mean(), paired_interval(answers, others))


def _setting(method: str) -> str:
    return method.removeprefix("ivtp ")


def table_7(main: Sequence[Row], right: Mapping[str, Any]) -> str:
    """Return the table of vision alone beside vision and language, with the paired difference.

    Parameters
    ----------
    main : sequence of mapping
        Rows of the main comparison.
    right : mapping of str to bool array
        Right and wrong for each row on the questions that count, by `METHOD@TOKENS`.
    """
    found = {(row["method"], row["visual_tokens"]): row for row in main if row["mode"] == "inference"}
    unit, per_tflop = flops_unit(main)
    lines = []
    for budget in sorted({tokens for _, tokens in found}, reverse=True):
        for vision, both in STAGES:
            pair = [found.get((name, budget)) for name in (vision, both)]
            if None in pair:
                continue
            interval = paired_interval(right[f"{both}@{budget}"], right[f"{vision}@{budget}"])
            one, other = (row for row in pair if row is not None)
            lines.append(
                (
                    f"{vision}, {both}",
                    budget,
                    with_interval(one),
                    with_interval(other),
                    points(other["accuracy"] - one["accuracy"], interval),
                    *(f"{row['tflops'] * per_tflop:.4g}" for row in (one, other)),
                )
            )
    header = ("systems", "tokens", "vision", "vision and language", "adds", f"{unit}, vision", f"{unit}, both")
    return markdown_table(header, lines) if lines else ""
