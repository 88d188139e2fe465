"""MMBench's circular score: a metric for the `evaluate` package, loaded by its path without a network.

Liu et al., MMBench: Is Your Multi-modal Model an All-around Player?, ECCV 2024, Sec. 4.1 and 4.2. Answers are read by
the paper's rules alone. The paper asks a language model about those that the rules cannot read; here they are wrong,
and counted. LLaVA answers with a letter, which the rules read.
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
A question is asked once for each rotation of its options, and is right if all rotations are. Rotations of one question
have indices that differ by multiples of a million.
"""
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: a list of dicts: "index" (int), "answer" (the right letter), "options" (texts of A, B, C and D, in this
        order; empty texts for those that a question lacks).
Returns:
    accuracy: share of questions of which all rotations are right; nan without any.
    right: list of bool, one for each question, by rising index.
    single: share of right answers when every rotation counts by itself.
    unread: number of answers in which the rules found no option.
"""
ROUND = 1_000_000
"""The indices of two successive rotations of a question differ by this much."""
LETTERS = "ABCDE"
_FORMS = (
    *(("", after) for after in ("", ".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)
"""Characters before and after a letter, in the order in which forms are tried."""


def option(said: str, options: list[str]) -> str | None:
    """Return the letter of the option that an answer chooses, or None if the rules cannot tell.

    A letter that stands alone decides, bare or with marks around it, if no other does in the same form. Otherwise the
    one option whose text is part of the answer decides. In an answer of more than three words a bare "A" is an article.

    Parameters
    ----------
    said : str
    options : list of str
        Texts of the options A, B, …; empty: there is none.
    """
    words = said.split()
    for before, after in _FORMS:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        is_article = not before and not after and found == ["A"] and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    named = [letter for letter, text in zip(LETTERS, options, strict=False) if text and text.lower() in said.lower()]
    return named[0] if len(named) == 1 else None


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MMBenchCircular(evaluate.Metric):
    """Multiple choice in which a question counts once, with all rotations of its options."""

    def _info(self) -> Any:
        reference = {
            "index": datasets.Value("int64"),
            "answer": datasets.Value("string"),
            "options": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": reference}),
        )

    def _compute(self, predictions: list[str], references: list[dict[str, Any]]) -> dict[str, Any]:
        rounds: dict[int, list[bool]] = defaultdict(list)
        unread = 0
        for said, reference in zip(predictions, references, strict=True):
            if reference["answer"] not in LETTERS or not reference["answer"]:
                raise ValueError(f"answer={reference['answer']!r}; allowed: {', '.join(LETTERS)}")
            chosen = option(said, reference["options"])
            unread += chosen is None
            rounds[reference["index"] % ROUND].append(chosen == reference["answer"])
        right = [all(rounds[index]) for index in sorted(rounds)]
        nothing = float("nan")
        return {
            "accuracy": sum(right) / len(right) if right else nothing,
            "right": right,
            "single": sum(map(sum, rounds.values())) / len(predictions) if predictions else nothing,
            "unread": unread,
        }
