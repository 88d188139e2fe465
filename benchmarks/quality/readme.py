"""Write the newest quality results into the pages that show them, between their marks; no number there is typed.

    python -m benchmarks.quality.readme

`README.md` gets a short table, `docs/quality.md` the full one, the table of methods, and the table of the second
instrument.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality import report
from benchmarks.quality.checkpoint import checkpoint_fingerprint
from benchmarks.quality.findings import BUDGET, EXTENDED, findings, method_findings
from benchmarks.quality.paper_tables import with_interval
from benchmarks.quality.plots import MAIN, flops_unit, unpruned_of
from modeling_ivtp.files.tables import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SECOND = RESULTS / "plain"
"""The second instrument's results, in a folder of their own: its checkpoint does not ship."""
MINIATURE = ROOT / "examples" / "miniature"
README, QUALITY_PAGE = ROOT / "README.md", ROOT / "docs" / "quality.md"
WHOLE = ("cls-topk", "cls-topk-all-layers", "oracle")
"""Rows that choose among the features of whole pictures: no methods of anybody."""
SHORT = ("unpruned", "ivtp-extended", "ivtp-extended-flat", "ivtp", "tome+", "divprune", "random")
"""Rows of the README's table, in its order."""
LARGEST = 192
"""The largest budget in the README's table, which stays narrow; the page has all of them."""


def marks(name: str) -> tuple[str, str]:
    """Return the two comments that enclose a block of a page."""
    return f"<!-- {name}: written by benchmarks/quality/readme.py -->", f"<!-- /{name} -->"


def newest(folder: Path = RESULTS, checkpoint: Path = MINIATURE) -> Path:
    """Return the latest results of a checkpoint; people write those of their own into the same folder.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    found = report.latest_results(folder, {"checkpoint": checkpoint_fingerprint(checkpoint)})
    if found is None:
        raise FileNotFoundError(f"{folder} holds no quality-*.json of {checkpoint}; make quality writes one.")
    return found[0]


def second(folder: Path = SECOND) -> Path | None:
    """Return the second instrument's latest results; None if there are none."""
    return next(reversed(report.results_in(folder)), None)


def link_base(page: Path, file: Path) -> str:
    """Return the path from a page to a result file, without the file's suffix, as a link needs it."""
    return Path(os.path.relpath(file.with_suffix(""), page.parent)).as_posix()


def short_excerpt(file: Path, page: Path = README) -> str:
    """Return the README's block: the accuracy of a few methods at each budget, and what is lost at 64 tokens."""
    results: Mapping[str, Any] = json.loads(file.read_text())
    main = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    shown = [
        row for row in main
        if row["method"] == "unpruned" or (row["method"] in SHORT and row["visual_tokens"] <= LARGEST)
    ]  # fmt: skip
    begin, end = marks("quality-short")
    return "\n".join(
        [
            begin,
            f"Accuracy of the miniature in %, with 95% intervals, on {report.counted(results['questions']):,} held-out "
            f"questions; guessing reaches {results['questions']['chance']:.1%}:",
            "",
            report.accuracy_table(sorted(shown, key=lambda row: SHORT.index(row["method"]))),
            f"{_loss(main)}[Measured {report.when(results, shown)}]({link_base(page, file)}.md).",
            end,
        ]
    )


def _loss(main: list[Mapping[str, Any]]) -> str:
    """Return a sentence on what is lost at `BUDGET` tokens; empty if that was not measured."""
    unpruned = unpruned_of(main)
    found = {row["method"]: row["accuracy"] for row in main if row["visual_tokens"] == BUDGET}
    lost = [
        f"`{name}` loses {100 * (unpruned['accuracy'] - found[name]):.1f} points"
        for name in ("ivtp", EXTENDED[0])
        if unpruned is not None and name in found
    ]
    return f"At {BUDGET} tokens {' and '.join(lost)}. " if lost else ""


def excerpt(file: Path, page: Path = QUALITY_PAGE) -> str:
    """Return the block with the full table of accuracies, the questions behind it, and the plot."""
    results: Mapping[str, Any] = json.loads(file.read_text())
    main = [row for row in results["rows"] if not row["table"]]
    base = link_base(page, file)
    begin, end = marks("quality")
    return "\n".join(
        [
            begin,
            _how_measured(results, main),
            "",
            report.accuracy_table([row for row in main if row["method"] in (*MAIN, "unpruned", "blind")]),
            f"![Accuracy against visual tokens]({base}-tokens.png)",
            "",
            f"[Types, costs and ablations]({base}.md); [accuracy against computation]({base}-tflops.png).",
            end,
        ]
    )


