"""Metrics against lmms-eval's own functions on random answers, where it is installed: `make eval-test`."""

import copy
import random
from typing import Any

import pytest

from modeling_ivtp.evaluation import load_metric
from modeling_ivtp.evaluation.metrics.anls.anls import anls
from modeling_ivtp.evaluation.metrics.mmbench_circular.mmbench_circular import ROUND, option
from modeling_ivtp.evaluation.metrics.vqa_accuracy import vqa_accuracy

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; `make eval-test` has it in an environment of its own"
)

NUMBER = 1000
# fmt: off
WORDS = [
    "the", "a", "an", "one", "Two", "none", "ten", "dont", "don't", "couldnt've", "y'all'd've", "somebody'd", "hes",
    "Macy's", "it's", "1,000", "2,5", "3.14", "U.S.", "on/off", "t-shirt", "(left)", '"quote"', "what?", "no!", "yes",
    "YES", "No.", "red-blue", "_x_", "<tag>", "a;b", "{c}", "[d]", "=1", "+1", "\\", "@home", "`tick`", "left,",
    "right;", "blue",
]
# fmt: on


@pytest.fixture
def draws() -> random.Random:
    return random.Random(0)


def phrase(draws: random.Random, longest: int = 3) -> str:
    separator = draws.choice([" ", " ", " ", "  ", "\n", "\t"])
    return separator.join(draws.choice(WORDS) for _ in range(draws.randint(1, longest)))


def asked_ten(draws: random.Random) -> tuple[str, list[str]]:
    """A model's answer and those of ten people, alike often enough for every score between 0 and 1."""
    pool = [phrase(draws, 2) for _ in range(draws.randint(1, 4))]
    answers = [draws.choice(pool) for _ in range(10)]
    return draws.choice([draws.choice(pool), draws.choice(pool).upper(), phrase(draws)]), answers


def test_contractions_are_those_of_the_challenge() -> None:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    # Words are in small letters when they are looked up, so keys with capitals are never found.
    theirs = {
        key: word for key, word in EvalAIAnswerProcessor.CONTRACTIONS.items() if key == key.lower() and key != word
    }
    assert theirs == vqa_accuracy.CONTRACTIONS


