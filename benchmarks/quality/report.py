"""The report of an evaluation: JSON for the record, a page with tables, and the paper's Fig. 3 and 4.

    python -m benchmarks.quality.report benchmarks/results/quality-DATE.json --headline existence --headline colour

writes results again, with another headline or newer pages and plots, without asking the model anything.
"""

import io
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.quality import command
from benchmarks.quality.methods import COMPACT
from benchmarks.quality.paper_tables import (
    ablation_differences,
    adaptive_against_fixed,
    percent,
    points,
    table_1,
    table_7,
    with_interval,
)
from benchmarks.quality.plots import flops_unit, label, plot, plot_systems, unpruned_of
from benchmarks.quality.world import TYPES, Question, chance, fingerprint, sample_questions
from modeling_ivtp.evaluation import load_metric
from modeling_ivtp.evaluation.intervals import LEVEL, bootstrap_interval, paired_interval
from modeling_ivtp.files.tables import markdown_table

_PACKAGES = ("torch", "transformers", "evaluate", "numpy", "ivtp-llava")
EXISTENCE = ("yes", "no")
"""Answers to whether something is in the picture; a wrong answer to the second kind sees what is not there."""
_SAME = ("method", "visual_tokens", "table", "mode")


@cache
def _metric() -> Any:
    return load_metric("exact_word")


def right_answers(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return where the first word of an answer is the right one, bool (n,), by the `evaluate` metric `exact_word`."""
    return np.array(_metric().compute(predictions=list(answers), references=list(references))["right"], dtype=bool)


def pack(right: np.ndarray) -> str:
    """Pack right and wrong for every question into hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpack(packed: str, number: int) -> np.ndarray:
    """Unpack the digits of `pack`: bool (number,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8), count=number).astype(bool)


def describe_questions(questions: Sequence[Question], headline: Sequence[str]) -> dict[str, Any]:
    """Count questions by type and held-out kind, with the types that count and the accuracy of guessing."""
    types = list(dict.fromkeys(question.type for question in questions))
    in_headline = [question.type for question in questions if question.type in headline]
    return {
        "types": {kind: sum(question.type == kind for question in questions) for kind in types},
        "headline": [kind for kind in types if kind in headline],
        "chance": sum(map(chance, in_headline)) / max(1, len(in_headline)),
        "chance_by_type": {kind: chance(kind) for kind in types},
        "held_out": {kind: sum(question.held_out == kind for question in questions) for kind in ("pair", "triple")},
    }


def counted(asked: Mapping[str, Any]) -> int:
    """Return how many questions count for the accuracy."""
    return sum(asked["types"][kind] for kind in asked["headline"])


def joined(before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge rows of earlier evaluations of the same questions with new ones, which replace those of the same name.

    A checkpoint that was retrained again replaces the one before: the tables have one row for both.
    """

    def name(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[part] for part in _SAME)

    return [dict(row) for row in ({name(row): row for row in before} | {name(row): row for row in new}).values()]


def summarised(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], headline: Sequence[str]
) -> list[dict[str, Any]]:
    """Add accuracy, intervals, and the parts by type and by held-out kind to rows.

    Parameters
    ----------
    rows : sequence of mapping
        Rows with `right`: right and wrong for all questions, packed.
    questions : sequence of Question
    headline : sequence of str
        Types that count for `accuracy`, `interval` and `difference`.

    Raises
    ------
    ValueError
        If no question is of the headline's types.
    """
    types = np.array([question.type for question in questions])
    kinds = np.array([question.held_out or "seen" for question in questions])
    asks_existence, answers = types == "existence", np.array([question.answer for question in questions])
    main = np.isin(types, list(headline))
    if not main.any():
        raise ValueError(f"No question is of the headline's types ({', '.join(headline)}); ask more questions.")
    reference = unpruned_of(rows)
    base = None if reference is None else unpack(reference["right"], len(types))
    summaries = []
    for row in rows:
        right = unpack(row["right"], len(types))
        summary = dict(row) | {
            "accuracy": float(right[main].mean()),
            "interval": list(bootstrap_interval(right[main])),
            "by_type": {kind: _share(right, types == kind) for kind in dict.fromkeys(types.tolist())},
            "by_held_out": {kind: _share(right, main & (kinds == kind)) for kind in ("seen", "pair", "triple")},
            "existence": {word: _share(right, asks_existence & (answers == word)) for word in EXISTENCE},
        }
        if base is not None:
            summary["difference"] = float(right[main].mean() - base[main].mean())
            summary["difference_interval"] = list(paired_interval(right[main], base[main]))
        summary["right"] = summary.pop("right")  # long, so last
        summaries.append(summary)
    return summaries


