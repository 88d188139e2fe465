"""Write the newest results into the project's README, between its marks; nothing there is typed by hand.

python -m benchmarks.quality.readme
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality import report
from benchmarks.quality.paper_tables import with_interval
from benchmarks.quality.plots import MAIN, flops_unit, unpruned_of
from modeling_ivtp.files.tables import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- quality: written by benchmarks/quality/readme.py -->", "<!-- /quality -->"
SYSTEMS_BEGIN, SYSTEMS_END = "<!-- systems: written by benchmarks/quality/readme.py -->", "<!-- /systems -->"
BUDGET = 64
"""Of the table of systems, as in the paper's."""


def newest(folder: Path = RESULTS) -> Path:
    """The latest results.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    files = report.results_in(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no quality-*.json; make quality writes one.")
    return files[-1]


def excerpt(file: Path) -> str:
    """The table of accuracies, what they are of, and the plot."""
    results: Mapping[str, Any] = json.loads(file.read_text())
    main = [row for row in results["rows"] if not row["table"]]
    asked = results["questions"]
    where = file.parent.relative_to(ROOT)
    return "\n".join(
        [
            BEGIN,
            f"Accuracy in % with 95% intervals, {report.counted(asked):,} held-out questions of "
            f"{len(asked['headline'])} types ({', '.join(asked['headline'])}), {results['date']}; guessing would reach "
            f"{asked['chance']:.1%}.{_beside(main, asked)}",
            "",
            report.accuracy_table([row for row in main if row["method"] in (*MAIN, "unpruned", "blind")]),
            f"![Accuracy against visual tokens]({where}/{file.stem}-tokens.png)",
            "",
            f"By type, cost, ablations: [{file.stem}]({where}/{file.stem}.md); "
            f"[accuracy against computation]({where}/{file.stem}-tflops.png).",
            END,
        ]
    )


def systems_excerpt(file: Path) -> str:
    """All systems at one budget, from the least computation to the most; empty if they were not examined."""
    results: Mapping[str, Any] = json.loads(file.read_text())
    rows = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    shown = [row for row in rows if row["visual_tokens"] == BUDGET and row["method"] not in ("cls-topk", "oracle")]
    unpruned = unpruned_of(rows)
    if unpruned is None or all(row["method"] in MAIN for row in shown):
        return f"{SYSTEMS_BEGIN}\n{SYSTEMS_END}"
    unit, per_tflop = flops_unit(rows)
    where = file.parent.relative_to(ROOT)
    lines = [
        (row["method"], row["final_tokens"], f"{row['layer_averaged_tokens']:.0f}", f"{row['tflops'] * per_tflop:.2f}",
         with_interval(row))
        for row in (*sorted(shown, key=lambda row: row["tflops"]), unpruned)
    ]  # fmt: skip
    return "\n".join(
        [
            SYSTEMS_BEGIN,
            f"On the miniature at {BUDGET} visual tokens, from the least computation to the most:",
            "",
            markdown_table(("system", "final tokens", "layer-averaged", unit, "accuracy in %"), lines),
            f"[All budgets, types and times]({where}/{file.stem}.md); "
            f"[every system's curve]({where}/{file.stem}-systems-tflops.png).",
            SYSTEMS_END,
        ]
    )


def _beside(main: list[Mapping[str, Any]], asked: Mapping[str, Any]) -> str:
    """The types that do not count, with what the unpruned model reaches on them."""
    unpruned = unpruned_of(main)
    if unpruned is None:
        return ""
    told = [
        f"{kind} ({of['accuracy']:.1%} unpruned)"
        for kind, of in unpruned["by_type"].items()
        if kind not in asked["headline"]
    ]
    return f" Told by type only, because this small model does not answer them well: {', '.join(told)}." if told else ""


def filled(readme: str, text: str) -> str:
    """The README with a text that begins and ends with marks in the place of what stands between them there.

    Raises
    ------
    ValueError
        If the marks are missing.
    """
    begin, end = text.partition("\n")[0], text.rpartition("\n")[2]
    if begin not in readme or end not in readme:
        raise ValueError(f"README.md has no {begin} … {end}.")
    return readme[: readme.index(begin)] + text + readme[readme.index(end) + len(end) :]


if __name__ == "__main__":
    page = ROOT / "README.md"
    text = filled(page.read_text(), excerpt(newest()))
    report.write_atomically(page, filled(text, systems_excerpt(newest())).encode())
