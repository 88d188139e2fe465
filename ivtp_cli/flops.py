"""`ivtp flops`: the cost of a prompt, from shapes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Debug
from .tables import new_table, show, to_json

_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def flops(
    preset: Annotated[
        str | None, typer.Option(help="A published shape, such as llava-1.5-7b.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder of a checkpoint whose shape counts.", show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method that prunes, folder of a trained one, a connector, or unpruned; may be repeated.",
            show_default="ivtp, or the shape's connector",
        ),
    ] = None,
    text_tokens: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Text tokens of the prompt; may be repeated with --sweep.", show_default="512"),
    ] = None,
    visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Visual tokens that are left in the end; may be repeated with --sweep.",
            show_default="the shape's own, 64; of a folder, the saved budget",
        ),
    ] = None,
    instruction_tokens: Annotated[
        int | None, typer.Option(min=0, help="CLIP tokens of the instruction.", show_default="as many as text tokens")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the KV cache: float16, bfloat16, float32.")] = "float16",
    sweep: Annotated[bool, typer.Option("--sweep", help="A table over methods, text and visual tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Count the cost of a prompt with one image from shapes alone; no weights are needed."""
    if (preset is None) == (model is None):
        raise ValueError("flops needs one of --preset and --model")
    if dtype not in _VALUE_BYTES:
        raise ValueError(f"--dtype={dtype}; allowed: {', '.join(_VALUE_BYTES)}")
    from modeling_ivtp import flops as counting

    config = _checkpoint_config(str(model)) if preset is None else counting.load_shape(preset)
    connector = config.connector
    names, texts = method or ["ivtp" if connector is None else connector.name], text_tokens or [512]
    own = config.pruning.visual_tokens if connector is None else connector.tokens
    if not sweep and max(len(names), len(texts), len(visual_tokens or ())) > 1:
        raise ValueError("several methods or token counts make a table: add --sweep")
    settings = {"instruction_tokens": instruction_tokens, "value_bytes": _VALUE_BYTES[dtype]}
    counts = {
        (name, budget, text): counting.count_named(config, name, budget, text_tokens=text, **settings)
        for name in names
        for budget in _budgets(name, visual_tokens, own, config.num_patches)
        for text in texts
    }
    if as_json:
        rows = [
            {"method": name, "visual_tokens": count.layer_tokens[-1] if budget is None else budget} | count.to_dict()
            for (name, budget, _), count in counts.items()
        ]
        typer.echo(to_json(rows if sweep else rows[0]))
        return
    show(_sweep_table(counts, texts) if sweep else _parts_table(*counts.values()))


def _budgets(name: str, given: list[int] | None, own: int, patches: int) -> list[int | None]:
    """Return the budgets to count a method at; None is the one that is saved in its folder."""
    from modeling_ivtp.methods.names import UNPRUNED
    from modeling_ivtp.trained import is_adapter

    if name == UNPRUNED:
        return [patches]
    if given:
        return list(given)
    return [None if is_adapter(name) else own]


def _checkpoint_config(model: str) -> Any:
    """Read the configuration of a checkpoint without its weights."""
    from modeling_ivtp.checkpoints.llava_source import read_config
    from modeling_ivtp.checkpoints.sources import HubOptions, local_folder
    from modeling_ivtp.model.configuration_ivtp import IVTPLlavaConfig

    folder = local_folder(model)
    if folder is None:
        HubOptions().check(model)
        return IVTPLlavaConfig.from_pretrained(model)
    return read_config(folder, model, quantized=True)


def _parts_table(count: Any) -> Any:
    """Return the table of one prompt's parts: executed operations beside the closed formula."""
    from modeling_ivtp.files.sizes import human_bytes

    table = new_table("part", "executed, TFLOPs", "closed formula, TFLOPs")
    for part, executed in count.parts.items():
        table.add_row(part.replace("_", " "), f"{executed:.4f}", f"{count.formula[part]:.4f}")
    table.add_row("all", f"{count.total_tflops:.3f}", f"{count.formula_tflops:.3f}")
    table.caption = (
        f"{count.text_tokens} text tokens; visual tokens: {count.layer_tokens[-1]} final, {_layer_average(count)} "
        f"layer-averaged; KV cache {human_bytes(count.kv_cache_bytes)}"
    )
    return table


def _sweep_table(counts: dict[tuple[str, int | None, int], Any], texts: list[int]) -> Any:
    """Return the table over methods and budgets, with a column for each number of text tokens."""
    table = new_table("method", "visual tokens", "layer-averaged", *(f"{text} text tokens" for text in texts))
    table.caption = "TFLOPs of one image and its prompt, executed"
    for name, budget in dict.fromkeys(key[:2] for key in counts):
        row = [counts[name, budget, text] for text in texts]
        tokens = row[0].layer_tokens[-1] if budget is None else budget
        table.add_row(name, str(tokens), _layer_average(row[0]), *(f"{count.total_tflops:.3f}" for count in row))
    return table


def _layer_average(count: Any) -> str:
    return f"{sum(count.layer_tokens) / len(count.layer_tokens):.1f}"
