"""Time of the diverse choices of a prefill alone, beside the prefill's matrix products, for LLaVA-1.5-7B's shape.

    python -m benchmarks.choosing --out benchmarks/results

The weights of this shape take 28 GB in float32. Here one matrix of each size stands for all of that size. It stays in
the cache, so that the products are a little faster than in a model, and the share of choosing is a little too large.
Attention, norms and activations are left out, too.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.quality.command import run
from benchmarks.quality.readme import RESULTS
from benchmarks.quality.report import write_atomically
from modeling_ivtp import IVTPLlavaForConditionalGeneration
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.flops import load_shape
from modeling_ivtp.methods.ivtp_extended import EXTENSION
from modeling_ivtp.model.diversity import SHARPNESS, choose_diverse
from modeling_ivtp.model.pruner import IVTPPruner
from modeling_ivtp.model.schedule import PruningPlan
from modeling_ivtp.speed.bench import machine
from modeling_ivtp.speed.products import Work, products

SHAPE = "llava-1.5-7b"
TEXT_TOKENS, WORDS = 64, 77
"""Tokens of the prompt beside the picture, and of CLIP's window."""


def choices(config: Any, plan: PruningPlan, batch: int) -> list[Callable[[], Any]]:
    """List the choices of a prefill, each on random scores and directions of its size."""
    drawn = torch.Generator().manual_seed(0)
    found = []
    for groups, tokens, width in (
        (plan.tower, plan.patches, config.vision_config.hidden_size),
        (plan.decoder, plan.tower_tokens, config.text_config.hidden_size),
    ):
        for group in groups:
            scores = torch.rand(batch, tokens, generator=drawn)
            directions = torch.randn(batch, tokens, width, generator=drawn)
            found.append(lambda s=scores, d=directions, keep=group.keep: choose_diverse(s, d, keep, SHARPNESS))
            tokens = group.keep
    return found


def standing_for(work: Work) -> Work:
    """Replace the layers of a model without weights by one real matrix for each size."""
    real: dict[tuple[int, int], nn.Linear] = {}
    for linear, _ in work:
        size = linear.in_features, linear.out_features
        if size not in real:
            real[size] = nn.Linear(*size, bias=False)
    return [(real[linear.in_features, linear.out_features], rows) for linear, rows in work]


@torch.inference_mode()
def measure(config: Any, budget: int, batch: int, repeats: int) -> dict[str, Any]:
    """Time the choices and the products of one prefill by turns: milliseconds, and the median share of choosing."""
    pruner = IVTPPruner(config.pruning.changed(visual_tokens=budget, **EXTENSION))
    plan = pruner.plan(config, config.num_patches)
    with torch.device("meta"):
        model = IVTPLlavaForConditionalGeneration(config)
    work = standing_for(products(model, plan, batch=batch, text_tokens=TEXT_TOKENS, words=WORDS))
    inputs = {linear.in_features: torch.randn(max(rows for _, rows in work), linear.in_features) for linear, _ in work}

    def multiply() -> None:
        for linear, rows in work:
            linear(inputs[linear.in_features][:rows])

    chosen = choices(config, plan, batch)

    def choose() -> None:
        for one in chosen:
            one()

    pairs = [(_seconds(choose), _seconds(multiply)) for _ in range(repeats + 1)][1:]  # the first one warms up
    return {
        "visual_tokens": budget,
        "batch": batch,
        "picks": sum(group.keep for group in (*plan.tower, *plan.decoder)),
        "choosing_ms": 1000 * statistics.median(choosing for choosing, _ in pairs),
        "products_ms": 1000 * statistics.median(multiplied for _, multiplied in pairs),
        "share": statistics.median(choosing / (choosing + multiplied) for choosing, multiplied in pairs),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def page(results: dict[str, Any]) -> str:
    """Return the page with the table."""
    header = ("visual tokens", "batch", "picks of one picture", "choosing, ms", "products, ms", "share of choosing")
    lines = [
        (
            row["visual_tokens"],
            row["batch"],
            row["picks"],
            f"{row['choosing_ms']:.1f}",
            f"{row['products_ms']:.0f}",
            f"{row['share']:.1%}",
        )
        for row in results["rows"]
    ]
    told = results["machine"]
    return (
        f"# Choosing alone, {results['shape']}, {results['date']}\n\n"
        f"{told['device']}, {told['threads']} threads; torch {told['versions']['torch']}; float32; medians of "
        f"{results['repeats']} interleaved runs. The diverse choices of one prefill with random scores and directions, "
        f"beside the prefill's matrix products with {TEXT_TOKENS} text tokens; the rest of the prefill is left out, so "
        "the share is an upper bound.\n\n" + markdown_table(header, lines)
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    budgets: Annotated[list[int], typer.Option("--tokens", help="Budgets; repeat.")] = [64, 128],  # noqa: B006
    batches: Annotated[list[int], typer.Option("--batch", help="Batch sizes; repeat.")] = [1, 4],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5,
    shape: Annotated[str, typer.Option(help="A published shape.")] = SHAPE,
) -> None:
    """Time the choices of a prefill alone."""
    config = load_shape(shape)
    rows = [measure(config, budget, batch, repeats) for budget in budgets for batch in batches]
    results = {
        "date": date.today().isoformat(),
        "shape": shape,
        "repeats": repeats,
        "machine": machine(torch.device("cpu")),
        "rows": rows,
    }
    file = out / f"choosing-{shape}-{results['date']}.json"
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), page(results).encode())
    print(page(results))


if __name__ == "__main__":
    run(main)
