"""Rows in the columns of the twelve data sets, through the harness: prompt, answer, score; `make eval-test`."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; `make eval-test` has it in an environment of its own"
)

import ivtp_cli
from benchmarks.quality.world import sample_questions
from modeling_ivtp.evaluation import paper, run, tables
from modeling_ivtp.evaluation.answerer import Answerer, Reply
from modeling_ivtp.evaluation.arm import Arm
from modeling_ivtp.evaluation.intervals import interval_of
from modeling_ivtp.evaluation.prompts import VICUNA
from modeling_ivtp.serving.answering import load_model

pytestmark = pytest.mark.slow

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(width: int = 12, height: int = 8, red: int = 200) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (red, 30, 30)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@dataclass(frozen=True)
class Fixture:
    """Rows of a data set with a model's answers; the question of row n ends in "(n)"."""

    split: str
    rows: list[dict[str, Any]]
    answers: list[str]
    prompt: str
    """Of row 0, without what stands before and after every question."""
    score: float


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n + 1} for n, text in enumerate(answers)]


def ten(word: str, number: int, other: str = "else") -> list[str]:
    return [word] * number + [other] * (10 - number)


def mmbench(index: int, answer: str, n: int, hint: Any = None, **options: Any) -> dict[str, Any]:
    row = {"index": index, "question": f"Which animal? ({n})", "hint": hint, "answer": answer, "A": "cat", "B": "dog"}
    row |= {"C": None, "D": None, "category": "c", "source": "s", "L2-category": "l", "comment": None, "split": "dev"}
    return row | options


def science(n: int, answer: int, hint: str = "") -> dict[str, Any]:
    return {"question": f"Which? ({n})", "choices": ["rock", "sand"], "answer": answer, "hint": hint}


def seed(n: int, answer: str, kind: str = "image") -> dict[str, Any]:
    row = {"question": f"What? ({n})", "answer": answer, "data_type": kind, "question_id": str(n)}
    frames = [png(red=10 * frame) for frame in range(8)] if kind == "video" else [png()]
    return row | {"image": frames} | {f"choice_{letter}": f"thing {letter}" for letter in "abcd"}


