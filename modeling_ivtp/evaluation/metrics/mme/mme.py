"""MME: a metric for the `evaluate` package, loaded by its path without a network.

Fu et al., MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models, 2023, Sec. 2.3.
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Two yes-or-no questions about each picture. Accuracy counts questions, accuracy+ pictures of which both questions are
answered right; a category's score is their sum in %, so 200 at most.
"""
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: a list of dicts: "answer" ("yes" or "no"), "picture" (the same for the two questions of a picture),
        "category" (one of MME's fourteen).
Returns:
    perception, cognition: sums of the categories' scores; at most 2000 and 800 for all of MME.
    perception_share: perception of what its categories can give, which is how tables with other benchmarks print it.
    by_category: for each category "accuracy" and "accuracy_plus", from 0 to 1, and "score".
    right: list of bool, one for each question.
"""
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_BEST = 200.0


def read(said: str) -> str:
    """Return "yes", "no" or "other": the answer itself, its only letter, or the word among its first four letters."""
    text = said.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MME(evaluate.Metric):
    """Pairs of yes-or-no questions about pictures of fourteen categories."""

    def _info(self) -> Any:
        reference = {name: datasets.Value("string") for name in ("answer", "picture", "category")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": reference}),
        )

    def _compute(self, predictions: list[str], references: list[dict[str, str]]) -> dict[str, Any]:
        right = []
        pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for said, reference in zip(predictions, references, strict=True):
            wanted, category = reference["answer"].strip().lower().replace(".", ""), reference["category"]
            if wanted not in ("yes", "no"):
                raise ValueError(f"answer={reference['answer']!r}; allowed: yes, no")
            if category not in PERCEPTION + COGNITION:
                raise ValueError(f"category={category!r}; allowed: {', '.join(PERCEPTION + COGNITION)}")
            right.append(read(said) == wanted)
            pictures[category][reference["picture"]].append(right[-1])
        by_category = {category: _scores(category, pairs) for category, pairs in pictures.items()}
        perception = [by_category[category]["score"] for category in PERCEPTION if category in by_category]
        cognition = [by_category[category]["score"] for category in COGNITION if category in by_category]
        return {
            "perception": sum(perception),
            "cognition": sum(cognition),
            "perception_share": sum(perception) / (_BEST * len(perception)) if perception else float("nan"),
            "by_category": by_category,
            "right": right,
        }


def _scores(category: str, pairs: dict[str, list[bool]]) -> dict[str, float]:
    for picture, answers in pairs.items():
        if len(answers) != 2:
            raise ValueError(f"picture {picture!r} of {category} has {len(answers)} question(s); MME has two for each")
    accuracy = sum(map(sum, pairs.values())) / (2 * len(pairs))
    plus = sum(map(all, pairs.values())) / len(pairs)
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}
