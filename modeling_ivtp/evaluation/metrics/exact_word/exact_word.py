"""Exact match of the first word: a metric for the `evaluate` package, loaded by its path without a network."""

import re
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Share of answers whose first word, in small letters and without punctuation, is the reference's."
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: the one right word each, a list of str.
Returns:
    accuracy: share of right answers; nan without any.
    right: list of bool, one for each answer.
"""


def first_word(text: str) -> str:
    """Return the first word of a text in lower case, without punctuation around it; "" if there is none."""
    found = re.search(r"\w+(?:[-']\w+)*", text.lower())
    return found.group() if found else ""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ExactWord(evaluate.Metric):
    """The share of answers whose first word is right."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        right = [first_word(said) == first_word(wanted) for said, wanted in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right) if right else float("nan"), "right": right}
