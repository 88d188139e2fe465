"""The place where a method loses what a question needs: questions that still have a patch of every object they name.

    python -m benchmarks.quality.survival benchmarks/results/quality-DATE.json --model examples/miniature --tokens 64

follows the kept patches of the file's first questions through every group of layers, adds the result to the file, and
writes its page again.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

from benchmarks.quality import command, report
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint
from benchmarks.quality.examination import Examination
from benchmarks.quality.methods import Row, main_rows
from benchmarks.quality.world import Question, Scene, needed_objects, sample_questions, shown_patches
from modeling_ivtp.files.console import quiet
from modeling_ivtp.serving.answering import load_model

FOLLOWED = ("random", "cls-topk", "cls-topk-all-layers", "ivtp-v", "ivtp")


def whats_left(examination: Examination, row: Row) -> dict[str, torch.Tensor]:
    """Return the patches that a row keeps for each question after every step: int64 (B, k) by the step's name."""
    model = examination.model
    if row.chooser:
        return {"before the decoder": examination.kept_patches(row)}
    with model.pruning(**row.options):
        trace = model.explain(examination.processor, **examination.inputs, pixel_values=examination.pixels)
    return {
        f"{groups[0].stage}, layers {groups[0].layers[0] + 1} to {groups[0].layers[1] + 1}": torch.stack(
            [group.kept for group in groups]
        )
        for groups in zip(*(image.groups for image in trace.images), strict=True)
    }


def all_left(asked: Sequence[tuple[Scene, Question]], kept: torch.Tensor) -> list[bool]:
    """Return for each question whether a patch is kept of every object that it asks about or is answered from."""
    left = []
    for (scene, question), patches in zip(asked, kept.tolist(), strict=True):
        objects, _ = needed_objects(scene, question)
        left.append(bool(shown_patches(scene)[list(objects)][:, patches].any(1).all()))
    return left


def follow(model: Any, processor: Any, rows: Sequence[Row], number: int, batch: int, seed: int = 0) -> dict[str, Any]:
    """Follow the patches that every row keeps.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    rows : sequence of Row
    number : int
        Number of test questions.
    batch : int
    seed : int
        Seed of random patches.

    Returns
    -------
    dict
        By method a list of steps: `step`, `tokens`, and `left`, a bool for each question.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {row.method: {} for row in rows}
    sample = sample_questions("test", number, side=model.config.vision_config.image_size)
    batches = range(0, number, batch)
    for first in track(batches, description="following patches"):
        part = list(islice(sample, batch))
        examination = Examination(model, processor, part, first, seed)
        for row in rows:
            for step, kept in whats_left(examination, row).items():
                entry = found[row.method].setdefault(step, {"step": step, "tokens": kept.shape[1], "left": []})
                entry["left"] += all_left(part, kept)
    return {method: list(steps.values()) for method, steps in found.items()}


def summary(
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    questions: Sequence[Question],
    right: Mapping[str, np.ndarray],
    headline: Sequence[str],
) -> dict[str, Any]:
    """Return the share of questions with everything left, by step and type, and the accuracy with and without.

    Parameters
    ----------
    found : mapping
        The result of `follow`.
    questions : sequence of Question
    right : dict of str to bool array
        Right and wrong for each method.
    headline : sequence of str
        Types that count for the shares over all types.

    Returns
    -------
    dict
        By method: `steps` with `step`, `tokens`, `share` and `by_type`; `accuracy` of the headline's questions with
        everything `left` after the last step and with something `gone`, None where there is no such question.
        Questions that ask about no object in the scene have nothing to lose and are left out.
    """
    types = np.array([question.type for question in questions])
    asks = np.array([bool(question.subjects + question.sources) for question in questions])
    main = asks & np.isin(types, list(headline))
    summaries: dict[str, Any] = {}
    for method, steps in found.items():
        shares = []
        for step in steps:
            left = np.array(step["left"])
            by_type = {kind: _mean(left[asks & (types == kind)]) for kind in dict.fromkeys(types.tolist())}
            shares.append(
                {"step": step["step"], "tokens": step["tokens"], "share": _mean(left[main]), "by_type": by_type}
            )
        end = np.array(steps[-1]["left"])
        answers = right[method][: len(end)]
        summaries[method] = {
            "steps": shares,
            "accuracy": {"left": _mean(answers[main & end]), "gone": _mean(answers[main & ~end])},
        }
    return summaries


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def main(
    file: Annotated[Path, typer.Argument(help="Results of the checkpoint, to which the shares are added.")],
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    tokens: Annotated[int, typer.Option(help="Budget of the methods.")] = 64,
    questions: Annotated[int, typer.Option(help="How many of the file's questions, from the first on.")] = 1100,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 24,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = None,
) -> None:
    """Follow the patches of a checkpoint's questions."""
    results = json.loads(file.read_text())
    if (checkpoint := checkpoint_fingerprint(model)) != results["checkpoint"]:
        raise ValueError(f"{file} holds results of {results['checkpoint']}; {model} is {checkpoint}.")
    number = min(questions, results["sample"]["number"])
    llava, processor = load_model(model, device=device)
    check_world(llava, processor)
    answers = {
        row["method"]: report.unpack(row["right"], results["sample"]["number"])
        for row in results["rows"]
        if row["visual_tokens"] == tokens and not row["table"] and row["mode"] == "inference"
    }
    rows = [row for row in main_rows(llava.config, [tokens]) if row.method in FOLLOWED and row.method in answers]
    if not rows:
        raise ValueError(f"{file} has no rows of {', '.join(FOLLOWED)} at {tokens} visual tokens.")
    with quiet():
        found = follow(llava, processor, rows, number, batch, seed=results["sample"]["seed"])
    sample = sample_questions("test", number, side=results["sample"]["side"])
    asked = [question for _, question in sample]
    shares = summary(found, asked, answers, results["questions"]["headline"])
    results["survival"] = {"visual_tokens": tokens, "questions": number, "methods": shares}
    report.write(file, results)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    command.run(main)
