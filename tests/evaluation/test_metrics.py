"""Metrics on cases whose scores are worked out by hand."""

import math
import shutil
from pathlib import Path
from typing import Any

import evaluate
import pytest

from modeling_ivtp.evaluation import METRICS, load_metric, metric_path
from modeling_ivtp.evaluation.metrics.anls.anls import edits
from modeling_ivtp.evaluation.metrics.mmbench_circular.mmbench_circular import option
from modeling_ivtp.evaluation.metrics.vqa_accuracy.vqa_accuracy import normalised


def compute(name: str, predictions: list[str], references: list[Any], **options: Any) -> dict[str, Any]:
    return load_metric(name).compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("red", ["red"] * 10, 1.0),
        # Four agree: the six others each find four, the four agreeing find three: all at least three.
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        # Three agree: seven others find three (1), the three themselves find two (2/3).
        ("red", ["red"] * 3 + ["blue"] * 7, (7 + 3 * 2 / 3) / 10),
        ("red", ["red"] * 2 + ["blue"] * 8, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        ("red", ["red"] + ["blue"] * 9, 9 * (1 / 3) / 10),
        ("green", ["red"] * 10, 0.0),
        ("A red, bus!", ["red bus"] * 10, 1.0),
        ("Two", ["2"] * 10, 1.0),
        ("dont know", ["don't know"] * 10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out_once(said: str, answers: list[str], expected: float) -> None:
    result = compute("vqa_accuracy", [said], [answers])
    assert result["accuracy"] == pytest.approx(expected)
    assert result["scores"] == pytest.approx([expected])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two  dogs", "2 dogs"),
        ("an apple", "apple"),
        ("none", "0"),
        ("yall'd've", "y'all'd've"),
        ("wouldnt", "wouldn't"),
        ("lets", "lets"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # grouped digits let every mark go without a space
        ("on/off", "on off"),
        ("what? no", "what no"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("no.\nyes", "no yes"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_challenge_does(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_textvqa_parts_the_genitive_and_drops_commas() -> None:
    assert normalised("Macy's", "textvqa") == "macy 's"
    assert normalised("Macy's") == "macy's"
    assert normalised("a,b", "textvqa") == "ab"
    assert normalised("a,b") == "b"
    assert compute("vqa_accuracy", ["joe's"], [["joe 's"] * 10], reading="textvqa")["accuracy"] == 1
    assert compute("vqa_accuracy", ["joe's"], [["joe 's"] * 10])["accuracy"] == 0


def test_gqa_ignores_capitals_and_punctuation_but_not_words() -> None:
    result = compute("gqa_match", ["Left.", "t-shirt", "the left", ""], ["left", "T-shirt", "left", "left"])
    assert result == {"accuracy": 0.5, "right": [True, True, False, False]}


def test_scienceqa_reads_the_letter_that_is_chosen() -> None:
    said = ["B", "b", "B. oxygen", "The answer is B.", "oxygen", "C", "Because B", ""]
    result = compute("scienceqa_match", said, ["B"] * 8)
    assert result["right"] == [True, True, True, True, False, False, False, False]
    assert (result["accuracy"], result["unread"]) == (0.5, 3)


def test_pope_counts_what_the_model_says() -> None:
    said = ["Yes", "Yes, there is.", "No", "There is not a dog. Yes", "Yes", "no"]
    wanted = ["yes", "no", "no", "yes", "yes", "no"]
    result = compute("pope", said, wanted)
    assert result.pop("right") == [True, False, True, False, True, True]
    assert result == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 3 / 6}
    )
    strict = compute("pope", said, wanted, reading="strict")
    assert strict["right"] == [True, False, True, False, True, True]
    assert strict["yes_rate"] == pytest.approx(2 / 6)  # the sentences are neither yes nor no
    assert strict["precision"] == 1
    never = compute("pope", ["no", "no"], ["yes", "no"])
    assert (never["precision"], never["recall"], never["f1"], never["yes_rate"]) == (0, 0, 0, 0)


def mme(answer: str, picture: str, category: str = "color") -> dict[str, str]:
    return {"answer": answer, "picture": picture, "category": category}


def test_mme_adds_accuracy_and_accuracy_of_pairs() -> None:
    references = [mme("Yes", "1"), mme("No", "1"), mme("Yes", "2"), mme("No", "2")]
    references += [mme("Yes", "1", "code_reasoning"), mme("No", "1", "code_reasoning")]
    result = compute("mme", ["Yes", "no.", "Yes, it is", "Yes", "maybe", "nope"], references)
    assert result["by_category"]["color"] == pytest.approx({"accuracy": 0.75, "accuracy_plus": 0.5, "score": 125})
    assert result["by_category"]["code_reasoning"]["score"] == pytest.approx(50)
    assert result["perception"] == pytest.approx(125)
    assert result["cognition"] == pytest.approx(50)
    assert result["perception_share"] == pytest.approx(0.625)
    assert result["right"] == [True, True, True, False, False, True]


def mmbench(index: int, answer: str, options: list[str]) -> dict[str, Any]:
    return {"index": index, "answer": answer, "options": options}


def test_mmbench_needs_every_rotation() -> None:
    references = [
        mmbench(7, "A", ["cat", "dog"]),
        mmbench(1_000_007, "B", ["dog", "cat"]),
        mmbench(8, "A", ["one", "two"]),
        mmbench(1_000_008, "B", ["two", "one"]),
    ]
    result = compute("mmbench_circular", ["A", "B.", "A", "A"], references)
    assert result == {"accuracy": 0.5, "right": [True, False], "single": 0.75, "unread": 0}
    assert compute("mmbench_circular", ["cat"] * 2 + ["?"] * 2, references)["unread"] == 2


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B", "B"),
        ("It is a dog.", "B"),
        ("A or B", None),
        ("A man with a dog", "B"),  # more than three words: "A" is an article
        ("A big cat", "A"),
        ("a cat and a dog", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_options_are_read_by_mmbench_rules(said: str, expected: str | None) -> None:
    assert option(said, ["cat", "dog", "", ""]) == expected


def test_anls_takes_the_nearest_answer_above_the_threshold() -> None:
    said = ["Coca Cola", "coca  colo", "pepsi", ""]
    result = compute("anls", said, [["coca cola", "coke"]] * 4)
    # The script measures lengths with the two spaces.
    assert result["scores"] == pytest.approx([1, 1 - 1 / 10, 0, 0])
    assert result["anls"] == pytest.approx(1.9 / 4)
    assert compute("anls", ["ab"], [["ac"]])["anls"] == 0.5
    assert compute("anls", ["ab"], [["ac"]], threshold=0.6)["anls"] == 0
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("a", "a"))] == [3, 3, 2, 0]


def test_the_first_word_is_compared() -> None:
    said = ["Yes.", " yes it is", "no yes", "", "red, I think", "northwestern"]
    result = compute("exact_word", said, ["yes", "yes", "yes", "yes", "red", "northwest"])
    assert result == {"accuracy": 0.5, "right": [True, True, False, False, True, False]}


@pytest.mark.parametrize(
    ("name", "predictions", "references", "options", "message"),
    [
        ("vqa_accuracy", ["x"], [[]], {}, "no answers of people"),
        ("vqa_accuracy", ["x"], [["x"]], {"reading": "gqa"}, "reading='gqa'; allowed: vqa, textvqa"),
        ("pope", ["x"], ["maybe"], {}, "references='maybe'; allowed: yes, no"),
        ("pope", ["x"], ["yes"], {"reading": "lax"}, "reading='lax'; allowed: pope, strict"),
        ("mme", ["x"], [mme("maybe", "1")], {}, "answer='maybe'; allowed: yes, no"),
        ("mme", ["x"], [mme("yes", "1", "taste")], {}, "category='taste'; allowed: existence"),
        ("mme", ["x"], [mme("yes", "1")], {}, "picture '1' of color has 1 question"),
        ("mmbench_circular", ["x"], [mmbench(1, "F", ["a"])], {}, "answer='F'; allowed: A, B, C, D, E"),
        ("anls", ["x"], [[]], {}, "no right answers"),
        ("anls", ["x"], [["x"]], {"threshold": 2.0}, "threshold=2.0; allowed: from 0 to 1"),
    ],
)
def test_wrong_input_is_refused(
    name: str, predictions: list[str], references: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        compute(name, predictions, references, **options)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric='bleu'; allowed: vqa_accuracy, gqa_match"):
        metric_path("bleu")


EXAMPLE: dict[str, Any] = {
    "vqa_accuracy": ["red"] * 10,
    "anls": ["red"],
    "mme": mme("yes", "1"),
    "mmbench_circular": mmbench(1, "A", ["red"]),
    "scienceqa_match": "A",
    "pope": "yes",
    "gqa_match": "red",
    "exact_word": "red",
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_stands_alone_in_its_file(name: str, tmp_path: Path) -> None:
    copied = shutil.copyfile(metric_path(name), tmp_path / f"{name}.py")
    assert "modeling_ivtp" not in copied.read_text()
    metric = evaluate.load(str(copied), keep_in_memory=True)
    if name != "mme":  # it wants pairs
        assert metric.compute(predictions=["red"], references=[EXAMPLE[name]])
    assert "predictions" in metric.inputs_description


def test_without_questions_a_share_is_no_number() -> None:
    from modeling_ivtp.evaluation.metrics.gqa_match.gqa_match import GQAMatch

    assert math.isnan(GQAMatch()._compute([], [])["accuracy"])
