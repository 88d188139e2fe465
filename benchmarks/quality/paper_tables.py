"""The paper's Tables 1 and 7 in shape: all systems at one budget, and what the decoder's stage adds to the tower's."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.intervals import paired_interval
from benchmarks.quality.plots import flops_unit, label
from modeling_ivtp.files.tables import markdown_table

STAGES = (("topk", "topk+"), ("tome", "tome+"), ("ivtp-v", "ivtp"))
"""Systems in the vision tower, and the same continued in the decoder."""

Row = Mapping[str, Any]


def percent(share: float | None) -> str:
    """A share in %, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def with_interval(row: Row) -> str:
    """Accuracy and half its interval, in %."""
    low, high = row["interval"]
    return f"{percent(row['accuracy'])} ± {50 * (high - low):.1f}"


def table_1(main: Sequence[Row], budget: int, questions: int, types: Sequence[str]) -> str:
    """Every system at one budget: final and layer-averaged tokens, computation, choosing, types, accuracy.

    Parameters
    ----------
    main : sequence of mapping
        Rows of the main comparison.
    budget : int
        Visual tokens in the end.
    questions : int
        How many were asked.
    types : sequence of str
        Columns.
    """
    rows = [row for row in main if row["visual_tokens"] == budget or row["method"] in ("unpruned", "blind")]
    unit, per_tflop = flops_unit(main)
    timed = any("selection_seconds" in row for row in rows)
    header = (
        "method",
        "final tokens",
        "layer-averaged",
        unit,
        *(["choosing, ms"] if timed else []),
        *types,
        "accuracy",
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
        )
        for row in rows
    ]
    return markdown_table(header, lines)


def selection(row: Row, questions: int) -> str:
    """What choosing took of one question, in ms, and its share of the prefill."""
    taken, prefill = row.get("selection_seconds"), row.get("prefill_seconds")
    if not prefill or row["method"] in ("unpruned", "blind"):
        return ""
    return f"{1000 * taken / questions:.2f} ({taken / prefill:.0%})"


def table_7(main: Sequence[Row], right: Mapping[str, Any]) -> str:
    """Vision only beside vision and language, with what the decoder's stage adds, paired.

    Parameters
    ----------
    main : sequence of mapping
        Rows of the main comparison.
    right : mapping of str to bool array
        Which of the questions that count each row answers, by `METHOD@TOKENS`.
    """
    found = {(row["method"], row["visual_tokens"]): row for row in main if row["mode"] == "inference"}
    unit, per_tflop = flops_unit(main)
    lines = []
    for budget in sorted({tokens for _, tokens in found}, reverse=True):
        for vision, both in STAGES:
            pair = [found.get((name, budget)) for name in (vision, both)]
            if None in pair:
                continue
            low, high = paired_interval(right[f"{both}@{budget}"], right[f"{vision}@{budget}"])
            one, other = (row for row in pair if row is not None)
            lines.append(
                (
                    f"{vision}, {both}",
                    budget,
                    with_interval(one),
                    with_interval(other),
                    f"{100 * (other['accuracy'] - one['accuracy']):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                    *(f"{row['tflops'] * per_tflop:.4g}" for row in (one, other)),
                )
            )
    header = ("systems", "tokens", "vision", "vision and language", "adds", f"{unit}, vision", f"{unit}, both")
    return markdown_table(header, lines) if lines else ""
