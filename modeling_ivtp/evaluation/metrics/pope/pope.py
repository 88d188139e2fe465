"""POPE: a metric for the `evaluate` package, loaded by its path without a network.

Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, Sec. 5.
"""

from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Yes or no: accuracy, precision, recall and F1 of yes, and how often the model says yes."
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: "yes" or "no", a list of str.
    reading: "pope": the first sentence says no if one of its words is "no", "No" or "not", and otherwise yes.
        "strict": only "yes" and "no" themselves count; any other answer is wrong, and is neither.
Returns:
    accuracy, precision, recall, f1: from 0 to 1; nan without questions, 0 where nothing can be divided.
    yes_rate: share of questions that the model answered with yes.
    right: list of bool, one for each question.
"""
READINGS = ("pope", "strict")


def read(said: str, reading: str = "pope") -> str | None:
    """Return "yes", "no", or None for an answer that is neither (which only "strict" knows)."""
    if reading == "strict":
        word = said.strip().lower()
        return word if word in ("yes", "no") else None
    words = said.split(".")[0].replace(",", "").split()
    return "no" if {"no", "No", "not"} & set(words) else "yes"


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class POPE(evaluate.Metric):
    """Yes-or-no questions about objects, half of which are not there."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], reading: str = "pope") -> dict[str, Any]:
        if reading not in READINGS:
            raise ValueError(f"reading={reading!r}; allowed: {', '.join(READINGS)}")
        wanted = [reference.strip().lower() for reference in references]
        if unknown := sorted(set(wanted) - {"yes", "no"}):
            raise ValueError(f"references={unknown[0]!r}; allowed: yes, no")
        said = [read(prediction, reading) for prediction in predictions]
        right = [one == other for one, other in zip(said, wanted, strict=True)]
        both = sum(one and other == "yes" for one, other in zip(right, wanted, strict=True))
        precision, recall = _ratio(both, said.count("yes")), _ratio(both, wanted.count("yes"))
        number = len(wanted)
        return {
            "accuracy": sum(right) / number if number else float("nan"),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "yes_rate": said.count("yes") / number if number else float("nan"),
            "right": right,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
