"""The twelve benchmarks of the paper's Table 1, as LLaVA-1.5 was published on them, and the table's printed rows.

Each is a task of lmms-eval, of which only what differs from LLaVA-1.5's own evaluation is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import Statistic
from .metrics import load_metric
from .metrics.mmbench_circular.mmbench_circular import ROUND
from .metrics.mme.mme import PERCEPTION
from .metrics.pope.pope import read as read_pope

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_CN = "请直接回答选项字母。"


@dataclass(frozen=True)
class Score:
    """A score of one arm on one benchmark.

    Attributes
    ----------
    value : float
        As Table 1 prints it, from 0 to 100.
    questions : int
        Those of MMBench count once, in whatever orders their options were shown.
    columns : float array (n, c)
        What each question adds to sums that decide the value; MME's are of each picture.
    statistic : callable
        From the sums to the value.
    more : dict
        Other scores of the benchmark.
    """

    value: float
    questions: int
    columns: np.ndarray
    statistic: Statistic
    more: Mapping[str, Any] = field(default_factory=dict)


Samples = Sequence[Mapping[str, Any]]
"""Fields that lmms-eval logs of each question: `doc`, `filtered_resps`, and the task's own results."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of Table 1.

    Attributes
    ----------
    name : str
        As `--benchmarks` takes it.
    title : str
        As the table's header prints it.
    file : str
        The task's file among those of lmms-eval.
    split : str
        The data set's split that the task asks.
    score : callable
        From the samples of a run to its `Score`.
    changes : dict
        Entries of the task's file that differ here.
    judge : bool
        Whether a language model judges the answers.
    note : str
        How its data or scoring differ from Table 1's.
    answer : str
        The data set's column of right answers.
    parts : tuple of str
        Entries of `Score.more` that the tables show beside the score.
    together : callable, optional
        From the data set to a value for each row, the same in rows that are scored together; None: no rows are.
    """

    name: str
    title: str
    file: str
    split: str
    score: Callable[[Samples], Score]
    changes: Mapping[str, Any] = field(default_factory=dict)
    judge: bool = False
    note: str = ""
    answer: str = "answer"
    parts: tuple[str, ...] = ()
    together: Callable[[Any], Sequence[Any]] | None = None

    def first_rows(self, data: Any, limit: int) -> list[int]:
        """Return the places of the first rows of a data set, and of those that are scored together with them."""
        if self.together is None:
            return list(range(min(limit, len(data))))
        values = self.together(data)
        first = set(values[:limit])
        return [place for place, value in enumerate(values) if value in first]


@dataclass(frozen=True)
class Measured:
    """The scores of a run.

    Attributes
    ----------
    scores : dict
        By benchmark and arm, each by its name.
    left_out : dict
        Benchmarks without scores, each with the reason.
    config : IVTPLlavaConfig
        The model's.
    unguided : dict
        Arms that no question could guide, each with what the checkpoint lacks for that.
    """

    scores: dict[str, dict[str, Score]]
    left_out: dict[str, str]
    config: Any
    unguided: dict[str, str] = field(default_factory=dict)


def answers(samples: Samples) -> list[str]:
    """Return the answers in the order of the samples."""
    return [str(sample["filtered_resps"][0]) for sample in samples]


def _mean(values: Sequence[float], **more: Any) -> Score:
    each = 100 * np.asarray(values, dtype=np.float64)
    return Score(float(each.mean()), len(each), np.stack([each, np.ones(len(each))], axis=1), _share, more)


def _share(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _in_blocks(rows: Sequence[Sequence[float]], kinds: Sequence[str]) -> np.ndarray:
    """Return rows of three numbers, (n, 3), each in the block of its kind: (n, 3 times the number of kinds)."""
    known = sorted(set(kinds))
    columns = np.zeros((len(rows), len(known), 3))
    columns[np.arange(len(rows)), [known.index(kind) for kind in kinds]] = rows
    return columns.reshape(len(rows), -1)


def _by_task(name: str) -> Callable[[Samples], Score]:
    """Return the mean of a value that the task gives each question."""
    return lambda samples: _mean([float(sample[name]) for sample in samples])


def _gqa(samples: Samples) -> Score:
    wanted = [str(sample["doc"]["answer"]) for sample in samples]
    return _mean(load_metric("gqa_match").compute(predictions=answers(samples), references=wanted)["right"])


def _scienceqa(samples: Samples) -> Score:
    wanted = ["ABCDE"[int(sample["doc"]["answer"])] for sample in samples]
    found = load_metric("scienceqa_match").compute(predictions=answers(samples), references=wanted)
    return _mean(found["right"], unread=found["unread"])


def _pope(samples: Samples) -> Score:
    """Return F1, averaged over the ways in which absent objects were chosen, as LLaVA-1.5 prints it."""
    said, kinds = answers(samples), [str(sample["doc"].get("category", "all")) for sample in samples]
    found = {}
    for kind in sorted(set(kinds)):
        rows = [place for place, other in enumerate(kinds) if other == kind]
        found[kind] = load_metric("pope").compute(
            predictions=[said[row] for row in rows],
            references=[str(samples[row]["doc"]["answer"]) for row in rows],
        )
        found[kind].pop("right")
    yes = [read_pope(text) == "yes" for text in said]
    wanted = [str(sample["doc"]["answer"]).strip().lower() == "yes" for sample in samples]
    counted = [(one and other, one, other) for one, other in zip(yes, wanted, strict=True)]
    value = 100 * float(np.mean([each["f1"] for each in found.values()]))
    return Score(value, len(said), _in_blocks(counted, kinds), _mean_f1, found)


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    """Return F1 in %, averaged over blocks of right yeses, said yeses and wanted yeses."""
    right, said, wanted = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
    return 100 * (2 * right / np.maximum(said + wanted, 1)).mean(axis=1)


def _mme(samples: Samples) -> Score:
    references = [
        {
            "answer": str(sample["doc"]["answer"]),
            "picture": str(sample["doc"]["question_id"]),
            "category": str(sample["doc"]["category"]),
        }
        for sample in samples
    ]
    if not any(reference["category"] in PERCEPTION for reference in references):
        raise ValueError(f"no row is of a category of perception, which are {', '.join(PERCEPTION)}")
    found = load_metric("mme").compute(predictions=answers(samples), references=references)
    pictures: dict[tuple[str, str], list[bool]] = {}
    for right, reference in zip(found.pop("right"), references, strict=True):
        if reference["category"] in PERCEPTION:
            pictures.setdefault((reference["category"], reference["picture"]), []).append(right)
    counted = [(1, sum(pair) / 2, all(pair)) for pair in pictures.values()]
    columns = _in_blocks(counted, [category for category, _ in pictures])
    return Score(100 * found["perception_share"], len(samples), columns, _perception_share, found)


def _perception_share(sums: np.ndarray) -> np.ndarray:
    """Return accuracy and accuracy+ in %, averaged, over blocks of pictures, their accuracy and accuracy+."""
    pictures, accuracy, plus = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
    # A resample may have no picture of a category, which then does not count.
    shares = np.divide(accuracy + plus, 2 * pictures, out=np.zeros_like(accuracy), where=pictures > 0)
    return 100 * shares.sum(axis=1) / (pictures > 0).sum(axis=1)


def _mme_pictures(data: Any) -> list[tuple[str, str]]:
    return [(str(kind), str(picture)) for kind, picture in zip(data["category"], data["question_id"], strict=True)]


def _mmbench_questions(data: Any) -> list[int]:
    return [int(index) % ROUND for index in data["index"]]


def _mmbench(samples: Samples) -> Score:
    references = [
        {
            "index": int(sample["doc"]["index"]),
            "answer": str(sample["doc"]["answer"]),
            "options": [_text(sample["doc"].get(letter)) for letter in "ABCD"],
        }
        for sample in samples
    ]
    found = load_metric("mmbench_circular").compute(predictions=answers(samples), references=references)
    return _mean(found["right"], single=found["single"], unread=found["unread"])


def _seed(samples: Samples) -> Score:
    right = np.array(
        [_letter(said) == sample["doc"]["answer"] for said, sample in zip(answers(samples), samples, strict=True)]
    )
    kinds = np.array([str(sample["doc"]["data_type"]) for sample in samples])
    parts = {kind: 100 * float(right[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))}
    return _mean(right.astype(float).tolist(), **parts)


def _letter(said: str) -> str:
    return said.strip()[:1].upper()


def _llava_w(samples: Samples) -> Score:
    """Return the judge's points for the model, as a share of those for GPT-4's own answers."""
    points = np.array([sample["gpt_eval_llava_all"]["scores"] for sample in samples], dtype=np.float64)
    if (points < 0).any():
        raise RuntimeError(
            f"the judge gave no points to {int((points < 0).any(axis=1).sum())} of {len(points)} answers"
        )
    columns = np.stack([100 * points[:, 1], points[:, 0]], axis=1)
    return Score(100 * float(points[:, 1].mean() / points[:, 0].mean()), len(points), columns, _share)


def _mmvet(samples: Samples) -> Score:
    found = [sample["gpt_eval_score"] for sample in samples]
    # The task gives 0 points where its judge did not answer.
    if silent := sum(not one["eval_model"] for one in found):
        raise RuntimeError(f"the judge gave no points to {silent} of {len(found)} answers")
    return _mean([float(one["score"]) for one in found])


def _text(value: Any) -> str:
    """Return an option's or a hint's text; data sets have several ways of saying that there is none."""
    text = "" if value is None else str(value)
    return "" if text.lower() in ("nan", "none") else text


def textvqa_question(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return TextVQA's prompt, with the words that an OCR program read."""
    return f"{doc['question']}\nReference OCR token: {', '.join(doc['ocr_tokens'])}{_SHORT}"


