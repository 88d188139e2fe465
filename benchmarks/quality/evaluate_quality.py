"""Ask a checkpoint held-out questions under every pruning method, and write the tables and the plots.

    ivtp quality --model examples/miniature --out benchmarks/results

Questions run in batches, and a batch goes through every row before the next one is drawn: an image is drawn, prepared
and encoded once for all rows that can share it, and no more than a batch is ever in memory. Answers are logged as they
come, so the same command continues an evaluation that was interrupted.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from benchmarks.quality import report
from benchmarks.quality.answer_log import AnswerLog
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint, code_fingerprint
from benchmarks.quality.examination import Asked, Examination, row_cost, row_signature
from benchmarks.quality.methods import BUDGETS, Row, ablation_rows, compact_rows, main_rows, system_rows
from benchmarks.quality.progress import Asking
from benchmarks.quality.world import TYPES, fingerprint, sample_questions
from modeling_ivtp.files.console import quiet
from modeling_ivtp.serving.answering import load_model

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
"""The checkpoint that ships with the project."""
ROWS = ("main", "systems", "compact", "ablations", "all")
"""The kinds of rows: a few methods, all systems, the paper's ablations, or everything."""
WELL = 0.85
"""The share of right answers, unpruned, from which a question type counts."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a checkpoint.

    Attributes
    ----------
    checkpoint : str
        Fingerprint of the checkpoint.
    identity : dict
        Entries of the results that rows in one file have in common; the fingerprint in it is that of the checkpoint
        from which a retrained one came.
    mode : {"inference", "retrained"}
    name : str
        Name of the checkpoint that the results are of.
    code : str
        Fingerprint of the code that answers.
    """

    checkpoint: str
    identity: dict[str, Any]
    mode: str
    name: str
    code: str

    @classmethod
    def of(
        cls, model: Any, folder: Path, checkpoint: str, reference: Path | None, *, number: int, seed: int
    ) -> "Evaluation":
        """Describe the evaluation of a loaded checkpoint."""
        identity = {
            "checkpoint": checkpoint if reference is None else checkpoint_fingerprint(reference),
            "world": fingerprint(),
            "sample": {"split": "test", "number": number, "side": model.config.vision_config.image_size, "seed": seed},
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        mode = "inference" if reference is None else "retrained"
        return cls(checkpoint, identity, mode, (reference or folder).resolve().name, code_fingerprint())


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
    """Evaluate a checkpoint and write results, page and plots.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        Folder of the results.
    rows : {"main", "systems", "ablations", "all"}
    number : int
        Number of questions.
    batch : int
    budgets, ablation_budgets : sequence of int
        Visual tokens of the main rows and of the ablations.
    methods : sequence of str
        Only rows of these names; default: all.
    headline : sequence of str, optional
        Question types that count for the accuracy; the others are reported by type only. Default: those of the results
        so far, else those that the unpruned model answers to 85%, and all if there are none.
    reference : Path, optional
        The checkpoint that this one was retrained from; its newest results on these questions are joined.
    join : bool, default False
        Join this checkpoint's newest results on these questions, whatever their date, instead of beginning today's.
    device, dtype : str
        As in `load_model`.
    seed : int
        Seed of random patches.
    command : str
        The command that was given, for the record.

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
    folder, out, reference = Path(folder), Path(out), None if reference is None else Path(reference)
    checkpoint = checkpoint_fingerprint(folder)
    model, processor = load_model(folder, device=device, dtype=dtype)
    check_world(model, processor)
    chosen, skipped = _rows(model.config, rows, budgets, ablation_budgets)
    joins = join or reference is not None
    chosen = _only(chosen, methods, unpruned=not joins)
    out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation.of(model, folder, checkpoint, reference, number=number, seed=seed)
    origin = reference or folder
    _open_results(out, evaluation, origin, joins=joins)  # what cannot be joined is refused before the questions
    asked_of = evaluation.identity | {
        "checkpoint": evaluation.checkpoint, "batch": batch, "device": str(model.device), "code": evaluation.code
    }  # fmt: skip
    with AnswerLog(out, asked_of) as log, quiet():
        asked = ask(model, processor, chosen, log, number=number, batch=batch, seed=seed)
        measured = _measured(chosen, log, asked, model.config, evaluation)
        # Others may have joined their rows in the meantime, and may be about to.
        with FileLock(out / ".results.lock"):
            file, before = _open_results(out, evaluation, origin, joins=joins)
            all_rows = report.joined(before.get("rows", []), measured)
            types = headline or before.get("questions", {}).get("headline") or _well_answered(all_rows, asked)
            # Where patches are lost, and another seed, stay in the results that are joined.
            results = before | {
                **evaluation.identity,
                "checkpoint_name": evaluation.name,
                "questions": report.describe_questions(asked.questions, types),
                "versions": report.versions(),
                "machine": report.machine(model),
                "commands": [*before.get("commands", []), command],
                "skipped": before.get("skipped", {}) | skipped,
                "rows": report.summarised(all_rows, asked.questions, types),
            }
            report.write(file, results)
        log.finished()
    return file


def _rows(
    config: Any, rows: str, budgets: Sequence[int], ablation_budgets: Sequence[int]
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a kind, and the reasons of those that do not fit the model."""
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; allowed: {', '.join(ROWS)}.")
    for tokens in (*budgets, *ablation_budgets):
        if tokens < 1:
            raise ValueError(f"visual_tokens={tokens}; allowed: 1 to {config.num_patches - 1}.")
    main = main_rows(config, budgets)
    if rows == "main":
        return main, {}
    systems, unfit = system_rows(config, budgets) if rows in ("systems", "all") else ([], {})
    compact, unfit_compact = compact_rows(config, budgets) if rows in ("compact", "all") else ([], {})
    ablations, skipped = ablation_rows(config, ablation_budgets) if rows in ("ablations", "all") else ([], {})
    # A method that is in both is kept as a system.
    named = {(row.method, row.visual_tokens) for row in systems}
    kept = [row for row in main if (row.method, row.visual_tokens) not in named] if rows == "all" else main[:1]
    return kept + systems + compact + ablations, unfit | unfit_compact | skipped


def _only(rows: list[Row], methods: Sequence[str], *, unpruned: bool) -> list[Row]:
    """Return the rows of some methods, all for none; `unpruned` adds the row that they are measured against."""
    if not methods:
        return rows
    if unknown := sorted(set(methods) - {row.method for row in rows}):
        allowed = ", ".join(dict.fromkeys(row.method for row in rows))
        raise ValueError(f"No row of {', '.join(unknown)} at these numbers of tokens; allowed: {allowed}.")
    return [row for row in rows if row.method in methods or (row.method == "unpruned" and unpruned)]


def _open_results(out: Path, evaluation: Evaluation, origin: Path, *, joins: bool) -> tuple[Path, dict[str, Any]]:
    """Return the file for the results and what it holds so far: today's, or the newest if the evaluation `joins`."""
    if not joins:
        date = datetime.date.today().isoformat()
        file, before = report.results_file(out, date, evaluation.identity)
        return file, {"date": date} | before
    found = report.latest_results(out, evaluation.identity)
    if found is None or report.unpruned_of(found[1].get("rows", [])) is None:
        raise ValueError(f"There are no results of {origin} on these questions in {out}; evaluate it first.")
    return found


def ask(
    model: Any, processor: Any, rows: Sequence[Row], log: AnswerLog, *, number: int, batch: int, seed: int = 0
) -> Asked:
    """Ask a model the test questions under every row, and log its answers; logged batches are not asked again.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    rows : sequence of Row
    log : AnswerLog
    number : int
        Number of questions.
    batch : int
    seed : int
        Seed of random patches.
    """
    asked, unique = Asked(), {row_signature(row, model.config): row for row in rows}
    sample = sample_questions("test", number, side=model.config.vision_config.image_size)
    with Asking(len(unique) * number) as progress:
        for index, part in enumerate(_batched(sample, batch)):
            examination = Examination(model, processor, part, index * batch, seed)
            asked.questions += [question for _, question in part]
            asked.text_tokens += examination.text_tokens
            asked.windows += examination.windows
            asked.text_before += examination.text_before
            for signature, row in unique.items():
                new = not log.has(signature, index)
                if new:
                    log.add(signature, index, examination.answers(row))
                progress.advance(len(part), new, f"{row.method} {row.visual_tokens}")
    return asked


def _batched(sample: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(sample, size)):
        yield part


def _measured(
    rows: Sequence[Row], log: AnswerLog, asked: Asked, config: Any, evaluation: Evaluation
) -> list[dict[str, Any]]:
    """Return the results of rows whose answers are in the log: options, seconds, costs and right answers."""
    measured = []
    for row in rows:
        answers, taken, kept = log.answers(row_signature(row, config))
        measured.append(
            {
                "method": row.method,
                "visual_tokens": row.visual_tokens,
                "table": row.table,
                "mode": evaluation.mode,
                "checkpoint": evaluation.checkpoint,
                "code": evaluation.code,
                "date": datetime.date.today().isoformat(),
                "threads": torch.get_num_threads(),
                "options": dict(row.options),
                "seconds": round(taken.answer, 2),
                "prefill_seconds": round(taken.prefill, 2),
                "selection_seconds": round(taken.selection, 3),
                **row_cost(row, config, asked, kept),
                "right": report.pack(report.right_answers(answers, [question.answer for question in asked.questions])),
            }
        )
    return measured


def _well_answered(rows: Sequence[Mapping[str, Any]], asked: Asked) -> list[str]:
    """Return the types that the unpruned model answers to `WELL`, or all if there are none.

    On the others, pruning cannot be told from not seeing.
    """
    unpruned = report.unpruned_of(rows)
    assert unpruned is not None
    right = report.unpack(unpruned["right"], len(asked.questions))
    types = np.array([question.type for question in asked.questions])
    present = [kind for kind in TYPES if kind in types]
    return [kind for kind in present if right[types == kind].mean() >= WELL] or present
