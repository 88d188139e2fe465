"""`ivtp flops`: what a prompt costs, from shapes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Debug
from .tables import new_table, show, to_json


def flops(
    preset: Annotated[
        str | None, typer.Option(help="A published shape, such as llava-1.5-7b.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder of a checkpoint whose shape counts.", show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="System that prunes, or unpruned; may be repeated.", show_default="ivtp"),
    ] = None,
    text_tokens: Annotated[
        list[int] | None, typer.Option(help="Of the prompt; may be repeated with --sweep.", show_default="512")
    ] = None,
    visual_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Left in the end; may be repeated with --sweep.", show_default="the shape's own, 64"),
    ] = None,
    instruction_tokens: Annotated[
        int | None, typer.Option(min=0, help="CLIP tokens of the instruction.", show_default="as many as text tokens")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the KV cache: float16, bfloat16, float32.")] = "float16",
    sweep: Annotated[bool, typer.Option("--sweep", help="A table over methods, text and visual tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Count what a prompt with one image costs, from shapes alone: no weights are needed."""
    if (preset is None) == (model is None):
        raise ValueError("flops needs one of --preset and --model")
    bytes_of = {"float16": 2, "bfloat16": 2, "float32": 4}
    if dtype not in bytes_of:
        raise ValueError(f"--dtype={dtype}; allowed: {', '.join(bytes_of)}")
    from .. import flops as counting

    config = counting.load_shape(preset) if preset is not None else _shape_of(model)
    names, texts = method or ["ivtp"], text_tokens or [512]
    budgets = visual_tokens or [config.pruning.visual_tokens]
    if not sweep and max(len(names), len(texts), len(budgets)) > 1:
        raise ValueError("several methods or token counts make a table: add --sweep")
    settings = {"instruction_tokens": instruction_tokens, "value_bytes": bytes_of[dtype]}
    counts = {
        (name, budget, text): counting.count_named(config, name, budget, text_tokens=text, **settings)
        for name in names
        for budget in (budgets if name != "unpruned" else [config.num_patches])
        for text in texts
    }
    if as_json:
        rows = [
            {"method": name, "visual_tokens": budget} | found.to_dict() for (name, budget, _), found in counts.items()
        ]
        typer.echo(to_json(rows if sweep else rows[0]))
        return
    show(_flops_sweep(counts, texts) if sweep else _flops_parts(*counts.values()))


def _shape_of(model: str | None) -> Any:
    """The configuration of a checkpoint, without its weights."""
    from ..checkpoints.llava_source import read_config
    from ..checkpoints.sources import local_folder
    from ..model.configuration_ivtp import IVTPLlavaConfig

    folder = local_folder(str(model))
    return IVTPLlavaConfig.from_pretrained(model) if folder is None else read_config(folder, str(model), quantized=True)


def _flops_parts(found: Any) -> Any:
    from ..files.folder import human_bytes

    table = new_table("part", "executed, TFLOPs", "closed formula, TFLOPs")
    for part, executed in found.parts.items():
        table.add_row(part.replace("_", " "), f"{executed:.4f}", f"{found.formula[part]:.4f}")
    table.add_row("all", f"{found.total_tflops:.3f}", f"{found.formula_tflops:.3f}")
    average = sum(found.layer_tokens) / len(found.layer_tokens)
    table.caption = (
        f"{found.text_tokens} text tokens; visual tokens: {found.layer_tokens[-1]} final, {average:.1f} "
        f"layer-averaged; KV cache {human_bytes(found.kv_cache_bytes)}"
    )
    return table


def _flops_sweep(counts: dict[tuple[str, int, int], Any], texts: list[int]) -> Any:
    table = new_table("method", "visual tokens", "layer-averaged", *(f"{text} text tokens" for text in texts))
    table.caption = "TFLOPs of one image and its prompt, executed"
    for name, budget in dict.fromkeys(key[:2] for key in counts):
        row = [counts[name, budget, text] for text in texts]
        average = sum(row[0].layer_tokens) / len(row[0].layer_tokens)
        table.add_row(name, str(budget), f"{average:.1f}", *(f"{found.total_tflops:.3f}" for found in row))
    return table
