"""Evaluate arms on questions of one's own, through the engine of `ivtp batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .. import batch
from ..batch.data import open_data
from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..files.tables import markdown_table
from ..methods.names import UNPRUNED
from .arm import Arm
from .intervals import paired_interval, score_interval
from .metrics import load_metric
from .tables import costs

SEVERAL = ("vqa_accuracy", "anls")
"""Metrics that compare with all right answers of a question."""
SINGLE = ("gqa_match", "scienceqa_match", "pope", "exact_word")
"""Metrics that compare with one right answer."""
PEOPLE = 4
"""Fewest answers of people with which VQA accuracy can give a question all points."""


@dataclass(frozen=True)
class OwnOptions:
    """Systems and questions of an evaluation.

    Attributes
    ----------
    model : str
        Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.
    questions : str
        As `--data` of `ivtp batch`: a JSON or Parquet file with pictures and questions.
    metric : str
        One of `SEVERAL` or `SINGLE`.
    arms : sequence of Arm
        The unpruned one first, to which the others are compared.
    out : Path
        Folder of the answers and results; a run that was begun there goes on.
    answer_column, image_column, question_column : str
    limit : int, optional
        Only the first rows.
    max_new_tokens, batch_size : int
    device : str, optional
    dtype : str

    Raises
    ------
    ValueError
        For a metric that needs more than questions and answers.
    """

    model: str
    questions: str
    metric: str
    arms: Sequence[Arm]
    out: Path
    answer_column: str = "answer"
    image_column: str = "image"
    question_column: str = "question"
    limit: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 8
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.metric not in SEVERAL + SINGLE:
            raise ValueError(f"metric={self.metric!r}; allowed for your own questions: {', '.join(SEVERAL + SINGLE)}")


def references(options: OwnOptions) -> list[Any]:
    """Return the right answers: a list of texts for each question, or one text, as the metric takes them.

    Raises
    ------
    ValueError
        If rows have none, with the first rows' numbers, or other answers than the metric can compare with.
    """
    column = open_data(
        options.questions,
        split="train",
        limit=options.limit,
        image_column=None,
        prompt_column=options.answer_column,
        id_column="",
    )
    found = [_texts(row.question) for row in column.rows(0, len(column))]
    if missing := [number for number, texts in enumerate(found) if not texts]:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} rows of {options.questions} have no {options.answer_column}: {shown}")
    if options.metric == "vqa_accuracy" and (
        few := [number for number, texts in enumerate(found) if len(texts) < PEOPLE]
    ):
        raise ValueError(
            f"row {few[0]} of {options.questions} has {len(found[few[0]])} right answer(s); vqa_accuracy counts how "
            f"many of ten people gave an answer, and needs {PEOPLE} or more; anls takes any number"
        )
    if options.metric in SEVERAL:
        return found
    if several := [number for number, texts in enumerate(found) if len(texts) > 1]:
        raise ValueError(
            f"row {several[0]} of {options.questions} has several answers; {options.metric} takes one, anls any number"
        )
    return [texts[0] for texts in found]


def _texts(cell: Any) -> list[str]:
    cells = cell if isinstance(cell, list) else [cell]
    return [str(one) for one in cells if one is not None and str(one).strip()]


def evaluate(options: OwnOptions, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Answer the questions in every arm, and score the answers.

    Returns
    -------
    dict
        Ready for JSON. `arms`: for each its `score` from 0 to 100 with 95% `interval` over questions, the
        `difference_interval` to the unpruned arm, the number of `failed` rows, which count as wrong, and the costs.

    Raises
    ------
    ValueError
        For rows without answers, and as `batch.run`. Nothing is written then.
    """
    wanted = references(options)
    metric, rows = load_metric(options.metric), {}
    metric.compute(predictions=[""] * len(wanted), references=wanted)  # refuses right answers that it cannot take
    _, folder = open_checkpoint(options.model, HubOptions())
    config = read_config(folder, options.model, quantized=True)
    base = np.array([])
    for arm in options.arms:
        said = _answers(options, arm)
        texts = [text or "" for text in said]
        found = metric.compute(predictions=texts, references=wanted)
        each = 100 * np.asarray(found.get("scores", found.get("right")), dtype=np.float64)
        # An empty text may be read as an answer, such as POPE's yes.
        each[[text is None for text in said]] = 0
        base = each if arm.method == UNPRUNED else base
        rows[arm.name] = {
            "score": float(each.mean()),
            "interval": [100 * end for end in score_interval(each / 100)],
            "difference_interval": list(paired_interval(each, base)),
            "failed": said.count(None),
            **costs(config, arm),
        }
        tell(f"{arm.name}: {rows[arm.name]['score']:.1f}")
    return {"metric": options.metric, "questions": len(wanted), "arms": rows}


def _answers(options: OwnOptions, arm: Arm) -> list[str | None]:
    """Return an arm's answers in the order of the rows; None for a row that failed."""
    out = options.out / arm.name
    batch.run(
        batch.Options(
            model=options.model,
            data=options.questions,
            out=out,
            image_column=options.image_column,
            prompt_column=options.question_column,
            visual_tokens=arm.visual_tokens,
            method=arm.method,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
            limit=options.limit,
        )
    )
    table = pq.read_table(out, columns=["row", "answer"]).to_pylist()
    return [row["answer"] for row in sorted(table, key=lambda row: row["row"])]


def page(results: dict[str, Any]) -> str:
    """Return the table of the arms, in Markdown."""
    header = [
        "",
        results["metric"],
        "95% interval",
        "difference to unpruned",
        "failed rows",
        "TFLOPs",
        "final",
        "layer-averaged",
    ]
    lines = [
        [
            name,
            f"{row['score']:.1f}",
            "{:.1f} to {:.1f}".format(*row["interval"]),
            "" if name == "unpruned" else "{:+.1f} to {:+.1f}".format(*row["difference_interval"]),
            row["failed"],
            f"{row['tflops']:.3g}",
            row["final_tokens"],
            f"{row['layer_averaged_tokens']:.1f}",
        ]
        for name, row in results["arms"].items()
    ]
    return f"{results['questions']:,} questions.\n\n{markdown_table(header, lines)}"
