"""The model in the real harness, on questions of the drawn world to the miniature: `make eval-test`."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; `make eval-test` has it in an environment of its own"
)

from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

from benchmarks.quality.examination import Examination
from benchmarks.quality.lmms_task import TASK, write_task
from benchmarks.quality.methods import Row
from benchmarks.quality.world import sample_questions
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.evaluation import load_metric
from modeling_ivtp.evaluation.answerer import Answerer
from modeling_ivtp.evaluation.lmms_model import IVTPLlava
from modeling_ivtp.serving.answering import load_model

pytestmark = pytest.mark.slow

QUESTIONS = int(os.environ.get("IVTP_EVAL_QUESTIONS", "40"))
MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
PYTHON = Path(sys.executable)
OFF = {"enabled": False}
IVTP = {"enabled": True, "visual_tokens": 64, "tower_tokens": None}
ROWS = {
    "method=unpruned": Row("unpruned", 576, OFF),
    "visual_tokens=64": Row("ivtp", 64, IVTP),
    "method=fastv,visual_tokens=64": Row("fastv", 64, {}, system="fastv"),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), QUESTIONS)


def evaluate(task: Path, arguments: str, *, batch: int = 8, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = evaluator.simple_evaluate(
        model="ivtp_llava",
        model_args=f"pretrained={options.pop('model', MINIATURE)},dtype=float32,device=cpu,{arguments}",
        tasks=[TASK],
        batch_size=batch,
        task_manager=manager,
        log_samples=True,
        **options,
    )
    assert found is not None
    return found


def said(found: dict[str, Any]) -> list[str]:
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def score(found: dict[str, Any]) -> float:
    return float(found["results"][TASK]["exact_word,none"])


@pytest.fixture(scope="module")
def own() -> dict[str, list[str]]:
    """Answers of the project's own evaluation, by the model's arguments."""
    model, processor = load_model(MINIATURE, device="cpu", dtype="float32")
    asked, found = sample_questions("test", QUESTIONS), {name: [] for name in ROWS}
    first = 0
    while batch := list(islice(asked, 8)):
        examination = Examination(model, processor, batch, first)
        for name, row in ROWS.items():
            found[name] += examination.answers(row)[0]
        first += len(batch)
    return found


@pytest.mark.parametrize("arguments", ROWS)
def test_the_score_is_that_of_our_own_evaluation(task: Path, own: dict[str, list[str]], arguments: str) -> None:
    found = evaluate(task, arguments)
    wanted = [question.answer for _, question in sample_questions("test", QUESTIONS)]
    expected = load_metric("exact_word").compute(predictions=own[arguments], references=wanted)["accuracy"]
    assert score(found) == pytest.approx(expected)
    assert said(found) == [answer.strip() for answer in own[arguments]]
    assert expected > 0.5


def test_the_arguments_decide_how_much_is_pruned(task: Path, own: dict[str, list[str]]) -> None:
    assert own["method=fastv,visual_tokens=64"] != own["method=unpruned"]
    assert said(evaluate(task, "visual_tokens=1", limit=8)) != [text.strip() for text in own["visual_tokens=64"][:8]]


def test_a_stock_llava_is_the_baseline(task: Path, own: dict[str, list[str]], tmp_path: Path) -> None:
    export_stock(MINIATURE, tmp_path / "stock")
    # The paper's groups of three layers do not fit the miniature's tower of eight, as they fit LLaVA-1.5's.
    config = json.loads((tmp_path / "stock" / "config.json").read_text()) | {"pruning": {"layers_per_group": 2}}
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    found = evaluate(task, "method=unpruned", model=tmp_path / "stock", limit=8)
    assert said(found) == [answer.strip() for answer in own["method=unpruned"][:8]]


def test_single_questions_are_answered_as_batches_are(task: Path, own: dict[str, list[str]]) -> None:
    found = evaluate(task, "visual_tokens=64", batch=1)
    assert said(found) == [answer.strip() for answer in own["visual_tokens=64"]]
    counts = [sample["token_counts"][0] for sample in found["samples"][TASK]]
    assert all(count["output_tokens"] >= 1 and count["input_tokens"] > 576 for count in counts)


def test_the_cache_answers_what_was_asked_before(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = Answerer.answer

    def counted(self: Answerer, prompts: Any, generation: Any) -> Any:
        asked.append(len(prompts))
        return answer(self, prompts, generation)

    monkeypatch.setattr(Answerer, "answer", counted)
    model = shutil.copytree(MINIATURE, tmp_path / "model")

    def run(arguments: str) -> tuple[int, list[str]]:
        asked.clear()
        found = evaluate(task, arguments, model=model, use_cache=str(tmp_path / "cache"), limit=8)
        return sum(asked), said(found)

    number, first = run("visual_tokens=64")
    assert number == 8
    assert run("visual_tokens=64") == (0, first)
    assert run("visual_tokens=32")[0] == 8
    assert run("method=unpruned")[0] == 8
    # Without arguments the checkpoint's own options decide, and a new budget in its config is a new model.
    assert run("pad=False")[0] == 8
    assert run("pad=False")[0] == 0
    config = json.loads((model / "config.json").read_text())
    config["pruning"]["visual_tokens"] = 48
    (model / "config.json").write_text(json.dumps(config))
    assert run("pad=False")[0] == 8


def test_a_crash_is_an_error_and_no_empty_answer(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answerer, "_answer", lambda *_: (_ for _ in ()).throw(RuntimeError("the device fell over")))
    with pytest.raises(RuntimeError, match="the device fell over"):
        evaluate(task, "visual_tokens=64", limit=2)


def test_if_memory_runs_out_half_a_batch_is_asked(
    task: Path, own: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = Answerer._answer

    def small(self: Answerer, prompts: Any, generation: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, prompts, generation)

    monkeypatch.setattr(Answerer, "_answer", small)
    assert said(evaluate(task, "visual_tokens=64", limit=8)) == [text.strip() for text in own["visual_tokens=64"][:8]]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget=64", "model argument budget; allowed: pretrained, method, visual_tokens"),
        ("method=magic", "method='magic'; allowed: unpruned, "),
        ("visual_tokens=0", "visual_tokens=0; allowed: a whole number from 1"),
        ("method=unpruned,visual_tokens=64", "which keeps all of them"),
        ("pad=perhaps", "pad='perhaps'; allowed: True, False"),
        ("visual_tokens=64,dtype=int8", "dtype='int8'; allowed"),
    ],
)
def test_wrong_arguments_are_refused(task: Path, arguments: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(task, arguments, limit=1)


@pytest.fixture(scope="module")
def model() -> IVTPLlava:
    return IVTPLlava(pretrained=str(MINIATURE), device="cpu", dtype="float32", visual_tokens=64, batch_size=3)


class Request:
    """A request of the harness, to a document that is its messages."""

    task_name = "local"

    def __init__(self, number: int, **arguments: Any) -> None:
        self.args = ("?", lambda document: document, {"max_new_tokens": 4, **arguments}, number, "local", "test")


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (336, 336), (shade, 90, 40))


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image", "url": url}


def ask(model: IVTPLlava, documents: list[Any], *arguments: dict[str, Any]) -> list[str]:
    model.task_dict["local"] = {"test": documents}
    every = arguments or ({},) * len(documents)
    return [found.text for found in model.generate_until([Request(n, **given) for n, given in enumerate(every)])]


def test_texts_paths_and_several_pictures_are_answered_in_order(model: IVTPLlava, tmp_path: Path) -> None:
    picture(200).save(tmp_path / "red.png")
    question = "What colour is the ground?"
    documents = [
        user(image(picture(10)), question),
        user(image(picture(10)), image(picture(200)), question),
        user("Say yes."),
        user(image(str(tmp_path / "red.png")), question),
        user(image(picture(200)), question),
    ]
    together = ask(model, documents)
    alone = [ask(model, [document])[0] for document in documents]
    assert together == alone
    assert together[3] == together[4]
    assert all(together)


def test_until_ends_an_answer_and_arguments_make_groups(model: IVTPLlava) -> None:
    document = user(image(picture(10)), "Is there a cat in the picture?")
    whole = ask(model, [document])[0]
    middle = whole[1]
    cut, same, short = ask(
        model, [document] * 3, {"until": [middle]}, {"until": "nothing like this"}, {"max_new_tokens": 1}
    )
    assert cut == whole[0]
    assert same == whole
    assert len(short) <= len(whole)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_video_and_sound_are_refused(model: IVTPLlava, kind: str) -> None:
    with pytest.raises(ValueError, match=f"local, document 0: a question comes with {kind}"):
        ask(model, [user({"type": kind, "url": "film.mp4"}, "What happens?")])


def test_other_kinds_of_tasks_are_refused(model: IVTPLlava) -> None:
    with pytest.raises(NotImplementedError, match="local ask for the likelihood"):
        model.loglikelihood([Request(0)])
    with pytest.raises(ValueError, match="generation argument penalty; allowed: until"):
        ask(model, [user("?")], {"penalty": 1})


def command(task: Path, out: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the harness's own command."""
    return subprocess.run(
        [
            *(launcher or (str(PYTHON),)),
            *("-m", "lmms_eval", "--model", "ivtp_llava", "--batch_size", "8", "--device", "cpu"),
            *("--include_path", str(task), "--tasks", TASK, "--output_path", str(out), "--log_samples", *options),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def logged(out: Path) -> list[str]:
    (file,) = out.rglob("*samples*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]  # in files the harness writes a single answer without its list


ARGUMENTS = ("--model_args", f"pretrained={MINIATURE},dtype=float32,visual_tokens=64")


@pytest.mark.subprocess
def test_two_processes_answer_as_one(task: Path, own: dict[str, list[str]], tmp_path: Path) -> None:
    launcher = (str(PYTHON), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = command(task, tmp_path, *ARGUMENTS, "--limit", "7", launcher=launcher)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert logged(tmp_path) == [text.strip() for text in own["visual_tokens=64"][:7]]


@pytest.mark.subprocess
def test_the_command_finds_the_model_by_its_entry_point(task: Path, own: dict[str, list[str]], tmp_path: Path) -> None:
    done = command(task, tmp_path, *ARGUMENTS, "--limit", "4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert logged(tmp_path) == [text.strip() for text in own["visual_tokens=64"][:4]]


@pytest.mark.subprocess
def test_the_command_fails_in_debug_mode_and_otherwise_gives_no_score(task: Path, tmp_path: Path) -> None:
    wrong = ("--model_args", f"pretrained={MINIATURE},method=magic", "--limit", "1")
    failed = command(task, tmp_path / "a", *wrong, "--verbosity", "DEBUG")
    assert failed.returncode != 0
    hidden = command(task, tmp_path / "b", *wrong)
    assert "Error during evaluation" in hidden.stdout + hidden.stderr
    assert "exact_word" not in hidden.stdout