FIXTURES = {
    "vqav2": Fixture(
        "validation",
        [
            {"question": f"What colour? ({n})", "question_id": n, "answers": people(*ten("red", 10 - 3 * n, "2"))}
            for n in range(4)
        ]
        + [{"question": "How many? (4)", "question_id": 4, "answers": people(*ten("2", 10))}],
        ["Red", "red", "red", "a red", "Two"],
        f"What colour? (0){SHORT}",
        100 * (1 + 1 + 1 + 0.3 + 1) / 5,
    ),
    "gqa": Fixture(
        "testdev",
        [{"question": f"Left or right? ({n})", "answer": "left", "imageId": "1", "id": str(n)} for n in range(5)],
        ["Left.", "left", "right", "on the left", "LEFT"],
        f"Left or right? (0){SHORT}",
        60,
    ),
    "vizwiz": Fixture(
        "val",
        [
            {"question": f"what is this? ({n})", "question_id": f"v{n}", "answers": ten("unanswerable", 10 - n)}
            for n in range(5)
        ],
        ["Unanswerable", "soup", "unanswerable", "soup", "soup"],
        f"what is this? (0)\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}",
        40,
    ),
    "scienceqa": Fixture(
        "test",
        [science(0, 0, "Rocks are hard."), *(science(n, 1) for n in range(1, 5))],
        ["A", "B. sand", "A", "sand", "b"],
        f"Context: Rocks are hard.\nWhich? (0)\nA. rock\nB. sand{LETTER}",
        60,
    ),
    "textvqa": Fixture(
        "validation",
        [
            {
                "question": f"what brand? ({n})",
                "question_id": n,
                "answers": ten("nokia", 10),
                "ocr_tokens": ["NOKIA", "X3"],
            }
            for n in range(5)
        ],
        ["Nokia", "nokia.", "Nokia X3", "", "nokia"],
        f"what brand? (0)\nReference OCR token: NOKIA, X3{SHORT}",
        60,
    ),
    "pope": Fixture(
        "test",
        [
            {
                "question": f"Is there a cat? ({n})",
                "answer": answer,
                "category": kind,
                "question_id": str(n),
                "id": str(n),
            }
            for n, (answer, kind) in enumerate(
                [("yes", "random"), ("no", "random"), ("yes", "popular"), ("no", "popular"), ("yes", "random")]
            )
        ],
        ["Yes", "No, there is not", "Yes.", "Yes", "No"],
        f"Is there a cat? (0){SHORT}",
        # random: precision 1, recall 1/2; popular: precision 1/2, recall 1.
        100 * 2 / 3,
    ),
    "mme": Fixture(
        "test",
        [
            {
                "question": f"Is it red? ({n}) Please answer yes or no.",
                "answer": ("Yes", "No")[n % 2],
                "category": ("color", "color", "color", "color", "code_reasoning", "code_reasoning")[n],
                "question_id": f"{n // 2}.png",
            }
            for n in range(6)
        ],
        ["Yes", "No", "yes", "yes", "no", "no"],
        f"Is it red? (0){SHORT}",
        100 * (75 + 50) / 200,
    ),
    "mmbench": Fixture(
        "dev",
        [
            mmbench(1, "A", 0, "Look."),
            mmbench(1_000_001, "B", 1, A="dog", B="cat"),
            mmbench(2, "B", 2),
            mmbench(1_000_002, "A", 3, A="dog", B="cat"),
            mmbench(3, "A", 4, "nan"),
        ],
        ["A", "B", "B", "B", "It is a cat"],
        f"Look.\nWhich animal? (0)\nA. cat\nB. dog{LETTER}",
        100 * 2 / 3,
    ),
    "mmbench_cn": Fixture(
        "dev",
        [mmbench(n, "A", n) for n in range(5)],
        ["A", "B", "A.", "A", "cat"],
        "Which animal? (0)\nA. cat\nB. dog\n请直接回答选项字母。",
        80,
    ),
    "seed": Fixture(
        "test",
        [seed(0, "A"), seed(1, "B"), seed(2, "C"), seed(3, "D", "video"), seed(4, "A", "video")],
        ["A", "b", "C. thing c", "A", "A"],
        f"What? (0)\nA. thing a\nB. thing b\nC. thing c\nD. thing d{LETTER}",
        80,
    ),
    "llava_w": Fixture(
        "train",
        [
            {
                "question": f"Describe it. ({n})",
                "question_id": n,
                "image_id": f"{n}.jpg",
                "category": ("conv", "detail", "complex")[n % 3],
                "caption": "A red ground.",
                "gpt_answer": "Red.",
            }
            for n in range(5)
        ],
        ["points 6"] * 5,
        "Describe it. (0)",
        100 * 6 / 8,
    ),
    "mmvet": Fixture(
        "test",
        [
            {"question": f"What is x? ({n})", "question_id": f"v_{n}", "answer": "1<AND>2", "capability": "math,ocr"}
            for n in range(5)
        ],
        ["points 0.5"] * 4 + ["points 1.0"],
        "What is x? (0)",
        60,
    ),
}
LISTS = ("seed",)
"""Data sets that have a list of pictures in each row."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, fixture in FIXTURES.items():
        made[name] = tmp_path_factory.mktemp(name)
        (made[name] / "data").mkdir()
        rows = [{"image": png()} | row for row in fixture.rows]
        table = datasets.Dataset.from_list(rows)
        kind = datasets.Sequence(datasets.Image()) if name in LISTS else datasets.Image()
        table.cast_column("image", kind).to_parquet(made[name] / "data" / f"{fixture.split}-00000-of-00001.parquet")
    return made


class _Judge(BaseHTTPRequestHandler):
    """A judge that gives the points that the answer asks for, and GPT-4 an 8."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][-1]["content"]
        text = text if isinstance(text, str) else text[0]["text"]
        points = re.findall(r"points ([\d.]+)", text)[-1]
        content = points if "Correctness" in text else f"8 {points}\nBecause."
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [message]}
        body = json.dumps(answer | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(run.KEY, "stub")
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield
    server.shutdown()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Prompts by benchmark; the answers come from the fixture, and the model answers nothing."""
    prompts: dict[str, list[Any]] = {"now": [], "answers": []}

    def answer(self: Answerer, given: Any, generation: Any) -> list[Reply]:
        prompts["now"] += given
        numbers = [int(prompt.text.rpartition("(")[2].partition(")")[0]) for prompt in given]
        return [Reply(prompts["answers"][number], 1, 1) for number in numbers]

    monkeypatch.setattr(Answerer, "answer", answer)
    loaded = load_model(MINIATURE, device="cpu", dtype="float32")
    monkeypatch.setattr(run, "load_model", lambda *_, **__: loaded)
    return prompts


def options(folders: dict[str, Path], out: Path, *names: str, **more: Any) -> run.Options:
    return run.Options(
        str(MINIATURE),
        paper.chosen(names),
        [Arm("unpruned"), *more.pop("arms", [])],
        out,
        data={name: folders[name] for name in more.pop("given", names)},
        device="cpu",
        dtype="float32",
        **more,
    )


def test_every_benchmark_is_asked_and_scored_as_published(
    folders: dict[str, Path], asked: dict[str, list[Any]], judge: None, tmp_path: Path
) -> None:
    assert list(FIXTURES) == [benchmark.name for benchmark in paper.BENCHMARKS]
    for name, fixture in FIXTURES.items():
        asked["now"].clear()
        asked["answers"] = fixture.answers
        found = run.run(options(folders, tmp_path, name))
        assert not found.left_out
        (benchmark,) = paper.chosen([name])
        assert run.task_config(benchmark)["test_split"] == benchmark.split == fixture.split
        first = next(prompt for prompt in asked["now"] if "(0)" in prompt.text)
        assert first.text == f"{VICUNA} USER: <image>\n{fixture.prompt} ASSISTANT:", name
        assert {image.size for prompt in asked["now"] for image in prompt.images} == {(12, 12)}
        assert len(asked["now"]) == len(fixture.rows)
        assert {len(prompt.images) for prompt in asked["now"]} == {1}
        score = found.scores[name]["unpruned"]
        assert score.value == pytest.approx(fixture.score), name
        # MMBench asks one question with its options in several orders.
        assert score.questions == (3 if name == "mmbench" else len(fixture.rows))
        # What intervals are drawn from gives the score of all questions, and changes with them.
        assert score.statistic(score.columns.sum(0)[None]) == pytest.approx([fixture.score]), name
        low, high = interval_of(score.columns, score.statistic)
        assert 0 <= low <= fixture.score <= high <= 100
        assert low < high or len({*fixture.answers}) == 1


def test_a_run_goes_on_where_it_stopped_and_a_changed_arm_is_asked_anew(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["answers"] = FIXTURES["gqa"].answers
    numbers = []
    for arms in ([Arm("ivtp", 64)], [Arm("ivtp", 64)], [Arm("ivtp", 64), Arm("fastv", 32)]):
        asked["now"].clear()
        found = run.run(options(folders, tmp_path, "gqa", arms=arms))
        numbers.append(len(asked["now"]))
        assert {score.value for score in found.scores["gqa"].values()} == {60}
    assert numbers == [10, 0, 5]


def test_another_judge_gives_points_anew(
    folders: dict[str, Path],
    asked: dict[str, list[Any]],
    judge: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked["answers"] = FIXTURES["mmvet"].answers
    numbers = []
    for judging in ("one", "one", "another"):
        asked["now"].clear()
        monkeypatch.setenv("MODEL_VERSION", judging)
        assert not run.run(options(folders, tmp_path, "mmvet")).left_out
        numbers.append(len(asked["now"]))
    assert numbers == [5, 0, 5]


def test_the_harness_cannot_change_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes into the entries of a task, and a benchmark that changed is asked anew."""
    monkeypatch.setenv(run.KEY, "stub")
    (benchmark,) = paper.chosen(["mmvet"])
    run.task_config(benchmark)["lmms_eval_specific_kwargs"]["pre_prompt"] = "written by the harness"
    assert benchmark.changes == {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}}}