def _share(right: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    number = int(among.sum())
    return {"accuracy": float(right[among].mean()) if number else None, "n": number}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def machine(model: Any) -> dict[str, Any]:
    """Describe the machine on which the model ran."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def results_file(folder: Path, date: str, identity: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the file for results and what it holds so far; another evaluation's results are never overwritten.

    Parameters
    ----------
    folder : Path
    date : str
    identity : mapping
        Entries of the results that rows in one file have in common.
    """
    number = 1
    while True:
        file = folder / f"quality-{date}{'' if number == 1 else f'-{number}'}.json"
        if not file.exists():
            return file, {}
        before = _read(file)
        if _is_of(before, identity):
            return file, before
        number += 1


def latest_results(folder: Path, identity: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest results with this identity, of any date; None if there are none."""
    files = reversed(results_in(folder))
    return next(((file, found) for file in files if _is_of(found := _read(file), identity)), None)


def results_in(folder: Path) -> list[Path]:
    """List all results, the newest last, by name: a clone gives files the time of the clone."""
    return sorted(folder.glob("quality-*.json"), key=lambda file: file.stem)


def _read(file: Path) -> dict[str, Any]:
    """Read results; empty if the file is not JSON."""
    try:
        return dict(json.loads(file.read_text()))
    except ValueError:
        return {}


def _is_of(results: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return all(results.get(name) == value for name, value in identity.items())


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write JSON, page (.md) and plots (.png); each is written completely, or the file before stays.

    Raises
    ------
    OSError
        If the disk is full.
    """
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(results).encode())
    for axis in ("tokens", "tflops"):
        picture = io.BytesIO()
        plot(results, axis).savefig(picture, format="png", dpi=144)
        write_atomically(file.with_name(f"{file.stem}-{axis}.png"), picture.getvalue())
        if (figure := plot_systems(results, axis)) is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=144)
            write_atomically(file.with_name(f"{file.stem}-systems-{axis}.png"), picture.getvalue())


