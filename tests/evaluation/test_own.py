"""Own questions: answered by the engine of `ivtp batch`, scored by a metric, compared with the unpruned model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ivtp_cli
from benchmarks.quality.world import sample_questions
from modeling_ivtp.batch import cluster, pipeline
from modeling_ivtp.evaluation import own
from modeling_ivtp.evaluation.arm import Arm
from modeling_ivtp.evaluation.own import OwnOptions
from tests.support.batches import answer_here, connected_here

pytestmark = pytest.mark.slow

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
NUMBER = 6


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer in this process: Ray takes seconds to start."""
    monkeypatch.setattr(cluster, "connected", connected_here)
    monkeypatch.setattr(pipeline, "answer_all", answer_here)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number, (scene, question) in enumerate(sample_questions("test", NUMBER)):
        Image.fromarray(scene.pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": question.text, "answer": question.answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def write(folder: Path, answers: list[Any]) -> str:
    rows = [{"image": "a.png", "question": "?"} | ({} if answer is ... else {"answer": answer}) for answer in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_arms_are_compared_on_own_questions(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One picture is missing: its row fails and counts as wrong.
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[0]["image"] = "missing.png"
    (questions.parent / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(MINIATURE), "--questions", str(questions.parent / "some.jsonl")]
    options = ["--metric", "exact_word", "--tokens", "1", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    assert ivtp_cli.main([*command, *options]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    unpruned, pruned = results["arms"].values()
    assert list(results["arms"]) == ["unpruned", "ivtp@1"]
    assert unpruned["failed"] == pruned["failed"] == 1
    assert unpruned["score"] > pruned["score"]
    assert unpruned["score"] > 50
    assert unpruned["final_tokens"] == 576
    assert pruned["final_tokens"] == 1
    assert unpruned["difference_interval"] == [0, 0]
    assert "| ivtp@1 |" in (out / "table.md").read_text()


def test_the_unpruned_arm_drops_nothing_whatever_the_checkpoints_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a coverage, a budget of all tokens still drops some."""
    asked: list[Any] = []

    def run(options: Any) -> None:
        asked.append((options.method, options.visual_tokens))
        raise KeyboardInterrupt

    monkeypatch.setattr(own.batch, "run", run)
    for arm in (Arm("unpruned"), Arm("ivtp", 9)):
        with pytest.raises(KeyboardInterrupt):
            own._answers(OwnOptions(str(MINIATURE), "rows.jsonl", "anls", [arm], Path("out")), arm)
    assert asked == [("unpruned", None), ("ivtp", 9)]


def test_a_missing_ray_is_told_before_anything_starts(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivtp_cli.batch, "find_spec", lambda name: None if name == "ray" else name)
    command = ["evaluate", "--model", str(MINIATURE), "--questions", str(questions), "--metric", "exact_word"]
    assert ivtp_cli.main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'ivtp-llava[batch]'" in capsys.readouterr().err


def test_launched_processes_are_told_what_to_type(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts one process for each GPU by itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["cli.py", "evaluate", "--questions", "mine.jsonl"])
    command = ["evaluate", "--model", str(MINIATURE), "--questions", str(questions), "--metric", "exact_word"]
    assert ivtp_cli.main([*command, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("type: ivtp evaluate --questions mine.jsonl\n")
    assert not (tmp_path / "out").exists()


def test_answers_are_read_as_the_metric_takes_them(tmp_path: Path) -> None:
    several = write(tmp_path, [["red", "dark red"], "blue", 3])
    arms = [Arm("unpruned")]
    assert own.references(OwnOptions("m", several, "anls", arms, tmp_path)) == [["red", "dark red"], ["blue"], ["3"]]
    with pytest.raises(ValueError, match=r"row 0 of .* has several answers; gqa_match takes one"):
        own.references(OwnOptions("m", several, "gqa_match", arms, tmp_path))
    with pytest.raises(ValueError, match=r"row 0 of .* has 2 right answer\(s\); vqa_accuracy .* needs 4 or more; anls"):
        own.references(OwnOptions("m", several, "vqa_accuracy", arms, tmp_path))
    people = write(tmp_path, [["red"] * 4])
    assert own.references(OwnOptions("m", people, "vqa_accuracy", arms, tmp_path)) == [["red"] * 4]
    single = write(tmp_path, ["red", ["blue"]])
    assert own.references(OwnOptions("m", single, "gqa_match", arms, tmp_path)) == ["red", "blue"]


@pytest.mark.parametrize(
    ("answers", "arguments", "message"),
    [
        (["red", ..., None, ""], ["--metric", "gqa_match"], "3 rows of .* have no answer: 1, 2, 3"),
        (["red"], ["--metric", "mme"], "metric='mme'; allowed for your own questions: vqa_accuracy, anls, gqa_match"),
        (["yes", "maybe"], ["--metric", "pope"], "references='maybe'; allowed: yes, no"),
        ([0, 1], ["--metric", "scienceqa_match"], "references='0'; allowed: a letter"),
        (["red"], [], "takes --questions and --metric together"),
        (["red"], ["--metric", "pope", "--benchmarks", "gqa"], "takes --questions, or --benchmarks and --data"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_written(
    answers: list[Any], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--model", "no-such-model", "--questions", write(tmp_path, answers), "--out", str(out)]
    assert ivtp_cli.main([*command, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()
