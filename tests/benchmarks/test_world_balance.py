"""Who cannot see can only guess: priors are even, and the words of a question say nothing about its answer."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.quality.world import (
    COLOURS,
    CORNERS,
    NUMBERS,
    TYPES,
    Question,
    all_words,
    chance,
    draw_scene,
    kinds,
    questions,
    sample_questions,
)
from benchmarks.quality.world.wording import words_of

OPTIONS = {
    "existence": ("yes", "no"),
    "count": NUMBERS,
    "colour": COLOURS,
    "corner": CORNERS,
    "colour_of_neighbour": COLOURS,
}
NAMES = tuple(kind.name for kind in kinds())


@pytest.fixture(scope="module")
def sampled() -> dict[str, list[Question]]:
    """22,000 questions of the test, one for a scene."""
    by_type: dict[str, list[Question]] = {type: [] for type in TYPES}
    for _, question in sample_questions("test", 22_000):
        by_type[question.type].append(question)
    return by_type


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Question]]:
    """Every question of 3,000 training scenes: what a model learns from."""
    by_type: dict[str, list[Question]] = {type: [] for type in TYPES}
    for index in range(3_000):
        for question in questions(draw_scene("train", index)):
            by_type[question.type].append(question)
    return by_type


def excess(answers: list[str], options: tuple[str, ...]) -> tuple[float, float]:
    """How far the most frequent answer lies above an even share, and χ² in standard deviations above its mean."""
    seen = np.array([answers.count(option) for option in options])
    assert seen.sum() == len(answers)
    even, freedom = len(answers) / len(options), len(options) - 1
    return seen.max() / even - 1, (((seen - even) ** 2 / even).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize("type", TYPES)
def test_answers_are_even(type: str, sampled: dict[str, list[Question]]) -> None:
    options = OPTIONS.get(type, NAMES)
    most, surprise = excess([question.answer for question in sampled[type]], options)
    assert most < (0.15 if type in OPTIONS else 0.75)  # 31 of each name are expected: chance alone makes it 0.5
    assert surprise < 4


@pytest.mark.slow
@pytest.mark.parametrize("type", OPTIONS)
def test_answers_are_even_in_training_too(type: str, trained: dict[str, list[Question]]) -> None:
    most, _ = excess([question.answer for question in trained[type]], OPTIONS[type])
    assert most < 0.06


@pytest.mark.slow
def test_names_are_even_over_all_relations(trained: dict[str, list[Question]]) -> None:
    answers = [q.answer for type in TYPES if type not in OPTIONS and type != "larger" for q in trained[type]]
    most, _ = excess(answers, NAMES)
    assert most < 0.3  # about 150 of each name are expected


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_absent_kinds_are_as_plausible_as_present_ones(answer: str, trained: dict[str, list[Question]]) -> None:
    asked = [q.text[q.spans[0].start : q.spans[0].stop] for q in trained["existence"] if q.answer == answer]
    assert excess(asked, NAMES)[0] < 0.2


@pytest.mark.slow
def test_the_larger_one_is_named_first_half_of_the_time(sampled: dict[str, list[Question]]) -> None:
    first = []
    for question in sampled["larger"]:
        names = [question.text[a:b] for a, b, role in question.spans if role == "object"]
        assert question.answer in names
        first.append(names[0] == question.answer)
    assert abs(np.mean(first) - 0.5) < 0.03


def bags(asked: list[Question]) -> np.ndarray:
    """Which words a question contains, (questions, words)."""
    places = {word: place for place, word in enumerate(all_words())}
    table = np.zeros((len(asked), len(places)))
    for row, question in enumerate(asked):
        table[row, [places[word] for word in words_of(question.text)]] = 1
    return table


def naive_bayes(asked: list[Question], answers: list[str], unseen: list[Question]) -> list[str]:
    """What a bag of words would answer, all answers being equally likely beforehand."""
    table = bags(asked)
    scores = []
    for answer in answers:
        mine = np.array([question.answer == answer for question in asked])
        present = (table[mine].sum(axis=0) + 0.5) / (mine.sum() + 1)
        scores.append((np.log(present) - np.log1p(-present), np.log1p(-present).sum()))
    score = bags(unseen) @ np.array([weight for weight, _ in scores]).T + np.array([bias for _, bias in scores])
    return [answers[best] for best in score.argmax(axis=1)]


@pytest.mark.parametrize("type", TYPES)
def test_words_alone_do_not_answer(
    type: str, trained: dict[str, list[Question]], sampled: dict[str, list[Question]]
) -> None:
    answers = sorted({question.answer for question in trained[type]})
    guessed = naive_bayes(trained[type], answers, sampled[type])
    right = np.mean([guess == question.answer for guess, question in zip(guessed, sampled[type], strict=True)])
    assert right <= chance(type) + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("type", TYPES)
def test_the_most_frequent_answer_of_training_does_not_pay(
    type: str, trained: dict[str, list[Question]], sampled: dict[str, list[Question]]
) -> None:
    favourite = Counter(question.answer for question in trained[type]).most_common(1)[0][0]
    assert np.mean([question.answer == favourite for question in sampled[type]]) <= chance(type) + 0.03
