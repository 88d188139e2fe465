"""ScienceQA's match of letters: a metric for the `evaluate` package, loaded by its path without a network.

Lu et al., Learn to Explain, NeurIPS 2022; answers are read as LLaVA's evaluation reads them.
"""

import re
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Share of answers that choose the right letter; an answer without one is wrong."
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: the letter of the right choice, a list of str.
Returns:
    accuracy: share of right answers; nan without any.
    right: list of bool, one for each answer.
    unread: number of answers in which no letter was found.
"""
_SENTENCE = re.compile(r"[Tt]he answer is ([A-Z])\.")


def letter(said: str) -> str | None:
    """Return the letter that an answer chooses: "B", "b", "B. oxygen" or "The answer is B."; None if there is none."""
    said = said.strip()
    if re.fullmatch(r"[A-Za-z]", said):
        return said.upper()
    if re.match(r"[A-Z]\.", said):
        return said[0]
    found = set(_SENTENCE.findall(said))
    return found.pop() if len(found) == 1 else None


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ScienceQAMatch(evaluate.Metric):
    """The share of answers that choose the right letter."""

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
        if unknown := [wanted for wanted in references if not re.fullmatch(r"\s*[A-Za-z]\s*", wanted)]:
            raise ValueError(f"references={unknown[0]!r}; allowed: a letter from A to Z")
        chosen = [letter(said) for said in predictions]
        right = [one == wanted.strip().upper() for one, wanted in zip(chosen, references, strict=True)]
        return {
            "accuracy": sum(right) / len(right) if right else float("nan"),
            "right": right,
            "unread": chosen.count(None),
        }
