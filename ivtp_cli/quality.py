"""`ivtp quality`: measure what pruning costs in accuracy."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, Invocation, set_threads


class Rows(str, Enum):
    """Groups of rows that can be evaluated."""

    main = "main"
    systems = "systems"
    compact = "compact"
    ablations = "ablations"
    all = "all"


Headline = Annotated[
    list[str] | None, typer.Option(help="Types that make the accuracy; repeat. Default: those answered well.")
]
Reference = Annotated[
    Path | None, typer.Option(help="The checkpoint that this one was retrained from; joins its results.")
]
Join = Annotated[
    bool, typer.Option("--join", help="Join this checkpoint's newest results instead of beginning today's.")
]


def quality(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint.", show_default="the miniature that ships")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    rows: Annotated[
        Rows,
        typer.Option(
            help="A few methods, all systems, all with renumbered positions, the paper's ablations, or everything."
        ),
    ] = Rows.main,
    questions: Annotated[int, typer.Option(help="Held-out test questions, evenly over the types.")] = 2000,
    batch: Annotated[int, typer.Option(help="Questions answered side by side.")] = 16,
    tokens: Annotated[list[int] | None, typer.Option(help="Budgets of the methods; repeat. Default: 192 … 16.")] = None,
    ablation_tokens: Annotated[list[int] | None, typer.Option(help="Budgets of the ablations. Default: 64.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these; repeat. Default: all.")] = None,
    headline: Headline = None,
    reference: Reference = None,
    join: Join = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: what there is.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of random patches.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's own.")] = None,
    debug: Debug = False,
) -> None:
    """Measure what pruning costs in accuracy, on the drawn world of the quality benchmark (from a clone).

    The same command continues an evaluation that was interrupted.
    """
    evaluation = _evaluation()
    set_threads(threads)
    file = evaluation.evaluate_checkpoint(
        model or evaluation.MINIATURE,
        out,
        rows=rows.value,
        number=questions,
        batch=batch,
        budgets=tokens or evaluation.BUDGETS,
        ablation_budgets=ablation_tokens or (64,),
        methods=method or (),
        headline=headline,
        reference=reference,
        join=join,
        device=device,
        dtype=dtype,
        seed=seed,
        command=shlex.join(["ivtp", *context.ensure_object(Invocation).arguments]),
    )
    typer.echo(file.with_suffix(".md").read_text())
    typer.echo(f"Written: {file} and beside it .md and .png")


def _evaluation() -> Any:
    """Import the evaluation from `benchmarks/`, which belongs to the repository and not to the installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir():
        raise ImportError(
            "the benchmarks are not part of the installed package: clone the repository, and there run "
            "pip install --editable '.[dev]'"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module("benchmarks.quality.evaluate_quality")
