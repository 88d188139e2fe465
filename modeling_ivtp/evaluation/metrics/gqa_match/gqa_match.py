"""GQA's exact match: a metric for the `evaluate` package, loaded by its path without a network.

Hudson and Manning, GQA, CVPR 2019. LLaVA answers with a capital letter and a period, so both are ignored.
"""

import string
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Share of answers that equal the reference, without regard to capitals and punctuation."
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: the right answers, a list of str.
Returns:
    accuracy: share of right answers; nan without any.
    right: list of bool, one for each answer.
"""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in small letters, without ASCII punctuation and without space around it."""
    return text.lower().translate(_NO_PUNCTUATION).strip()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class GQAMatch(evaluate.Metric):
    """The share of answers that are the reference."""

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
        right = [normalised(said) == normalised(wanted) for said, wanted in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right) if right else float("nan"), "right": right}
