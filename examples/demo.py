"""Draw a scene that the miniature has never seen, ask three questions about it, and show what each of them keeps.

    python -m examples.demo

The miniature is the small LLaVA that ships with the project; it knows the drawn world of the quality benchmark and
nothing else. For a checkpoint and pictures of your own there are `ivtp generate --compare` and `ivtp explain`.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.quality.world import RELATIONS, Question, Scene, draw_scene, questions
from examples.demo_picture import Kept, draw
from modeling_ivtp.serving import answering

MINIATURE = Path(__file__).parent / "miniature"
BUDGETS = (64, 16)
TYPES = (("colour",), RELATIONS, ("corner", "existence"))


def choose_questions(scene: Scene) -> list[Question]:
    """Choose questions about a colour, a relation and a place, each about other objects if the scene allows."""
    chosen: list[Question] = []
    for types in TYPES:
        candidates = questions(scene, types=types, style="plain")
        used = {number for question in chosen for number in question.subjects + question.sources}
        candidates.sort(key=lambda question: len(used & {*question.subjects, *question.sources}))
        chosen += candidates[:1]
    return chosen


def ask(model: Any, processor: Any, scene: Scene, question: Question, repeats: int) -> list[Kept]:
    """Answer one question, unpruned and at every budget."""
    inputs = answering.prepare(model, processor, [Image.fromarray(scene.pixels)], question.prompt)
    answers = []
    for tokens in (None, *BUDGETS):
        options = {"enabled": False} if tokens is None else {"visual_tokens": tokens, "tower_tokens": None}
        with model.pruning(**options):
            answer = answering.answer(model, processor, inputs, max_new_tokens=4, repeats=repeats)
            patches = range(model.config.num_patches)
            if tokens is not None:
                trace = answering.explain(model, processor, inputs)
                patches = trace.images[0].groups[-1].kept.tolist()
        answers.append(Kept(list(patches), answer, answer.text == question.answer))
    return answers


def table(question: Question, answers: list[Kept]) -> Table:
    """List the answers to a question and what they cost."""
    rows = Table(title=f"{question.text}  ({question.answer})", title_justify="left", title_style="bold")
    for column in ("visual tokens", "layer-averaged", "KV cache", "seconds"):
        rows.add_column(column, justify="right")
    rows.add_column("answer")
    for kept in answers:
        answer = kept.answer
        rows.add_row(
            str(answer.visual_tokens[0]), f"{answer.layer_averaged_tokens:.0f}", f"{answer.kv_bytes / 1e6:.2f} MB",
            f"{answer.seconds:.3f}", answer.text + ("" if kept.right else "  (wrong)"),
        )  # fmt: skip
    return rows


def main(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("out/demo.png"),
    scene: Annotated[int, typer.Option(help="Which scene of the test, 0 to 999999999.")] = 113,
    model: Annotated[Path, typer.Option(help="The miniature, or one trained like it.")] = MINIATURE,
    repeats: Annotated[int, typer.Option(min=0, help="Timed runs of each answer; the median is shown.")] = 5,
) -> None:
    """Run the demonstration."""
    torch.set_num_threads(os.cpu_count() or 1)
    loaded, processor = answering.load_model(model, device="cpu", dtype="float32")
    drawn = draw_scene("test", scene, side=loaded.config.vision_config.image_size)
    asked = [(question, ask(loaded, processor, drawn, question, repeats)) for question in choose_questions(drawn)]
    for question, answers in asked:
        Console().print(table(question, answers))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(drawn, asked).savefig(out)
    print(f"Open {out} to see what each question keeps of the same picture.")


if __name__ == "__main__":
    typer.run(main)
