"""Ask a checkpoint held-out questions under every pruning method, and write the table and the plots.

    ivtp quality --model examples/miniature --out benchmarks/results

Questions run in batches, and a batch goes through every row before the next one is drawn: an image is drawn, prepared
and encoded once for all rows that can share it, and no more than a batch is ever in memory. Answers are written down as
they come, so an evaluation that was interrupted goes on where it was when the same command is given again.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import report
from benchmarks.quality.answer_log import AnswerLog
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint, code_fingerprint
from benchmarks.quality.examination import Asked, Examination, row_cost, row_signature
from benchmarks.quality.methods import BUDGETS, Row, ablation_rows, main_rows, system_rows
from benchmarks.quality.progress import Asking
from benchmarks.quality.world import TYPES, fingerprint, sample_questions
from modeling_ivtp.files.console import quiet
from modeling_ivtp.serving.answering import load_model

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
"""The checkpoint that ships with the project."""
ROWS = ("main", "systems", "ablations", "all")
"""A few methods, all systems, the paper's ablations, or everything."""
WELL = 0.85
"""Share of right answers, unpruned, from which a type counts."""


def ask(
    model: Any, processor: Any, rows: Sequence[Row], log: AnswerLog, *, number: int, batch: int, seed: int = 0
) -> Asked:
    """Put the test questions to a model under every row, into the log; what is there already is not asked again.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    rows : sequence of Row
    log : AnswerLog
    number : int
        How many questions.
    batch : int
    seed : int
        Of random patches.
    """
    asked, unique = Asked(), {row_signature(row, model.config): row for row in rows}
    sample = sample_questions("test", number, side=model.config.vision_config.image_size)
    with Asking(len(unique) * number) as progress:
        for index, part in enumerate(_batched(sample, batch)):
            examination = Examination(model, processor, part, index * batch, seed)
            asked.questions += [question for _, question in part]
            asked.text_tokens += examination.text_tokens
            asked.windows += examination.windows
            for signature, row in unique.items():
                new = not log.has(signature, index)
                if new:
                    log.add(signature, index, *examination.answers(row))
                progress.advance(len(part), new, f"{row.method} {row.visual_tokens}")
    return asked


def _batched(sample: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(sample, size)):
        yield part