@pytest.mark.parametrize("variable", run.JUDGE)
def test_a_judge_decides_the_scores_of_judged_benchmarks_alone(
    variable: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(folders, tmp_path, "gqa", "llava_w", "mmvet")
    model: Any = SimpleNamespace(fingerprint="one")
    monkeypatch.delenv(variable, raising=False)
    before = [run._identity(chosen, benchmark, model) for benchmark in chosen.benchmarks]
    monkeypatch.setenv(variable, "another")
    after = [run._identity(chosen, benchmark, model) for benchmark in chosen.benchmarks]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]


def test_another_harness_scores_anew(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(folders, tmp_path, "gqa")
    model: Any = SimpleNamespace(fingerprint="one")
    before = run._identity(chosen, chosen.benchmarks[0], model)
    monkeypatch.setattr(run, "version", {"lmms-eval": "0.0.1"}.get)
    assert run._identity(chosen, chosen.benchmarks[0], model) != before


def test_data_that_changed_on_the_hub_are_asked_anew_and_a_silent_hub_changes_nothing(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked["answers"] = FIXTURES["gqa"].answers
    numbers = []
    for revision in ("a", "a", None, "b"):
        asked["now"].clear()
        monkeypatch.setattr(run, "_revision", lambda *_, now=revision: now)
        run.run(options(folders, tmp_path, "gqa"))
        numbers.append(len(asked["now"]))
    assert numbers == [5, 0, 0, 5]


def test_the_revision_is_the_hub_s(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(folders, tmp_path, "gqa", "pope", given=("gqa",))
    gqa, pope = chosen.benchmarks
    monkeypatch.setattr(run.HfApi, "dataset_info", lambda self, path, timeout: SimpleNamespace(sha=f"of {path}"))
    assert run._revision(chosen, gqa) is None
    assert run._revision(chosen, pope) == "of lmms-lab-encoder/POPE"

    def silent(*_: Any, **__: Any) -> Any:
        raise ConnectionError

    monkeypatch.setattr(run.HfApi, "dataset_info", silent)
    assert run._revision(chosen, pope) is None


def test_a_run_that_was_stopped_within_a_benchmark_asks_the_rest(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked["answers"] = FIXTURES["gqa"].answers
    whole = Answerer.answer

    def stopped(self: Answerer, given: Any, generation: Any) -> Any:
        if asked["now"]:
            raise KeyboardInterrupt
        return whole(self, given, generation)

    monkeypatch.setattr(Answerer, "answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.run(options(folders, tmp_path, "gqa", batch_size=2))
    assert len(asked["now"]) == 2
    assert len(list((tmp_path / "gqa").glob("*.jsonl"))) == 1
    monkeypatch.setattr(Answerer, "answer", whole)
    found = run.run(options(folders, tmp_path, "gqa", batch_size=2))
    assert len(asked["now"]) == 5
    assert len({prompt.text for prompt in asked["now"]}) == 5
    assert found.scores["gqa"]["unpruned"].value == 60
    assert not list((tmp_path / "gqa").glob("*.jsonl"))


def test_what_cannot_be_had_is_left_out_by_name_and_the_others_run(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(run.KEY, raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    asked["answers"] = FIXTURES["gqa"].answers
    empty = tmp_path / "empty"
    empty.mkdir()
    told: list[str] = []
    found = run.run(
        options(folders | {"pope": empty}, tmp_path, "gqa", "pope", "mmvet", given=("gqa", "pope")), told.append
    )
    assert list(found.scores) == ["gqa"]
    assert found.left_out["mmvet"] == "OPENAI_API_KEY is not set"
    assert found.left_out["pope"] == (
        "its data set cannot be had (FileNotFoundError: the folder has no file test.parquet or test-*.parquet)"
    )
    asks: list[str] = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **more: asks.append(path) or load(path, **more))
    online = run.run(options(folders, tmp_path / "online", "gqa", "pope", given=("gqa",)))
    assert [path for path in asks if "POPE" in path] == ["lmms-lab-encoder/POPE"]
    assert re.match(r"its data set cannot be had \((?!RetryError)\w+: .*POPE", online.left_out["pope"])
    assert (
        "mmvet: needs its data set from the Hub and a judge, with its key in OPENAI_API_KEY, which is not set"
        in told[2]
    )


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["left", None, ""], "2 of its rows have no answer, the first is row 1"),
        (None, "its data have no column answer"),
    ],
)
def test_rows_without_answers_are_no_wrong_answers(
    answers: Any, reason: str, folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    rows = [
        {"question": f"Where? ({n})", "image": png()} | ({"answer": answers[n]} if answers else {}) for n in range(3)
    ]
    (tmp_path / "gqa").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "gqa" / "testdev-00000-of-00001.parquet")
    asked["answers"] = FIXTURES["pope"].answers
    found = run.run(options(folders | {"gqa": tmp_path / "gqa"}, tmp_path / "out", "gqa", "pope"))
    assert found.left_out == {"gqa": reason}
    assert list(found.scores) == ["pope"]
    assert not any("Where?" in prompt.text for prompt in asked["now"])
    if answers is not None:
        some = run.run(options({"gqa": tmp_path / "gqa"}, tmp_path / "some", "gqa", limit=1))
        assert list(some.scores) == ["gqa"]


def write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    table = datasets.Dataset.from_list(rows)
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(
    ("name", "split", "rows", "reason"),
    [
        (
            "gqa",
            "testdev",
            [{"question": "Where?", "answer": "left"}],
            r"first row cannot be asked \(KeyError: 'image'",
        ),
        ("gqa", "testdev", [{"answer": "left", "image": png()}], r"KeyError: 'question'"),
        (
            "mme",
            "test",
            [
                {"question": "Red? (0)", "answer": "Yes", "category": "color", "question_id": n, "image": png()}
                for n in "ab"
            ],
            r"answers cannot be scored \(AssertionError: MME only supports pairwise",
        ),
        (
            "mmbench",
            "dev",
            [{**mmbench(n, "F", 0), "image": png()} for n in range(2)],
            r"answers cannot be scored \(ValueError: answer='F'; allowed: A, B",
        ),
    ],
)
def test_rows_in_other_columns_than_the_data_set_s_stop_no_other_benchmark(
    name: str,
    split: str,
    rows: list[dict[str, Any]],
    reason: str,
    folders: dict[str, Path],
    asked: dict[str, list[Any]],
    tmp_path: Path,
) -> None:
    asked["answers"] = FIXTURES["pope"].answers
    odd = write_rows(tmp_path / name, split, rows)
    found = run.run(options(folders | {name: odd}, tmp_path / "out", name, "pope"))
    assert list(found.scores) == ["pope"]
    assert re.search(reason, found.left_out[name])


def test_data_without_rows_are_left_out_with_the_cause(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    empty = write_rows(tmp_path / "gqa", "testdev", [{"question": "Where?", "answer": "left"}])
    (file,) = empty.glob("*.parquet")
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    found = run.run(options({"gqa": empty}, tmp_path / "out", "gqa"))
    assert "ArrowInvalid" in found.left_out["gqa"]


def test_a_limit_parts_no_rows_that_are_scored_together(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["answers"] = FIXTURES["mme"].answers
    found = run.run(options(folders, tmp_path, "mme", limit=3))
    assert found.scores["mme"]["unpruned"].questions == 4


def test_a_limit_asks_all_rotations_of_a_question(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["answers"] = ["A"] * 5
    found = run.run(options(folders, tmp_path, "mmbench", limit=1))
    assert len(asked["now"]) == 2
    assert (found.scores["mmbench"]["unpruned"].questions, found.scores["mmbench"]["unpruned"].value) == (1, 0)


def test_the_table_tells_which_arms_no_question_guides(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["answers"] = FIXTURES["gqa"].answers
    model, _ = run.load_model()
    del model.model.clip_text_model
    chosen = options(folders, tmp_path, "gqa", arms=[Arm("ivtp", 64), Arm("fastv", 64)], limit=1)
    results = tables.summary(run.run(chosen), chosen.arms, 1)
    assert results["unguided"] == {"ivtp@64": "text tower of CLIP"}
    page = tables.page(results)
    assert "\nivtp@64 was guided by the picture alone, not by the question: the checkpoint has no text tower" in page
    assert "first 1 question(s) of each benchmark" in page


def test_parts_of_a_score_stand_in_the_table(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["answers"] = FIXTURES["seed"].answers
    chosen = options(folders, tmp_path, "seed")
    page = tables.page(tables.summary(run.run(chosen), chosen.arms))
    shades = [prompt.images[0].getpixel((6, 6))[0] for prompt in sorted(asked["now"], key=lambda each: each.text)]
    assert shades == [200, 200, 200, 40, 40]
    assert "| SEED | unpruned | image 100.0, video 50.0 |" in page
    assert "| unpruned | 80.0 | 80.0 |" in page


def test_a_crash_of_the_model_is_no_missing_benchmark(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(Answerer, "answer", fails)
    with pytest.raises(RuntimeError, match="the device fell over"):
        run.run(options(folders, tmp_path, "gqa"))


def test_a_judge_that_says_nothing_is_no_zero() -> None:
    with pytest.raises(RuntimeError, match="no points to 1 of 2 answers"):
        paper._llava_w([{"gpt_eval_llava_all": {"scores": scores}} for scores in ([8, 6], [-1, -1])])
    with pytest.raises(RuntimeError, match="no points to 1 of 2 answers"):
        paper._mmvet([{"gpt_eval_score": {"score": 0.0, "eval_model": model}} for model in ("judge", "")])


def test_the_command_writes_table_1(
    folders: dict[str, Path], asked: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked["answers"] = FIXTURES["gqa"].answers
    out = tmp_path / "out"
    where = ("--out", str(out), "--device", "cpu", "--dtype", "float32", "--data", f"gqa={folders['gqa']}")
    arguments = ("--benchmarks", "gqa", "--tokens", "64", "--tokens", "16", "--method", "ivtp", "--method", "fastv")
    assert ivtp_cli.main(["evaluate", "--model", str(MINIATURE), *where, *arguments]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["unpruned", "ivtp@64", "ivtp@16", "fastv@64", "fastv@16"]
    row = results["arms"]["ivtp@64"]
    assert (row["average"], row["share"], row["final_tokens"]) == (60, 1, 64)
    assert row["scores"]["gqa"]["difference_interval"] == [0, 0]
    assert results["arms"]["unpruned"]["tflops"] > row["tflops"] > results["arms"]["ivtp@16"]["tflops"]
    page = (out / "table.md").read_text()
    assert "| *IVTP (printed)* | 60.4 | 60.4 |  | 8.2 |" in page
    assert "| ivtp@64 | 60.0 | 60.0 | 100.0% |" in page
    assert "| GQA | ivtp@64 | 60.0 | 5 | 20.0 to 100.0 | +0.0 to +0.0 |" in page
    assert "Only the first" not in page
    assert "model-index:" in (out / "model-index-ivtp@64.yaml").read_text()
    some = ("--benchmarks", "gqa", "--tokens", "64", "--limit", "3")
    where = ("--out", str(tmp_path / "some"), *where[2:])
    capsys.readouterr()
    assert ivtp_cli.main(["evaluate", "--model", str(MINIATURE), *where, *some]) == 0
    assert "No block for a model card is written: --limit asked a part of the questions." in capsys.readouterr().out
    assert not list((tmp_path / "some").glob("model-index-*"))
    alone = ("--benchmarks", "mmvet", "--model", str(MINIATURE), "--device", "cpu", "--out", str(tmp_path / "none"))
    assert ivtp_cli.main(["evaluate", *alone]) == 1
    assert "no benchmark could be scored: mmvet, OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert not (tmp_path / "none" / "results.json").exists()


@pytest.mark.subprocess
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    scenes = sample_questions("test", 7)
    rows = [
        {"image": Image.fromarray(scene.pixels), "question": asked.text, "answer": asked.answer, "id": str(n)}
        for n, (scene, asked) in enumerate(scenes)
    ]
    (tmp_path / "gqa").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "gqa" / "testdev-00000-of-00001.parquet")
    found = {}
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))):
        command = [sys.executable, *launcher, "-m", "modeling_ivtp.cli", "evaluate", "--model", str(MINIATURE)]
        options = ["--benchmarks", "gqa,pope", "--data", f"gqa={tmp_path / 'gqa'}", "--batch-size", "2"]
        where = ["--out", str(tmp_path / name), "--device", "cpu", "--dtype", "float32", "--own-prompt"]
        done = subprocess.run(
            [*command, *options, *where],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.count("gqa, ivtp@64: ") == 1
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
        assert not list((tmp_path / name / "gqa").glob("*.jsonl"))
    assert found["one"] == found["two"]
    assert found["one"]["arms"]["unpruned"]["scores"]["gqa"]["value"] > 50
    assert list(found["two"]["left_out"]) == ["pope"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", "gqa,vqa9"], "benchmark vqa9; allowed: paper, vqav2, gqa"),
        (["--data", "gqa"], "--data=gqa; allowed: NAME=FOLDER"),
        (["--data", "gqa=nowhere"], "there is no folder nowhere"),
        (["--benchmarks", "gqa", "--data", "pope=."], "data of pope, which is none of the benchmarks"),
        (["--method", "magic"], "method='magic'; allowed"),
        (["--benchmarks", ","], "no benchmark is named; allowed: paper, vqav2"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ivtp_cli.main(["evaluate", "--model", "no-such-model", "--out", str(out), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_model_that_is_no_llava_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    out = tmp_path / "out"
    assert ivtp_cli.main(["evaluate", "--model", str(tmp_path), "--out", str(out)]) == 1
    assert "llama" in capsys.readouterr().err
    assert not out.exists()


def test_the_printed_averages_are_those_of_the_printed_scores() -> None:
    for row in paper.PRINTED.values():
        assert len(row) == len(paper.BENCHMARKS) + 2
        assert np.mean(row[:12]) == pytest.approx(row[12], abs=0.11)
