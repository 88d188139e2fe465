"""Results in the shape of the paper's Table 1, beside its printed rows, and for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..files.tables import markdown_table
from ..flops import count_named
from ..methods.names import OWN
from .arm import Arm
from .intervals import difference_interval, interval_of
from .paper import BENCHMARKS, PRINTED, PRINTED_UNTRAINED, Measured, Score

TEXT_TOKENS = 512
"""Text tokens for which Table 1 gives TFLOPs."""


def costs(config: Any, arm: Arm) -> dict[str, Any]:
    """Return TFLOPs at 512 text tokens, and an arm's final and layer-averaged visual tokens."""
    tokens = arm.visual_tokens or (config.pruning.visual_tokens if arm.method == OWN else None)
    counted = count_named(config, arm.method, tokens, text_tokens=TEXT_TOKENS)
    return {
        "tflops": counted.total_tflops,
        "final_tokens": counted.layer_tokens[-1],
        "layer_averaged_tokens": sum(counted.layer_tokens) / len(counted.layer_tokens),
    }


def summary(measured: Measured, arms: Sequence[Arm], limit: int | None = None) -> dict[str, Any]:
    """Return everything as a dict ready for JSON, with the number of questions if it was limited.

    For each arm: `scores` by benchmark with intervals over questions, `average` over the benchmarks that were scored,
    and `share` of the unpruned model's average, from 0 to 1; beside them the arm's costs.
    """
    rows = {}
    for arm in arms:
        name = arm.name
        scores = {benchmark: found[name] for benchmark, found in measured.scores.items()}
        values = [score.value for score in scores.values()]
        base = [found["unpruned"].value for found in measured.scores.values()]
        rows[name] = {
            "scores": {
                benchmark: _with_intervals(score, measured.scores[benchmark]["unpruned"])
                for benchmark, score in scores.items()
            },
            "average": sum(values) / len(values) if values else None,
            "share": sum(values) / sum(base) if sum(base) else None,
            **costs(measured.config, arm),
        }
    printed = {name: list(row) for name, row in PRINTED.items()}
    return {
        "limit": limit,
        "arms": rows,
        "left_out": measured.left_out,
        "unguided": measured.unguided,
        "printed": printed,
    }


def _with_intervals(score: Score, base: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "questions": score.questions,
        **score.more,
        "interval": list(interval_of(score.columns, score.statistic)),
        "difference_interval": list(difference_interval(score.columns, base.columns, score.statistic)),
    }


def page(results: Mapping[str, Any]) -> str:
    """Return the tables, in Markdown."""
    scored = [
        benchmark
        for benchmark in BENCHMARKS
        if any(benchmark.name in row["scores"] for row in results["arms"].values())
    ]
    header = [
        "",
        *(benchmark.title for benchmark in scored),
        "average",
        "of unpruned",
        "TFLOPs",
        "final",
        "layer-averaged",
    ]
    lines = [
        [
            name,
            *(f"{row['scores'][benchmark.name]['value']:.1f}" for benchmark in scored),
            _number(row["average"], ".1f"),
            _number(row["share"], ".1%"),
            f"{row['tflops']:.3g}",
            row["final_tokens"],
            f"{row['layer_averaged_tokens']:.1f}",
        ]
        for name, row in results["arms"].items()
    ]
    places = [BENCHMARKS.index(benchmark) for benchmark in scored]
    for name, row in results["printed"].items():
        average = (
            row[12] if len(scored) == len(BENCHMARKS) else sum(row[place] for place in places) / max(1, len(places))
        )
        lines.append([f"*{name} (printed)*", *(row[place] for place in places), f"{average:.1f}", "", row[13], "", ""])
    parts = ["# Table 1\n", markdown_table(header, lines)]
    parts.append(
        "Rows marked *(printed)* are the paper's, for LLaVA-1.5-7B at 64 visual tokens; averages are over the columns "
        f"shown. MME is normalised by its maximum. TFLOPs are for {TEXT_TOKENS} text tokens.\n"
    )
    parts.append(
        "The printed rows are of models that were retrained while pruned. Without retraining the paper prints the "
        f"average over all twelve alone: {_listed(PRINTED_UNTRAINED)}.\n"
    )
    if results["limit"] is not None:
        parts.append(f"Only the first {results['limit']:,} question(s) of each benchmark were asked.\n")
    for name, missing in results["unguided"].items():
        parts.append(f"{name} was guided by the picture alone, not by the question: the checkpoint has no {missing}.\n")
    parts += ["## Intervals over questions, 95%\n", _intervals(results, scored)]
    if any(benchmark.parts for benchmark in scored):
        parts += ["## Parts of a score\n", _parts(results, scored)]
    if results["left_out"]:
        parts += ["## Left out\n", *(f"- {name}: {reason}" for name, reason in results["left_out"].items())]
    notes = [benchmark for benchmark in scored if benchmark.note]
    if notes:
        parts += [
            "\n## What differs from Table 1\n",
            *(f"- {benchmark.title}: {benchmark.note}." for benchmark in notes),
        ]
    return "\n".join(parts) + "\n"


def _intervals(results: Mapping[str, Any], scored: list[Any]) -> str:
    header = ["benchmark", "arm", "score", "questions", "interval", "difference to unpruned"]
    lines = [
        [
            benchmark.title,
            name,
            f"{score['value']:.1f}",
            f"{score['questions']:,}",
            _span(score["interval"], ".1f"),
            "" if name == "unpruned" else _span(score["difference_interval"], "+.1f"),
        ]
        for benchmark in scored
        for name, row in results["arms"].items()
        for score in [row["scores"][benchmark.name]]
    ]
    return markdown_table(header, lines)


def _parts(results: Mapping[str, Any], scored: list[Any]) -> str:
    lines = [
        [benchmark.title, name, ", ".join(f"{part} {score[part]:.1f}" for part in benchmark.parts if part in score)]
        for benchmark in scored
        if benchmark.parts
        for name, row in results["arms"].items()
        for score in [row["scores"][benchmark.name]]
    ]
    return markdown_table(["benchmark", "arm", "parts"], lines)


def _span(ends: Sequence[float], form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def _listed(averages: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {average:.1f}" for name, average in averages.items())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def model_index(results: Mapping[str, Any], model: str, arm: str) -> str:
    """Return the YAML block of one arm's scores for a model card, as the Hub reads it.

    Empty without scores, and for those of a limited number of questions, which no card should show as a benchmark's.
    """
    if results["limit"] is not None:
        return ""
    benchmarks = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    found = [
        EvalResult(
            task_type="image-text-to-text",
            task_name=f"visual question answering, {arm}",
            dataset_type=name,
            dataset_name=benchmarks[name].title,
            dataset_split=benchmarks[name].split,
            dataset_args={"questions": score["questions"]}
            | ({"note": benchmarks[name].note} if benchmarks[name].note else {}),
            metric_type="score",
            metric_value=round(score["value"], 2),
        )
        for name, score in results["arms"][arm]["scores"].items()
    ]
    return ModelCardData(model_name=model, eval_results=found).to_yaml() + "\n" if found else ""
