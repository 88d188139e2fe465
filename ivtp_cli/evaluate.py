"""`ivtp evaluate`: the paper's benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .batch import check_installed, check_not_launched
from .options import Debug, DeviceOption, DtypeOption, ModelOption

Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="NAME=FOLDER: a benchmark's data set in a folder of yours; may be repeated."),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option("--tokens", min=1, help="Visual tokens left in the end; may be repeated.", show_default="64"),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="Method that prunes, such as fastv, or a trained one's folder; may be repeated.",
        show_default="ivtp",
    ),
]

Questions = Annotated[
    str | None,
    typer.Option(
        "--questions",
        help="Questions of your own in place of benchmarks: a JSON or Parquet file, as for `ivtp batch`, with answers.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="How your own questions are scored: gqa_match, exact_word, scienceqa_match or pope with one answer; "
        "anls with one or several; vqa_accuracy with those of four people or more."
    ),
]


def evaluate(
    model: ModelOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results; a run that was begun there goes on.")
    ],
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="paper, which is all twelve of Table 1, or names with commas, such as gqa,pope.", show_default="paper"
        ),
    ] = None,
    tokens: Tokens = None,
    method: Methods = None,
    data: Data = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first questions; of MME and MMBench with those that are scored together with them.",
            show_default="all",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered side by side.")] = 8,
    own_prompt: Annotated[
        bool,
        typer.Option(
            "--own-prompt",
            help="Ask by the checkpoint's own template and processor, not by LLaVA-1.5's system prompt and padding.",
        ),
    ] = False,
    questions: Questions = None,
    metric: Metric = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Column of the right answers of --questions.", show_default="answer")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: Debug = False,
) -> None:
    """Run the paper's benchmarks in lmms-eval, unpruned and pruned, and write Table 1 for your checkpoint.

    Before it starts it says what each benchmark needs. One whose data or judge cannot be had is left out by name.
    With --questions it scores questions of your own, and needs no lmms-eval.

    Several GPUs: accelerate launch --multi_gpu --num_processes 2 -m modeling_ivtp.cli evaluate ...; --questions takes
    all of this machine by itself.
    """
    from modeling_ivtp.evaluation.arm import arms_of

    arms = arms_of(method or [], tokens or [])
    if (questions is None) != (metric is None):
        raise ValueError("evaluate takes --questions and --metric together")
    if questions is None and answer_column is not None:
        raise ValueError("evaluate takes --answer-column with --questions")
    if questions is not None:
        if benchmarks is not None or data:
            raise ValueError("evaluate takes --questions, or --benchmarks and --data")
        check_installed()
        check_not_launched("evaluate")
        from modeling_ivtp.evaluation import own

        mine = own.OwnOptions(
            model=model,
            questions=questions,
            metric=str(metric),
            arms=arms,
            out=out.expanduser(),
            answer_column=answer_column or "answer",
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        answered = own.evaluate(mine, typer.echo)
        _write(mine.out, answered, own.page(answered))
        return
    _check_harness()
    from modeling_ivtp.evaluation import paper, run, tables
    from modeling_ivtp.evaluation.processes import launched

    folders = dict(_folder(entry) for entry in data or [])
    options = run.Options(
        model=model,
        benchmarks=paper.chosen([name.strip() for name in (benchmarks or "paper").split(",") if name.strip()]),
        arms=arms,
        out=out.expanduser(),
        data=folders,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        published=not own_prompt,
    )
    with launched(device) as state:
        measured = run.run(options, typer.echo)
    if not state.is_main_process:
        return
    if not measured.scores:
        raise ValueError(
            "no benchmark could be scored: " + "; ".join(f"{n}, {why}" for n, why in measured.left_out.items())
        )
    results = tables.summary(measured, options.arms, limit)
    _write_blocks(options.out, results, Path(model).name)
    _write(options.out, results, tables.page(results))


def _write_blocks(out: Path, results: Mapping[str, Any], model: str) -> None:
    """Write each arm's block for a model card, in place of those of an earlier run."""
    from modeling_ivtp.evaluation.tables import model_index

    for earlier in out.glob("model-index-*.yaml"):
        earlier.unlink()
    for arm in results["arms"]:
        if block := model_index(results, model, arm):
            (out / f"model-index-{arm}.yaml").write_text(block)
    if results["limit"] is not None:
        typer.echo("No block for a model card is written: --limit asked a part of the questions.")


def _write(out: Path, results: Mapping[str, Any], page: str) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(page)
    typer.echo(page)
    typer.echo(f"Written: {out}/results.json and {out}/table.md")


def _folder(entry: str) -> tuple[str, Path]:
    name, equals, folder = entry.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--data={entry}; allowed: NAME=FOLDER, such as gqa=data/gqa")
    return name, Path(folder).expanduser()


def _check_harness() -> None:
    try:
        import_module("lmms_eval")
    except ImportError as error:
        raise ImportError("the benchmarks run in lmms-eval: pip install 'ivtp-llava[eval]'") from error
