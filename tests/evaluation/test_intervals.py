"""Intervals of scores, against plain resampling of questions one by one, and the test for few questions."""

import itertools
from typing import Any

import numpy as np
import pytest

from modeling_ivtp.evaluation import paper
from modeling_ivtp.evaluation.intervals import (
    bootstrap_interval,
    difference_interval,
    interval_of,
    score_interval,
    sign_test,
)

RESAMPLES, NUMBER = 2000, 160
KINDS = ("adversarial", "popular", "random")
CATEGORIES = ("color", "count", "code_reasoning")


def pope(seed: int, skill: float) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    wanted = np.random.default_rng(9).choice(["yes", "no"], NUMBER)
    said = [word if draws.random() < skill else {"yes": "no", "no": "yes"}[word] for word in wanted]
    docs = [{"answer": str(word), "category": KINDS[n % 3]} for n, word in enumerate(wanted)]
    return [{"doc": doc, "filtered_resps": [word]} for doc, word in zip(docs, said, strict=True)]


def mean_f1(samples: list[dict[str, Any]]) -> float:
    found = []
    for kind in KINDS:
        rows = [sample for sample in samples if sample["doc"]["category"] == kind]
        said = [sample["filtered_resps"][0] == "yes" for sample in rows]
        wanted = [sample["doc"]["answer"] == "yes" for sample in rows]
        right = sum(one and other for one, other in zip(said, wanted, strict=True))
        precision, recall = right / sum(said), right / sum(wanted)
        found.append(2 * precision * recall / (precision + recall))
    return 100 * sum(found) / 3


def mme(seed: int, skill: float) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    samples = []
    for picture in range(NUMBER):
        for answer, other in (("Yes", "No"), ("No", "Yes")):
            doc = {"answer": answer, "question_id": f"{picture}.png", "category": CATEGORIES[picture % 3]}
            samples.append({"doc": doc, "filtered_resps": [answer if draws.random() < skill else other]})
    return samples


def perception(samples: list[dict[str, Any]]) -> float:
    found = []
    for category in CATEGORIES[:2]:
        right = [
            sample["doc"]["answer"] == sample["filtered_resps"][0]
            for sample in samples
            if sample["doc"]["category"] == category
        ]
        pairs = list(zip(right[::2], right[1::2], strict=True))
        found.append(sum(right) / len(right) + sum(all(pair) for pair in pairs) / len(pairs))
    return 100 * sum(found) / 4


def resampled(samples: list[dict[str, Any]], size: int, draws: Any) -> list[dict[str, Any]]:
    """Draw units of `size` questions with replacement."""
    units = [samples[first : first + size] for first in range(0, len(samples), size)]
    return [sample for number in draws.integers(len(units), size=len(units)) for sample in units[number]]


@pytest.mark.parametrize(
    ("make", "score", "plain", "size"), [(pope, paper._pope, mean_f1, 1), (mme, paper._mme, perception, 2)]
)
def test_intervals_are_those_of_questions_drawn_one_by_one(make: Any, score: Any, plain: Any, size: int) -> None:
    ours, theirs = make(0, 0.8), make(1, 0.7)
    found, base = score(ours), score(theirs)
    assert found.value == pytest.approx(plain(ours))
    same = [np.random.default_rng(2), np.random.default_rng(2)]
    pairs = [(plain(resampled(ours, size, same[0])), plain(resampled(theirs, size, same[1]))) for _ in range(RESAMPLES)]
    values = np.array(pairs)
    expected = np.quantile(values[:, 0], [0.025, 0.975])
    assert interval_of(found.columns, found.statistic) == pytest.approx(expected, abs=0.8)
    expected = np.quantile(values[:, 0] - values[:, 1], [0.025, 0.975])
    paired = difference_interval(found.columns, base.columns, found.statistic)
    assert paired == pytest.approx(expected, abs=0.8)
    # The control: an arm differs from itself only where its questions stand in another order.
    assert difference_interval(found.columns, found.columns, found.statistic) == (0, 0)
    assert difference_interval(found.columns, np.roll(found.columns, 3, axis=0), found.statistic) != (0, 0)


def test_pairs_of_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="Pairs need the same questions"):
        difference_interval(np.ones((2, 1)), np.ones((3, 1)), lambda sums: sums[:, 0])
    with pytest.raises(ValueError, match="at least one question"):
        interval_of(np.ones((0, 1)), lambda sums: sums[:, 0])


@pytest.mark.parametrize(("gained", "lost", "alike"), [(0, 0, 3), (1, 0, 0), (5, 0, 2), (6, 0, 0), (2, 8, 5)])
def test_the_sign_test_counts_the_patterns_of_signs_that_are_as_uneven(gained: int, lost: int, alike: int) -> None:
    right = np.array([True] * gained + [False] * lost + [True] * alike)
    reference = np.array([False] * gained + [True] * lost + [True] * alike)
    patterns = list(itertools.product((-1, 1), repeat=gained + lost))
    uneven = sum(abs(sum(signs)) >= abs(gained - lost) for signs in patterns)
    assert sign_test(right, reference) == pytest.approx(uneven / len(patterns))
    assert sign_test(reference, right) == sign_test(right, reference)


def test_all_right_answers_to_few_questions_do_not_make_a_sure_score() -> None:
    low, high = score_interval(np.ones(20))
    assert (low, high) == (pytest.approx(0.8389, abs=1e-4), 1)  # Wilson's interval of 20 out of 20
    assert score_interval(np.zeros(20)) == (0, pytest.approx(1 - low))
    assert score_interval(np.full(20, 0.5)) == (0.5, 0.5)
    mixed = np.arange(20) % 4 == 0
    assert score_interval(mixed) == bootstrap_interval(mixed)