def retold(results: Mapping[str, Any], headline: Sequence[str]) -> dict[str, Any]:
    """Summarise the same answers under another headline.

    Raises
    ------
    ValueError
        For an unknown question type, or results of another world, which has other questions.
    """
    if unknown := sorted(set(headline) - set(TYPES)):
        raise ValueError(f"Unknown question type(s) {', '.join(unknown)}; allowed: {', '.join(TYPES)}.")
    if results["world"] != fingerprint():
        raise ValueError(f"These are results of another world ({results['world']}; this one is {fingerprint()}).")
    sample = results["sample"]
    asked = [question for _, question in sample_questions(sample["split"], sample["number"], side=sample["side"])]
    return dict(results) | {
        "questions": describe_questions(asked, headline),
        "rows": summarised(results["rows"], asked, headline),
    }


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file in one step; on a full disk the old one stays, and nothing else."""
    beside = file.with_name(f".{file.name}.partial")
    try:
        with beside.open("wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def when(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Say when some rows of results were measured: "on 2026-01-01", or "from 2026-01-01 to 2026-01-05".

    Rows of version 0.2 have no date of their own; they count as of the day the results were begun.
    """
    dates = sorted({row.get("date", results["date"]) for row in rows})
    return f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page with all tables."""
    rows, asked = results["rows"], results["questions"]
    main = [row for row in rows if not row["table"]]
    unit, per_tflop = flops_unit(rows)
    parts = [
        f"# Quality, {results['date']}\n",
        f"{results['checkpoint_name']} (`{results['checkpoint']}`), measured "
        f"{when(results, rows)}, {results['sample']['number']} held-out questions, "
        f"{LEVEL:.0%} bootstrap intervals over questions; guessing would reach {asked['chance']:.1%}. "
        f"Types that count for the accuracy: {', '.join(asked['headline'])}.\n",
        "## Accuracy in %\n",
        accuracy_table(main),
        "## Difference to unpruned in points, paired\n",
        _by_budget(main, _difference),
    ]
    for budget in sorted({row["visual_tokens"] for row in main if row["method"] not in ("unpruned", "blind")})[::-1]:
        parts += [
            f"## All systems at {budget} visual tokens (Table 1's shape), in %\n",
            table_1(rows, budget, results["sample"]["number"], list(asked["types"])),
        ]
    if any("selection_seconds" in row for row in main):
        parts.append(
            "Choosing: ms of one question, and the share of the prefill, in batches; blank: not timed. Rows were timed "
            "in runs of their own, some with more threads (`date`, `threads` in the JSON): compare shares, not ms. "
            "The final number of tokens alone flatters systems that prune late: compare layer-averaged tokens and "
            "computation, too.\n"
        )
    if stages := table_7(main, _right(main, results)):
        parts += ["## In the vision tower alone, and in the decoder too (Table 7's shape), in %\n", stages]
    kinds = ("seen", *asked["held_out"])
    parts += [
        "## Combinations that training never showed, in %\n",
        markdown_table(
            ("method", "tokens", *(f"{kind} (n = {_number(main, kind)})" for kind in kinds)),
            [
                (label(r), r["visual_tokens"], *(percent(r["by_held_out"][kind]["accuracy"]) for kind in kinds))
                for r in main
            ],
        ),
    ]
    parts += [_existence(main)]
    ablations = [row for row in rows if row["table"] not in ("", COMPACT)]
    if ablations:
        header = ("table", "setting", "visual tokens", "accuracy in %", "to unpruned", unit, "final", "layer-averaged")
        lines = [
            (r["table"], r["method"].removeprefix("ivtp "), r["visual_tokens"],
             with_interval(r), _difference(r),
             f"{r['tflops'] * per_tflop:.4g}", f"{r['final_tokens']:g}", f"{r['layer_averaged_tokens']:.1f}")
            for r in ablations
        ]  # fmt: skip
        parts += [
            "## Ablations of IVTP\n",
            markdown_table(header, lines),
            "Differences between settings in points, row minus column, paired by question:\n",
            ablation_differences([row for row in rows if row["table"] != COMPACT], _right(rows, results)),
        ]
    if adaptive := adaptive_against_fixed(rows, _right(rows, results)):
        parts += ["## A budget of its own for every picture, against fixed ones, paired\n", adaptive]
    if "survival" in results:
        parts += ["## Where patches are lost\n", _survival(results["survival"])]
    if "other_seed" in results:
        parts += ["## Another training seed\n", _seeds(results["other_seed"], main)]
    if len({row["code"] for row in rows}) > 1:
        parts.append("Rows come from different versions of the code; `code` in the JSON tells them apart.\n")
    for name, reason in results.get("skipped", {}).items():
        parts.append(f"- `{name}` does not fit this model: {reason}")
    return "\n".join(parts) + "\n"


def accuracy_table(main: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of methods against budgets: accuracy and half its interval, in %."""
    return _by_budget(main, with_interval)