def systems_excerpt(file: Path, page: Path = QUALITY_PAGE) -> str:
    """Return the block with all methods at one budget, from the least computation to the most; empty without them."""
    results: Mapping[str, Any] = json.loads(file.read_text())
    rows = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    shown = [row for row in rows if row["visual_tokens"] == BUDGET and row["method"] not in WHOLE]
    unpruned = unpruned_of(rows)
    begin, end = marks("systems")
    if unpruned is None or all(row["method"] in MAIN for row in shown):
        return f"{begin}\n{end}"
    unit, per_tflop = flops_unit(rows)
    base = link_base(page, file)
    lines = [
        (row["method"], row["final_tokens"], f"{row['layer_averaged_tokens']:.0f}", f"{row['tflops'] * per_tflop:.2f}",
         with_interval(row))
        for row in (*sorted(shown, key=lambda row: row["tflops"]), unpruned)
    ]  # fmt: skip
    return "\n".join(
        [
            begin,
            f"The miniature at {BUDGET} visual tokens, from the least computation to the most:",
            "",
            markdown_table(("method", "final tokens", "layer-averaged", unit, "accuracy in %"), lines),
            f"[All budgets, types and times]({base}.md); [every method's curve]({base}-systems-tflops.png).",
            *_bullets(method_findings(results)),
            end,
        ]
    )


def second_excerpt(file: Path | None, page: Path = QUALITY_PAGE) -> str:
    """Return the section on the second instrument, with what follows from its results; empty without any."""
    begin, end = marks("second")
    if file is None:
        return f"{begin}\n{end}"
    results: Mapping[str, Any] = json.loads(file.read_text())
    main = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    base = link_base(page, file)
    return "\n".join(
        [
            begin,
            "## A second instrument",
            "",
            "The miniature's training may favour some ways of pruning. A second LLaVA, by the recipe",
            "[`plain`](../benchmarks/README.md#the-plain-recipe), does without most of its aids. Its tower has 12",
            "layers, in groups of three as in the paper.",
            "",
            _how_measured(results, main),
            "",
            report.accuracy_table(main),
            f"[Types, costs and differences]({base}.md); [accuracy against computation]({base}-systems-tflops.png).",
            *_bullets([*findings(results), *method_findings(results)]),
            "",
            end,
        ]
    )


def _how_measured(results: Mapping[str, Any], main: list[Mapping[str, Any]]) -> str:
    """Return the sentences above a table: when, with which questions, and what guessing reaches."""
    questions = results["questions"]
    return (
        f"Accuracy in % with 95% intervals, measured {report.when(results, main)} with "
        f"{report.counted(questions):,} held-out questions of {len(questions['headline'])} types "
        f"({', '.join(questions['headline'])}). Guessing reaches {questions['chance']:.1%}."
        f"{_left_out(main, questions)}"
    )


def _left_out(main: list[Mapping[str, Any]], questions: Mapping[str, Any]) -> str:
    """Return a sentence on the types that the headline leaves out, with the unpruned model's accuracy on each."""
    unpruned = unpruned_of(main)
    if unpruned is None:
        return ""
    types = [
        f"{kind} ({score['accuracy']:.1%} unpruned)"
        for kind, score in unpruned["by_type"].items()
        if kind not in questions["headline"]
    ]
    if not types:
        return ""
    return f" This small model does not answer every type well; these are left out of the average: {', '.join(types)}."


def findings_excerpt(file: Path) -> str:
    """Return the block with what follows from the results, as a list."""
    begin, end = marks("findings")
    return "\n".join([begin, *_bullets(findings(json.loads(file.read_text()))), "", end])


def _bullets(sentences: list[str]) -> list[str]:
    """Return sentences as a list after an empty line; nothing for none."""
    return ["", *(f"- {sentence}" for sentence in sentences)] if sentences else []


def filled(page: str, text: str) -> str:
    """Return a page in which `text`, which begins and ends with marks, replaces what stands between them.

    Raises
    ------
    ValueError
        If the page lacks the marks.
    """
    begin, end = text.partition("\n")[0], text.rpartition("\n")[2]
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} … {end}.")
    return page[: page.index(begin)] + text + page[page.index(end) + len(end) :]


def blocks(file: Path, second: Path | None = None) -> dict[Path, list[str]]:
    """Return the blocks of each page, from the results of the shipped miniature and of the second instrument."""
    return {
        README: [short_excerpt(file)],
        QUALITY_PAGE: [excerpt(file), findings_excerpt(file), systems_excerpt(file), second_excerpt(second)],
    }


def write_pages(pages: Mapping[Path, list[str]]) -> None:
    """Write blocks into their pages."""
    for page, texts in pages.items():
        text = page.read_text()
        for block in texts:
            text = filled(text, block)
        report.write_atomically(page, text.encode())


if __name__ == "__main__":
    write_pages(blocks(newest(), second()))
