r"""Write the drawn world's test questions as a task of lmms-eval, with its pictures.

python -m benchmarks.quality.lmms_task --out out/drawn-world --questions 200
lmms-eval --model ivtp_llava --model_args pretrained=examples/miniature \\
        --include_path out/drawn-world --tasks drawn_world
"""

import io
from pathlib import Path
from typing import Annotated

import datasets
import typer
from PIL import Image

from benchmarks.quality.checkpoint import ANSWER_TOKENS
from benchmarks.quality.world import sample_questions

TASK = "drawn_world"
_YAML = """\
task: {task}
dataset_path: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {task}.pictures
doc_to_text: !function {task}.question
doc_to_target: answer
process_results: !function {task}.score
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
metric_list:
  - metric: exact_word
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
_FUNCTIONS = '''\
"""Functions that lmms-eval calls for the task beside this file."""

from modeling_ivtp.evaluation.metrics.exact_word.exact_word import first_word


def pictures(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"exact_word": float(first_word(results[0]) == first_word(doc["answer"]))}
'''


def write_task(folder: Path, number: int, *, side: int = 336) -> Path:
    """Write the task into a folder.

    Parameters
    ----------
    folder : Path
        `lmms-eval --include_path` takes it.
    number : int
        Number of questions, evenly over the types.
    side : int
        Height and width of the pictures.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If `number` is below 1.
    """
    if number < 1:
        raise ValueError(f"questions={number}; allowed: at least 1.")
    data = folder.resolve() / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": _png(scene.pixels), "path": None}, "question": question.text, "answer": question.answer}
        for scene, question in sample_questions("test", number, side=side)
    ]
    kinds = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(data / "test.parquet")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, data=data, tokens=ANSWER_TOKENS))
    (folder / f"{TASK}.py").write_text(_FUNCTIONS)
    return folder


def _png(pixels: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the task.")],
    questions: Annotated[int, typer.Option(help="Number of questions.")] = 200,
) -> None:
    """Write the drawn world's test questions as a task of lmms-eval."""
    typer.echo(f"Written: {write_task(out, questions)}")


if __name__ == "__main__":
    typer.run(main)
