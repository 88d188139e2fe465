"""Comparison of two models that differ in their training seed: do they put the methods in the same order?

    python -m benchmarks.quality.seeds benchmarks/results/quality-DATE.json --other out/seed-1/quality-DATE.json

adds the comparison to the first of the two, and writes its page again.
"""

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.quality import command, report
from benchmarks.quality.world import sample_questions
from modeling_ivtp.evaluation.intervals import paired_interval

_SAME = ("world", "sample")


def agreement(results: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other seed's accuracies, and at every budget the order of methods under both seeds.

    The seeds *disagree* on two methods if they put them in opposite orders and the paired intervals of both differences
    exclude zero. If an interval includes zero, the order is *open*.

    Parameters
    ----------
    results, other : mapping
        Evaluations of two checkpoints on the same questions. The headline of the first counts for both.

    Returns
    -------
    dict
        `checkpoint`; `rows`: method, visual_tokens and accuracy of the other; `budgets`: for each budget `order` and
        `other_order`, best first, and pairs of methods that `disagree` or are `open`.

    Raises
    ------
    ValueError
        If the questions differ, or both evaluations are of one checkpoint.
    """
    for name in _SAME:
        if results[name] != other[name]:
            raise ValueError(
                f"The two evaluations are of different questions: {name} is {results[name]} and {other[name]}."
            )
    if results["checkpoint"] == other["checkpoint"]:
        raise ValueError(f"Both evaluations are of the checkpoint {results['checkpoint']}; compare two seeds.")
    sample = results["sample"]
    asked = [question for _, question in sample_questions(sample["split"], sample["number"], side=sample["side"])]
    counts = np.array([question.type in results["questions"]["headline"] for question in asked])

    def answers(of: Mapping[str, Any]) -> dict[tuple[int, str], np.ndarray]:
        return {
            (row["visual_tokens"], row["method"]): report.unpack(row["right"], len(asked))[counts]
            for row in of["rows"]
            if not row["table"] and row["mode"] == "inference" and row["method"] != "blind"
        }

    first, second = answers(results), answers(other)
    both = [key for key in first if key in second]
    if not both:
        raise ValueError("The two evaluations have no row in common.")
    budgets = {}
    for tokens in sorted({tokens for tokens, _ in both}, reverse=True):
        methods = [method for budget, method in both if budget == tokens]
        if len(methods) < 2:
            continue
        found: dict[str, Any] = {"disagree": [], "open": []}
        for name, of in (("order", first), ("other_order", second)):
            found[name] = sorted(methods, key=lambda method: -of[tokens, method].mean())
        for pair in combinations(methods, 2):
            one, two = (_clear_sign(*(of[tokens, method] for method in pair)) for of in (first, second))
            if one * two == 0:
                found["open"].append(list(pair))
            elif one != two:
                found["disagree"].append(list(pair))
        budgets[str(tokens)] = found
    rows = [
        {"method": method, "visual_tokens": tokens, "accuracy": float(second[tokens, method].mean())}
        for tokens, method in both
    ]
    return {"checkpoint": other["checkpoint"], "rows": rows, "budgets": budgets}


def _clear_sign(one: np.ndarray, two: np.ndarray) -> int:
    """Return 1 or -1 if the first is better or worse and the paired interval excludes zero, else 0."""
    low, high = paired_interval(one, two)
    return int(low > 0) - int(high < 0)


def main(
    file: Annotated[Path, typer.Argument(help="Results of one seed, to which the comparison is added.")],
    other: Annotated[Path, typer.Option(help="Results of the other seed, on the same questions.")],
    note: Annotated[str, typer.Option(help="What else differs in the training of the other.")] = "",
) -> None:
    """Compare two seeds."""
    results = json.loads(file.read_text())
    results["other_seed"] = agreement(results, json.loads(other.read_text())) | {"note": note}
    report.write(file, results)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    command.run(main)