def test_vqa_accuracy(draws: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    said, answers = zip(*(asked_ten(draws) for _ in range(NUMBER)), strict=True)
    ours = load_metric("vqa_accuracy").compute(predictions=list(said), references=list(answers))
    theirs = [
        vqav2_process_results(
            {"question_id": 0, "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(ten)]}, [text]
        )["exact_match"]
        for text, ten in zip(said, answers, strict=True)
    ]
    assert ours["scores"] == pytest.approx(theirs)
    assert {0.0, 1.0} < {round(score, 3) for score in theirs}
    # Without normalisation the scores are others, or this test could not find a wrong one.
    monkeypatch.setattr(vqa_accuracy, "normalised", lambda text, reading: text)
    plain = [vqa_accuracy.accuracy(*asked) for asked in zip(said, answers, strict=True)]
    assert plain != pytest.approx(theirs)


def test_textvqa_accuracy(draws: random.Random) -> None:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    said, answers = zip(*(asked_ten(draws) for _ in range(NUMBER)), strict=True)
    ours = load_metric("vqa_accuracy").compute(predictions=list(said), references=list(answers), reading="textvqa")
    theirs = [
        textvqa_process_results({"question_id": 0, "answers": copy.copy(ten)}, [text])["exact_match"]
        for text, ten in zip(said, answers, strict=True)
    ]
    assert ours["scores"] == pytest.approx(theirs)


def test_gqa_match(draws: random.Random) -> None:
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    wanted = [draws.choice(WORDS) for _ in range(NUMBER)]
    said = [draws.choice([word, word.upper(), f"{word}.", draws.choice(WORDS)]) for word in wanted]
    ours = load_metric("gqa_match").compute(predictions=said, references=wanted)
    theirs = [
        bool(exact_match_hf_evaluate([one], [other], ignore_case=True, ignore_punctuation=True)["exact_match"])
        for one, other in zip(said, wanted, strict=True)
    ]
    assert ours["right"] == theirs
    assert 0 < sum(theirs) < NUMBER


def test_scienceqa_match(draws: random.Random) -> None:
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    docs = [{"choices": ["w", "x", "y", "z"], "answer": draws.randrange(4)} for _ in range(NUMBER)]
    said = [
        draws.choice(["{}", "{}.", "{}. because", " {} ", "{} x", "{}:"]).format(draws.choice("ABCDabcd"))
        for _ in range(NUMBER)
    ]
    ours = load_metric("scienceqa_match").compute(predictions=said, references=["ABCD"[doc["answer"]] for doc in docs])
    theirs = [bool(sqa_process_results(doc, [text])["exact_match"]) for doc, text in zip(docs, said, strict=True)]
    assert ours["right"] == theirs
    assert 0 < sum(theirs) < NUMBER


@pytest.mark.parametrize("reading", ["strict", "pope"])
def test_pope(draws: random.Random, reading: str) -> None:
    from lmms_eval.tasks.pope import utils

    answers = ["yes", "No", "YES", "no "] + (["maybe", "yes.", ""] if reading == "strict" else [])
    said = [draws.choice(answers) for _ in range(NUMBER)]
    # By the paper's reading a "NO" in capitals is none; LLaVA never shouts.
    wanted = [draws.choice(["yes", "no"]) for _ in range(NUMBER)]
    ours = load_metric("pope").compute(predictions=said, references=wanted, reading=reading)
    rows = [
        utils.pope_process_results({"question_id": n, "answer": other}, [one])["pope_accuracy"]
        for n, (one, other) in enumerate(zip(said, wanted, strict=True))
    ]
    assert ours["accuracy"] == pytest.approx(utils.pope_aggregate_accuracy(rows))
    assert ours["precision"] == pytest.approx(utils.pope_aggregate_precision(rows))
    # lmms-eval leaves answers that are neither out of the recall; the paper counts them as missed.
    readable = [row for row in rows if row["prediction"] in ("yes", "no")]
    if len(readable) == len(rows):
        assert ours["recall"] == pytest.approx(utils.pope_aggregate_recall(rows))
        assert ours["f1"] == pytest.approx(utils.pope_aggregate_f1_score(rows))
    # What lmms-eval calls the ratio of yes is that of the data set, not of the model.
    assert utils.pope_aggregate_yes_ratio(rows) == wanted.count("yes") / NUMBER
    assert ours["yes_rate"] == sum(row["prediction"] == "yes" for row in rows) / NUMBER


def test_mme(draws: random.Random) -> None:
    from lmms_eval.tasks.mme import utils

    categories = [*utils.eval_type_dict["Perception"], *utils.eval_type_dict["Cognition"]]
    said, docs = [], []
    for picture in range(NUMBER // 2):
        category = draws.choice(categories)
        for answer in ("Yes", "No"):
            docs.append({"question_id": f"{category}/{picture}.png", "category": category, "answer": answer})
            said.append(
                draws.choice([answer, answer, answer.upper(), "y", "n", "yes, it is", "No.", "maybe", "", "oh no"])
            )
    rows = [utils.mme_process_results(doc, [text]) for doc, text in zip(docs, said, strict=True)]
    references = [{"answer": doc["answer"], "picture": doc["question_id"], "category": doc["category"]} for doc in docs]
    ours = load_metric("mme").compute(predictions=said, references=references)
    for part in ("perception", "cognition"):
        theirs = utils.mme_aggregate_results([row[f"mme_{part}_score"] for row in rows if f"mme_{part}_score" in row])
        assert ours[part] == pytest.approx(theirs)
        assert theirs > 0


def test_options_of_mmbench(draws: random.Random) -> None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator, found = MMBench_Evaluator(), set()
    for _ in range(NUMBER):
        options = draws.sample(["cat", "dog", "a red bus", "two men", "left"], 4)
        said = mmbench_answer(draws, options)
        item = dict(zip("ABCD", options, strict=True)) | {"prediction": said}
        theirs = evaluator.prefetch_answer(item) or None
        assert option(said, options) == theirs, said
        found.add(theirs)
    assert found == {*"ABCDE", None}


def mmbench_answer(draws: random.Random, options: list[str]) -> str:
    letter = draws.choice("ABCDE")
    forms = [
        "{}",
        "{}.",
        "{},",
        "({})",
        "({}).",
        ":{}",
        ":{}.",
        "{}:",
        "{}).",
        "The answer is {}",
        "A man at {} here",
        "{} B",
    ]
    forms += ["It shows {option}", "{option} and dog", "A {option}", "nothing"]
    return draws.choice(forms).format(letter, option=draws.choice(options).capitalize())


def test_circular_score_of_mmbench(draws: random.Random) -> None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rows: list[dict[str, Any]] = []
    for index in range(NUMBER // 4):
        options = draws.sample(["cat", "dog", "a red bus", "two men", "left"], 4)
        right = draws.choice(options)
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            answer = "ABCD"[turned.index(right)]
            said = draws.choice([*[answer] * 5, f"{answer}.", draws.choice("ABCD"), turned[0]])
            row = {
                "index": index + turn * ROUND,
                "answer": answer,
                "prediction": said,
                "category": "c",
                "question": "?",
            }
            rows.append(row | dict(zip("ABCD", turned, strict=True)))
    theirs, *_ = MMBench_Evaluator().eval_result(copy.deepcopy(rows), eval_method="static")
    references = [{"index": r["index"], "answer": r["answer"], "options": [r[c] for c in "ABCD"]} for r in rows]
    ours = load_metric("mmbench_circular").compute(
        predictions=[row["prediction"] for row in rows], references=references
    )
    assert ours["unread"] == 0
    assert ours["accuracy"] == pytest.approx(theirs)
    assert 0 < theirs < ours["single"] < 1


def test_anls(draws: random.Random) -> None:
    from lmms_eval.api.metrics import anls as theirs

    for _ in range(NUMBER):
        answers = [phrase(draws) for _ in range(draws.randint(1, 3))]
        said = draws.choice(
            [phrase(draws), draws.choice(answers)[draws.randint(0, 2) :], draws.choice(answers).upper()]
        )
        assert anls(said, answers) == pytest.approx(theirs(answers, [said])["anls"])
