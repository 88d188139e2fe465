"""ANLS: a metric for the `evaluate` package, loaded by its path without a network.

Biten et al., Scene Text Visual Question Answering, ICCV 2019, Eq. 1; as in the script of the DocVQA challenge.
"""

from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Average normalised Levenshtein similarity: one less the edits between an answer and the reference, divided by the
longer one's length. The nearest reference counts, and a similarity below the threshold is 0.
"""
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: all right answers of each question, a list of lists of str.
    threshold: the least similarity that counts, 0.5 by default.
Returns:
    anls: mean over the questions, from 0 to 1; nan without any.
    scores: list of float, one for each question.
"""


def edits(one: str, other: str) -> int:
    """Return the Levenshtein distance: the fewest letters to insert, remove or replace."""
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        above, row = row, [place]
        for column, wanted in enumerate(other):
            row.append(min(above[column + 1] + 1, row[column] + 1, above[column] + (letter != wanted)))
    return row[-1]


def similarity(said: str, answer: str) -> float:
    """Return 1 for the same words, without regard to capitals and spaces, and down to 0 the more letters differ."""
    # The challenge's script measures lengths before it takes spaces away.
    longest = max(len(said.upper()), len(answer.upper()))
    distance = edits(" ".join(said.lower().split()), " ".join(answer.lower().split()))
    return 1 - distance / longest if longest else 1.0


def anls(said: str, answers: list[str], threshold: float = 0.5) -> float:
    """Return the similarity to the nearest answer, or 0 if it is below the threshold.

    Raises
    ------
    ValueError
        If there is no answer.
    """
    if not answers:
        raise ValueError("a question has no right answers; ANLS needs at least one")
    best = max(similarity(said, answer) for answer in answers)
    return best if best >= threshold else 0.0


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ANLS(evaluate.Metric):
    """Similarity in letters, which forgives slips in reading."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], threshold: float = 0.5) -> dict[str, Any]:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}; allowed: from 0 to 1")
        scores = [anls(said, answers, threshold) for said, answers in zip(predictions, references, strict=True)]
        return {"anls": sum(scores) / len(scores) if scores else float("nan"), "scores": scores}
