"""Metrics of benchmarks, as modules of the `evaluate` package.

Each is one file that stands alone, so `evaluate.load` takes it by its path, on a machine without this package too, and
without a network: `evaluate.load("modeling_ivtp/evaluation/metrics/vqa_accuracy")`. From the package:
`load_metric("vqa_accuracy")`.

All of them return one value for each question (`scores`, or `right`) beside the totals, for intervals over questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

METRICS = (
    "vqa_accuracy",
    "gqa_match",
    "scienceqa_match",
    "pope",
    "mme",
    "mmbench_circular",
    "anls",
    "exact_word",
)
"""Names of all metrics; each is the name of a folder here, and of the file in it."""


def metric_path(name: str) -> Path:
    """Return the file of a metric, which `evaluate.load` takes.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r}; allowed: {', '.join(METRICS)}")
    return Path(__file__).parent / name / f"{name}.py"


def load_metric(name: str) -> Any:
    """Load a metric.

    Parameters
    ----------
    name : str
        One of `METRICS`.

    Returns
    -------
    evaluate.Metric
        Its `compute(predictions=…, references=…)` returns a dict.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    import evaluate

    return evaluate.load(str(metric_path(name)), keep_in_memory=True)