def evaluate_checkpoint(
    folder: Path,
    out: Path,
    *,
    rows: str = "main",
    number: int = 2000,
    batch: int = 16,
    budgets: Sequence[int] = BUDGETS,
    ablation_budgets: Sequence[int] = (64,),
    methods: Sequence[str] = (),
    headline: Sequence[str] | None = None,
    reference: Path | None = None,
    join: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    command: str = "",
) -> Path:
    """Evaluate a checkpoint and write results, table and plots.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        Folder of the results.
    rows : {"main", "systems", "ablations", "all"}
    number : int
        Questions.
    batch : int
    budgets, ablation_budgets : sequence of int
        Visual tokens of the main rows and of the ablations.
    methods : sequence of str
        Only rows of these names; default: all.
    headline : sequence of str, optional
        Question types whose answers make the accuracy; the others are told by type only. Default: as before, or those
        that the unpruned model answers to 85%, and all if there are none.
    reference : Path, optional
        The checkpoint that this one was retrained from; its newest results on these questions are joined.
    join : bool, default False
        Join this checkpoint's newest results on these questions, whatever their day, instead of beginning today's.
    device, dtype : str
        As in `load_model`.
    seed : int
        Of random patches.
    command : str
        How it was called, for the record.

    Returns
    -------
    Path
        The JSON file.

    Raises
    ------
    ValueError
        For options out of range, a checkpoint of another world, or a reference without results.
    """
    if number < 1 or batch < 1:
        raise ValueError(f"questions={number}, batch={batch}; allowed: at least 1.")
    if unknown := sorted(set(headline or ()) - set(TYPES)):
        raise ValueError(f"Unknown question type(s) {', '.join(unknown)}; allowed: {', '.join(TYPES)}.")
    folder, out = Path(folder), Path(out)
    checkpoint = checkpoint_fingerprint(folder)
    model, processor = load_model(folder, device=device, dtype=dtype)
    check_world(model, processor)
    chosen, skipped = _rows(model.config, rows, budgets, ablation_budgets)
    if methods:
        if unknown := sorted(set(methods) - {row.method for row in chosen}):
            raise ValueError(
                f"Unknown method(s) {', '.join(unknown)}; allowed: "
                f"{', '.join(dict.fromkeys(row.method for row in chosen))}."
            )
        # Everything is measured against the model's own unpruned self, unless it was retrained.
        alone = reference is None and not join
        chosen = [row for row in chosen if row.method in methods or (row.method == "unpruned" and alone)]
    out.mkdir(parents=True, exist_ok=True)
    sample = {"split": "test", "number": number, "side": model.config.vision_config.image_size, "seed": seed}
    of = checkpoint if reference is None else checkpoint_fingerprint(Path(reference))
    told_dtype = str(model.dtype).removeprefix("torch.")
    identity = {"checkpoint": of, "world": fingerprint(), "sample": sample, "dtype": told_dtype}
    if reference is None and not join:
        date = datetime.date.today().isoformat()
        file, before = report.results_file(out, date, identity)
    else:
        found = report.latest_results(out, identity)
        if found is None or report.unpruned_of(found[1].get("rows", [])) is None:
            raise ValueError(
                f"There are no results of {reference or folder} on these questions in {out}; evaluate it first."
            )
        file, before = found
        date = before["date"]
    code = code_fingerprint()
    asked_of = identity | {"checkpoint": checkpoint, "batch": batch, "device": str(model.device), "code": code}
    with AnswerLog(out, asked_of) as log, quiet():
        asked = ask(model, processor, chosen, log, number=number, batch=batch, seed=seed)
        mode = "inference" if reference is None else "retrained"
        measured = []
        for row in chosen:
            said, taken = log.answers(row_signature(row, model.config))
            measured.append(
                {
                    "method": row.method,
                    "visual_tokens": row.visual_tokens,
                    "table": row.table,
                    "mode": mode,
                    "checkpoint": checkpoint,
                    "code": code,
                    "options": dict(row.options),
                    "seconds": round(taken.answer, 2),
                    "prefill_seconds": round(taken.prefill, 2),
                    "selection_seconds": round(taken.selection, 3),
                    **row_cost(row, model.config, asked),
                    "right": report.pack(report.right_answers(said, [q.answer for q in asked.questions])),
                }
            )
        rows_now = report.joined(before.get("rows", []), measured)
        types = headline or before.get("questions", {}).get("headline") or _well_answered(rows_now, asked)
        results = {
            "date": date,
            **identity,
            "checkpoint_name": (folder if reference is None else Path(reference)).resolve().name,
            "questions": report.describe_questions(asked.questions, types),
            "versions": report.versions(),
            "machine": report.machine(model),
            "commands": [*before.get("commands", []), command],
            "skipped": before.get("skipped", {}) | skipped,
            "rows": report.summarised(rows_now, asked.questions, types),
        }
        report.write(file, results)
        log.finished()
    return file


def _well_answered(rows: Sequence[Mapping[str, Any]], asked: Asked) -> list[str]:
    """The types that the unpruned model answers well enough for pruning to be told from not seeing; if none is, all."""
    unpruned = report.unpruned_of(rows)
    assert unpruned is not None
    right = report.unpack(unpruned["right"], len(asked.questions))
    types = np.array([question.type for question in asked.questions])
    asked_of = [kind for kind in TYPES if kind in types]
    return [kind for kind in asked_of if right[types == kind].mean() >= WELL] or asked_of


def _rows(
    config: Any, rows: str, budgets: Sequence[int], ablation_budgets: Sequence[int]
) -> tuple[list[Row], dict[str, str]]:
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; allowed: {', '.join(ROWS)}.")
    for tokens in (*budgets, *ablation_budgets):
        if tokens < 1:
            raise ValueError(f"visual_tokens={tokens}; allowed: 1 to {config.num_patches - 1}.")
    main = main_rows(config, budgets)
    if rows == "main":
        return main, {}
    systems, unfit = system_rows(config, budgets) if rows in ("systems", "all") else ([], {})
    ablations, skipped = ablation_rows(config, ablation_budgets) if rows in ("ablations", "all") else ([], {})
    # Of methods that are in both, the system stands.
    named = {(row.method, row.visual_tokens) for row in systems}
    kept = [row for row in main if (row.method, row.visual_tokens) not in named] if rows == "all" else main[:1]
    return kept + systems + ablations, unfit | skipped
