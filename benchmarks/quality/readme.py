"""Write the newest results into the project's README, between its two marks; nothing there is typed by hand.

python -m benchmarks.quality.readme
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality import report
from benchmarks.quality.plots import unpruned_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- quality: written by benchmarks/quality/readme.py -->", "<!-- /quality -->"


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
            report.accuracy_table(main),
            f"![Accuracy against visual tokens]({where}/{file.stem}-tokens.png)",
            "",
            f"By type, cost, ablations: [{file.stem}]({where}/{file.stem}.md); "
            f"[accuracy against computation]({where}/{file.stem}-tflops.png).",
            END,
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
    """The README with the text between its marks.

    Raises
    ------
    ValueError
        If the marks are missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no {BEGIN} … {END}.")
    return readme[: readme.index(BEGIN)] + text + readme[readme.index(END) + len(END) :]


if __name__ == "__main__":
    page = ROOT / "README.md"
    report.write_atomically(page, filled(page.read_text(), excerpt(newest())).encode())