def _right(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return right and wrong for each row on the questions that count, by `METHOD@TOKENS`."""
    sample, headline = results["sample"], results["questions"]["headline"]
    types = [question.type for _, question in sample_questions(sample["split"], sample["number"], side=sample["side"])]
    counts = np.isin(types, headline)
    return {
        f"{row['method']}@{row['visual_tokens']}": unpack(row["right"], len(types))[counts]
        for row in rows
        if row["mode"] == "inference"
    }


def _existence(main: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of questions whether something is there, by their right answer; empty without any."""
    numbers = {word: main[0]["existence"][word]["n"] for word in EXISTENCE} if main else {}
    if not all(numbers.values()) or not numbers:
        return ""
    header = ("method", "tokens", *(f"{word} (n = {number})" for word, number in numbers.items()))
    lines = [
        (label(row), row["visual_tokens"], *(percent(row["existence"][word]["accuracy"]) for word in EXISTENCE))
        for row in main
    ]
    return "## Existence, by the right answer, in %\n\n" + markdown_table(header, lines)


def _survival(followed: Mapping[str, Any]) -> str:
    """Return the tables of questions whose objects all have a patch left, by step, and of accuracy with and without."""
    methods = followed["methods"]
    types = next(iter(methods.values()))["steps"][0]["by_type"]
    steps = [
        (method, step["step"], step["tokens"], percent(step["share"]), *map(percent, step["by_type"].values()))
        for method, found in methods.items()
        for step in found["steps"]
    ]
    answers = [
        (method, percent(found["accuracy"]["left"]), percent(found["accuracy"]["gone"]))
        for method, found in methods.items()
    ]
    return (
        f"Questions in % that still have a patch of every object they ask about and are answered from, after each step "
        f"on the way to {followed['visual_tokens']} tokens; the first {followed['questions']} questions, those that "
        "ask about nothing in the picture left out.\n\n"
        + markdown_table(("method", "after", "tokens", "headline", *types), steps)
        + "\nAccuracy in % of the headline's questions among them:\n\n"
        + markdown_table(("method", "all objects left", "an object gone"), answers)
    )


def _seeds(other: Mapping[str, Any], main: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of accuracies under both seeds, and whether they put the methods in the same order."""
    own = {(row["method"], row["visual_tokens"]): row["accuracy"] for row in main if row["mode"] == "inference"}
    compared = [
        row | {"mode": "inference", "own": own[row["method"], row["visual_tokens"]]}
        for row in other["rows"]
        if (row["method"], row["visual_tokens"]) in own
    ]
    disagree = {tokens: found["disagree"] for tokens, found in other["budgets"].items() if found["disagree"]}
    lists = [
        f"at {tokens} tokens " + ", ".join(f"{one} and {two}" for one, two in pairs)
        for tokens, pairs in disagree.items()
    ]
    number = sum(len(found["open"]) for found in other["budgets"].values())
    verdict = (
        f"The seeds do **not** agree on the order of: {'; '.join(lists)}." if lists else "The seeds agree on the order."
    )
    return (
        f"Accuracy in % of this seed and of another one (`{other['checkpoint']}`), trained "
        f"{other.get('note') or 'alike'}, on the same world:\n\n"
        + _by_budget(compared, lambda row: f"{percent(row['own'])} / {percent(row['accuracy'])}")
        + f"\n{verdict} Pairs of methods at one budget whose difference is within its interval under a seed, so that "
        f"they are not ordered: {number}.\n"
    )


def _difference(row: Mapping[str, Any]) -> str:
    if "difference" not in row:
        return "–"
    return points(row["difference"], row["difference_interval"])


def _number(rows: Sequence[Mapping[str, Any]], kind: str) -> int:
    return rows[0]["by_held_out"][kind]["n"] if rows else 0


def _by_budget(rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> str:
    budgets = sorted({row["visual_tokens"] for row in rows}, reverse=True)
    cells: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        cells[label(row)][row["visual_tokens"]] = cell(row)
    return markdown_table(
        ("method", *budgets), [(name, *(at.get(k, "") for k in budgets)) for name, at in cells.items()]
    )


def main(
    file: Annotated[Path, typer.Argument(help="The results, a JSON file.")],
    headline: Annotated[
        list[str] | None, typer.Option(help="Types that count for the accuracy. Default: as before.")
    ] = None,
) -> None:
    """Write results again."""
    results = json.loads(file.read_text())
    write(file, retold(results, headline or results["questions"]["headline"]))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    command.run(main)