def vizwiz_question(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return VizWiz's prompt, which says what to answer if the picture does not tell."""
    return f"{doc['question']}\nWhen the provided information is insufficient, respond with 'Unanswerable'.{_SHORT}"


def mmbench_question(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return MMBench's prompt: hint, question and options, one a line."""
    return _options(doc, _LETTER)


def mmbench_cn_question(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the prompt of MMBench in Chinese."""
    return _options(doc, _LETTER_CN)


def _options(doc: Mapping[str, Any], closing: str) -> str:
    options = [f"{letter}. {text}" for letter in "ABCDE" if (text := _text(doc.get(letter)))]
    return "\n".join([*filter(None, [_text(doc.get("hint"))]), str(doc["question"]), *options, closing])


def seed_pictures(doc: Mapping[str, Any]) -> list[Any]:
    """Return the picture of a SEED question; of a video the frame in the middle, which LLaVA-1.5 was published with.

    All eight frames of a video would be more tokens than LLaVA-1.5 was made for.
    """
    frames = doc["image"]
    return [frames[len(frames) // 2].convert("RGB")]


def raw_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Give the harness nothing to judge: the score is computed from the answers."""
    return {"answered": float(bool(results[0]))}


_OURS = {
    "process_results": raw_answer,
    "metric_list": [{"metric": "answered", "aggregation": "mean", "higher_is_better": True}],
}
_VAL = "the validation split; Table 1's is a test split whose answers only its server has"

BENCHMARKS = (
    Benchmark(
        "vqav2", "VQAv2", "vqav2/vqav2_val.yaml", "validation", _by_task("exact_match"), note=_VAL, answer="answers"
    ),
    Benchmark("gqa", "GQA", "gqa/gqa.yaml", "testdev", _gqa),
    Benchmark(
        "vizwiz",
        "VizWiz",
        "vizwiz_vqa/vizwiz_vqa_val.yaml",
        "val",
        _by_task("exact_match"),
        {"doc_to_text": vizwiz_question, "generation_kwargs": {"max_new_tokens": 128, "temperature": 0}},
        note=_VAL,
        answer="answers",
    ),
    Benchmark("scienceqa", "SQA-I", "scienceqa/scienceqa_img.yaml", "test", _scienceqa),
    Benchmark(
        "textvqa",
        "TextVQA",
        "textvqa/textvqa_val.yaml",
        "validation",
        _by_task("exact_match"),
        {
            "doc_to_text": textvqa_question,
            "generation_kwargs": {"max_new_tokens": 128, "temperature": 0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        answer="answers",
    ),
    Benchmark("pope", "POPE", "pope/pope.yaml", "test", _pope),
    Benchmark(
        "mme",
        "MME",
        "mme/mme.yaml",
        "test",
        _mme,
        note="perception of its 2,000 points",
        parts=("perception", "cognition"),
        together=_mme_pictures,
    ),
    Benchmark(
        "mmbench",
        "MMB",
        "mmbench/mmbench_en_dev.yaml",
        "dev",
        _mmbench,
        {"doc_to_text": mmbench_question, **_OURS},
        together=_mmbench_questions,
        note="answers are read by rules; the paper's server asks a language model about those that rules cannot read",
    ),
    Benchmark(
        "mmbench_cn",
        "MMB-CN",
        "mmbench/mmbench_cn_dev.yaml",
        "dev",
        _mmbench,
        {"doc_to_text": mmbench_cn_question, **_OURS},
        together=_mmbench_questions,
        note="answers are read by rules, as for mmbench",
    ),
    Benchmark(
        "seed",
        "SEED",
        "seedbench/seedbench.yaml",
        "test",
        _seed,
        {
            "doc_to_visual": seed_pictures,
            "generation_kwargs": {"max_new_tokens": 16, "temperature": 0},
            **_OURS,
        },
        note="with its videos, as in Table 1; of each the frame in the middle, as LLaVA-1.5 was published",
        parts=("image", "video"),
    ),
    Benchmark(
        "llava_w",
        "LLaVA-W",
        "llava-in-the-wild/llava-in-the-wild.yaml",
        "train",
        _llava_w,
        judge=True,
        answer="gpt_answer",
    ),
    Benchmark(
        "mmvet",
        "MM-Vet",
        "mmvet/mmvet.yaml",
        "test",
        _mmvet,
        {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}}},
        judge=True,
    ),
)
"""In Table 1's order."""

PRINTED = {
    "LLaVA-1.5-7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 75.5, 64.3, 58.3, 58.6, 63.4, 30.5, 62.7, 15.4),
    "LLaVA-1.5-7B, replicated": (79.1, 62.7, 49.0, 67.8, 58.6, 86.3, 72.8, 66.2, 59.3, 58.5, 63.7, 31.7, 63.0, 15.4),
    "Random sampling": (69.0, 57.1, 37.9, 67.2, 48.5, 82.5, 65.6, 55.4, 48.0, 51.0, 55.8, 23.6, 55.1, 8.0),
    "TopK": (72.4, 58.1, 47.0, 66.9, 52.5, 83.8, 67.1, 63.3, 55.2, 54.5, 59.2, 26.5, 58.9, 8.0),
    "ToMe": (75.1, 60.0, 47.1, 67.5, 55.3, 82.4, 70.4, 63.9, 56.5, 55.2, 60.5, 26.6, 60.0, 8.0),
    "IVTP": (77.8, 60.4, 47.9, 67.8, 58.2, 85.7, 72.6, 66.1, 57.4, 56.4, 62.8, 30.5, 62.0, 8.2),
}
"""Rows of Table 1 (LLaVA-1.5-7B, 64 visual tokens): the twelve scores, their average, TFLOPs. The pruned ones are of
models that were retrained while pruned."""

PRINTED_UNTRAINED = {"TopK": 54.1, "ToMe": 57.5, "IVTP-V": 58.5, "IVTP": 59.6}
"""Averages of the same models without retraining (Table 7, pure inference)."""


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Return benchmarks by name, in Table 1's order; `paper` is all of them.

    Raises
    ------
    ValueError
        For an unknown name, or none.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := sorted(set(names) - {"paper", *known}):
        raise ValueError(f"benchmark {', '.join(unknown)}; allowed: paper, {', '.join(known)}")
    if not names:
        raise ValueError(f"no benchmark is named; allowed: paper, {', '.join(known)}")
    return [benchmark for name, benchmark in known.items() if "paper" in names or name in names]
