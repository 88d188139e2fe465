"""VQA accuracy: a metric for the `evaluate` package, loaded by its path without a network.

Antol et al., VQA: Visual Question Answering, ICCV 2015, Sec. 5; the normalisation is that of the VQA challenge, with
the quirks of its script. VQAv2 and VizWiz are scored with it, TextVQA with the variant of Pythia (`reading="textvqa"`).
"""

import re
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Agreement with ten people: an answer that three others gave is fully right, averaged over leaving each person out.
Answers are compared after normalisation: small letters, no articles, digits for number words up to ten, apostrophes
in contractions, no punctuation.
"""
_INPUTS = """
Args:
    predictions: what the model said, a list of str.
    references: the answers of the people who were asked, a list of lists of str, ten in each.
    reading: "vqa" (VQAv2, VizWiz), or "textvqa", which takes away commas and question marks first and parts "'s".
Returns:
    accuracy: mean over the questions, from 0 to 1; nan without any.
    scores: list of float, one for each question.
"""

READINGS = ("vqa", "textvqa")
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
MARKS = tuple(';/[]"{}()=+\\_-><@`,?!')
"""Marks that are taken away, or make room for a space."""
_GROUPED_DIGITS = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll
you'd you'd've you'll you're you've 'ow's'at 'twas
"""


def _contractions() -> dict[str, str]:
    """Return the words that lack one apostrophe, each with its right spelling."""
    found = {}
    for word in _CONTRACTED.split():
        for place in (place for place, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    # One entry of the challenge's list goes the other way.
    found["somebody'd"] = "somebodyd"
    return found


CONTRACTIONS = _contractions()


def normalised(text: str, reading: str = "vqa") -> str:
    """Normalise an answer.

    Parameters
    ----------
    text : str
    reading : str
        One of `READINGS`.

    Returns
    -------
    str
        In small letters, its words parted by single spaces.
    """
    if reading == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    # If digits are grouped by commas, or the mark stands at a word's edge anywhere, the mark goes without a space.
    grouped = _GROUPED_DIGITS.search(text) is not None
    changed = text
    for mark in MARKS:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if grouped or at_an_edge else " ")
    return _PERIOD.sub("", changed)


def accuracy(said: str, answers: list[str], reading: str = "vqa") -> float:
    """Return how far people agree with an answer, from 0 to 1.

    Raises
    ------
    ValueError
        If nobody answered.
    """
    if not answers:
        raise ValueError("a question has no answers of people; VQA accuracy needs them")
    wanted = normalised(said, reading)
    same = [normalised(answer, reading) == wanted for answer in answers]
    # One who gave the same answer leaves one agreement less among the others.
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class VQAAccuracy(evaluate.Metric):
    """Agreement with people who answered the same question."""

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

    def _compute(self, predictions: list[str], references: list[list[str]], reading: str = "vqa") -> dict[str, Any]:
        if reading not in READINGS:
            raise ValueError(f"reading={reading!r}; allowed: {', '.join(READINGS)}")
        scores = [accuracy(said, answers, reading) for said, answers in zip(predictions, references, strict=True)]
        return {"accuracy": sum(scores) / len(scores) if scores else float("nan"), "scores": scores}
