"""Check that vLLM answers as the transformers engine does, on held-out questions; a run that was stopped goes on.

    python -m benchmarks.serving.check

Each step runs in a process of its own and leaves its result in a file; a finished step is not run again.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality.command import run
from benchmarks.quality.report import write_atomically
from benchmarks.serving.engines import MINIATURE, TOWER, Engine, Transformers, held_out
from modeling_ivtp.files.tables import markdown_table

ROOT = Path(__file__).parents[2]
TESTS = "tests/vllm_plugin"
SETTINGS: dict[str, dict[str, Any]] = {"tower": TOWER, "guided": {}}
EQUAL, EQUAL_TO_FULL, POINTS = 0.99, 0.98, 1.0
"""Least shares of equal answers: of the same choice, and of the full method; most points of accuracy between them."""
PATCHES, FEW = 40, 60
"""Questions whose kept patches are compared, and questions of the steps that change how vLLM works."""

Found = dict[str, Any]


class Steps:
    """The steps, their questions, and the results of those that are finished.

    Parameters
    ----------
    model : Path
    questions : int
    folder : Path
        Where results are.
    """

    def __init__(self, model: Path, questions: int, folder: Path) -> None:
        self.model, self.questions, self.folder = model, questions, folder
        self.all: dict[str, Callable[[], Found]] = {
            **{
                f"transformers, {name}": partial(self.reference, "ahead", options) for name, options in SETTINGS.items()
            },
            "transformers, full IVTP": partial(self.reference, "within", {}),
            **{f"{name} in float32": partial(self.equal, name) for name in SETTINGS},
            "kept patches": self.patches,
            "guided beside full IVTP": self.full,
            **{f"{name} in bfloat16": partial(self.half, name) for name in SETTINGS},
            "chunks of 48 tokens, preemption": self.chunks,
            "warm and cold caches": self.caches,
            "mixed budgets": self.budgets,
            "compiled": self.compiled,
            **{
                f"tests of {name}": partial(self.tests, name)
                for name in ("answers", "http", "served_adapters", "parallel")
            },
        }

    def path(self, name: str) -> Path:
        """Return the file of a step's result."""
        return self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"

    def result(self, name: str) -> Found | None:
        """Return a step's result, None if it is not finished for this model and these questions."""
        if not self.path(name).exists():
            return None
        found = json.loads(self.path(name).read_text())
        same = (found["model"], found["questions"]) == (str(self.model), self.questions)
        return found if same else None

    def run(self, name: str) -> None:
        """Run a step in this process, and write its result."""
        found = {"model": str(self.model), "questions": self.questions, **self.all[name]()}
        write_atomically(self.path(name), (json.dumps(found) + "\n").encode())

    def known(self, name: str) -> Found:
        """Return the result of an earlier step."""
        found = self.result(name)
        if found is None:
            raise ValueError(f"{name!r} is not finished; run the whole list.")
        return found

    def asked(self, count: int | None = None) -> list[Any]:
        """Return prompts with their pictures."""
        return [(text, images) for text, images, _ in held_out(count or self.questions)]

    def engine(self, name: str = "guided", **options: Any) -> Engine:
        """Start vLLM."""
        return Engine(self.model, hf_overrides={"pruning": SETTINGS[name]}, **options)

    def accuracy(self, answers: Sequence[Sequence[int]]) -> float:
        """Return the percentage of right answers."""
        tokenizer = Transformers.processor_of(self.model).tokenizer
        said = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        right = [answer for _, _, answer in held_out(self.questions)]
        return 100 * sum(one == other for one, other in zip(said, right, strict=True)) / len(right)

    def reference(self, choice: str, options: Mapping[str, Any]) -> Found:
        """Answer by transformers."""
        engine = Transformers(self.model, choice)
        answers = [engine.answer(*question, **options) for question in self.asked()]
        accuracy = self.accuracy(answers)
        return {"answers": answers, "passed": True, "says": f"{accuracy:.1f} % right"}

    def equal(self, name: str) -> Found:
        """Compare vLLM's answers with those of transformers with the same options."""
        engine = self.engine(name)
        answers = engine.answers(self.asked())
        share = agreement(answers, self.known(f"transformers, {name}")["answers"])
        return {"answers": answers, "passed": share >= EQUAL, "says": f"{share:.2%} equal; at least {EQUAL:.0%}"}

    def patches(self) -> Found:
        """Compare the patches that stay with those that `explain` shows."""
        asked, engine, right = self.asked(PATCHES), self.engine(), Transformers(self.model)
        equal = 0
        for question in asked:
            engine.kept.clear()
            engine.answers([question])
            equal += engine.kept == right.patches(*question)
        return {"passed": equal == len(asked), "says": f"{equal} of {len(asked)} equal to explain's"}

    def full(self) -> Found:
        """Compare vLLM's guided answers with those of the second stage inside the decoder."""
        ours, full = self.known("guided in float32")["answers"], self.known("transformers, full IVTP")["answers"]
        share, points = agreement(ours, full), self.accuracy(ours) - self.accuracy(full)
        passed = share >= EQUAL_TO_FULL and abs(points) <= POINTS
        return {"passed": passed, "says": f"{share:.2%} equal, {points:+.2f} points; {EQUAL_TO_FULL:.0%}, {POINTS:g}"}

    def half(self, name: str) -> Found:
        """Compare accuracy in bfloat16 with that of transformers in float32."""
        answers = self.engine(name, dtype="bfloat16").answers(self.asked())
        points = self.accuracy(answers) - self.accuracy(self.known(f"transformers, {name}")["answers"])
        return {"passed": abs(points) <= POINTS, "says": f"{points:+.2f} points; at most {POINTS:g}"}

    def expected(self) -> list[list[int]]:
        """Return what transformers answers to the first few questions."""
        return self.known("transformers, guided")["answers"][:FEW]

    def same(self, answers: list[list[int]], more: str = "", passed: bool = True) -> Found:
        """Compare the answers to the first few questions with those of transformers."""
        equal = sum(one == other for one, other in zip(answers, self.expected(), strict=True))
        return {"passed": passed and equal == len(answers), "says": f"{equal} of {len(answers)} equal{more}"}

    def chunks(self) -> Found:
        """Let prompts come in chunks that cut images, in a cache that is too small for all requests."""
        small = {"num_gpu_blocks_override": 11, "max_model_len": 256, "enable_prefix_caching": False}
        engine = self.engine(max_num_batched_tokens=48, disable_log_stats=False, **small)
        import vllm

        # Answers that go on after their end outgrow the blocks; what is compared ends where the others do.
        sampling = vllm.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        answers = engine.answers(self.asked(FEW), sampling)
        expected = self.expected()
        heads = [answer[: len(other)] for answer, other in zip(answers, expected, strict=True)]
        count = engine.metrics()["vllm:num_preemptions"]
        return self.same(heads, f"; {count:g} preemptions", count > 0)

    def caches(self) -> Found:
        """Ask twice, and once more after every cache is emptied."""
        engine, asked = self.engine(), self.asked(FEW)
        cold = engine.answers(asked)
        outputs = engine.outputs(asked)
        cached = min(output.num_cached_tokens for output in outputs)
        warm = [list(output.outputs[0].token_ids) for output in outputs]
        engine.llm.reset_prefix_cache()
        engine.llm.reset_mm_cache()
        again = engine.answers(asked)
        return self.same(warm, f"; at least {cached} tokens cached", cold == warm == again and cached >= 64)

    def budgets(self) -> Found:
        """Ask with several budgets in one batch, and one by one by transformers."""
        engine, right = self.engine(mm_processor_kwargs={"max_visual_tokens": 192}), Transformers(self.model)
        budgets = (16, 32, 64, 192)
        asked = [(*one, budgets[at % len(budgets)]) for at, one in enumerate(self.asked(FEW))]
        answers = engine.answers([(text, images, {"visual_tokens": budget}) for text, images, budget in asked])
        expected = [right.answer(text, images, visual_tokens=budget) for text, images, budget in asked]
        share = agreement(answers, expected)
        return {"passed": share >= EQUAL, "says": f"{share:.2%} of {FEW} equal; at least {EQUAL:.0%}"}

    def compiled(self) -> Found:
        """Let `torch.compile` make the decoder."""
        answers = self.engine(enforce_eager=False).answers(self.asked(FEW))
        return self.same(answers)

    def tests(self, name: str) -> Found:
        """Run the tests of a part."""
        command = [sys.executable, "-m", "pytest", "-q", f"{TESTS}/test_{name}.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return {"passed": done.returncode == 0, "says": done.stdout.strip().splitlines()[-1].strip("= ")}


def agreement(answers: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the share of equal answers."""
    return sum(one == other for one, other in zip(answers, others, strict=True)) / len(answers)


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = MINIATURE,
    questions: Annotated[int, typer.Option(min=FEW, help="Held-out questions.")] = 400,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results.")] = ROOT / "out" / "serving-check",
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run what is not finished, and print the list."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here: make vllm-env, then make serving-check.")
    config = model / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "ivtp_llava":
        raise ValueError(f"{model} is no folder of an IVTP-LLaVA; `ivtp convert` makes one.")
    torch.set_num_threads(1)
    steps = Steps(model.resolve(), questions, folder.resolve())
    steps.folder.mkdir(parents=True, exist_ok=True)
    if step is not None:
        steps.run(step)
        return
    for name in steps.all:
        if steps.result(name) is not None:
            continue
        options = ["--model", str(model), "--questions", str(questions), "--out", str(folder), "--step", name]
        log = steps.path(name).with_suffix(".log")
        print(f"{name} … ({log})", file=sys.stderr)
        with open(log, "wb") as output:
            command = [sys.executable, "-m", "benchmarks.serving.check", *options]
            if subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode:
                print(f"{name} failed: {log}", file=sys.stderr)
    results = {name: steps.result(name) for name in steps.all}
    rows = [
        (name, "not finished" if found is None else "yes" if found["passed"] else "NO", (found or {}).get("says", ""))
        for name, found in results.items()
    ]
    page = markdown_table(("step", "holds", f"on {questions} held-out questions"), rows)
    write_atomically(steps.folder / "checks.md", page.encode())
    print(page)
    if not all(found is not None and found["passed"] for found in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
