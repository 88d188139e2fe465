"""`ivtp train`: fine-tune or retrain a LLaVA, under a method or with a connector."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, MethodOption, ModelOption
from .tables import new_table, show, to_json

Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="A .json or .jsonl file in LLaVA's format (id, image, conversations), or a folder or Hub id (NAME:SPLIT) "
        "that `datasets` reads.",
    ),
]
Images = Annotated[
    str | None,
    typer.Option(help="Folder that relative paths of pictures start from.", show_default="the data's folder"),
]
PresetOption = Annotated[
    str,
    typer.Option(
        help="What learns, and how: a file, or llava-1.5-stage-1, llava-1.5-stage-2, lvpruning, atp-llava or "
        "sparse-attention."
    ),
]
Connector = Annotated[
    str | None,
    typer.Option(help="A connector to join: c_abstractor, context_attention or resampler.", show_default=False),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        "--visual-tokens",
        min=1,
        help="Visual tokens of one image that the method, or a new connector, leaves.",
        show_default="the model's own, or 64",
    ),
]


MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="NAME=VALUE",
        help="An option of the method, such as target=88 or ratios=[0.5,0.3,0.1]; may be repeated.",
        show_default=False,
    ),
]


def _options(given: list[str] | None) -> dict[str, Any]:
    """Read options of a method: JSON values, or words."""
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--method-option={text!r}; allowed: NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = {"True": True, "False": False, "None": None}.get(value, value)
        if isinstance(options[name], list):
            options[name] = tuple(options[name])
    return options


def _of_preset(help: str) -> Any:
    return typer.Option(help=help, show_default="the preset's")


def train(
    model: ModelOption,
    data: Data,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the run; one that was begun there goes on.")],
    preset: PresetOption = "llava-1.5-stage-2",
    images: Images = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP to join to a LLaVA that has no text tower.", show_default=False)
    ] = None,
    connector: Connector = None,
    method: MethodOption = "ivtp",
    tokens: Tokens = None,
    method_option: MethodOptions = None,
    learning_rate: Annotated[float | None, _of_preset("Peak learning rate.")] = None,
    batch_size: Annotated[int | None, _of_preset("Conversations of a step, over all processes.")] = None,
    epochs: Annotated[float | None, _of_preset("Times that each row is seen.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.", show_default=False)] = None,
    max_length: Annotated[int | None, _of_preset("Tokens of a conversation, image tokens included.")] = None,
    device_batch_size: Annotated[
        int | None, typer.Option(help="Conversations that a device takes at a time.", show_default="at most 16")
    ] = None,
    evaluation_share: Annotated[float, typer.Option(help="Share of the rows that is held out and measured.")] = 0.0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints and measurements.")] = 500,
    log_steps: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows and of new modules.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, in spite of a GPU, or cuda.", show_default="a GPU if there is one")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.", show_default="all")] = None,
    log_to: Annotated[
        str, typer.Option(help="tensorboard, trackio, none; auto: the first that is installed.")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count everything that needs no weights; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress.")] = True,
    debug: Debug = False,
) -> None:
    """Fine-tune a LLaVA, or retrain it under a method. The same command continues a run that was stopped.

    LLaVA-1.5's two stages are presets: projector and connector alone, then the language model too. The vision tower and
    CLIP's text half stay frozen. Only answers are learned. --method unpruned is the control: nothing is pruned.

    Several processes: accelerate launch --num_processes 8 -m modeling_ivtp.cli train ..., with FSDP or DeepSpeed by
    accelerate's own configuration.
    """
    from modeling_ivtp import training

    options = training.Options(
        model=model,
        data=data,
        out=Path(out),
        preset=training.load_preset(preset).changed(
            learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, max_length=max_length
        ),
        images=None if images is None else Path(images),
        clip=clip,
        connector=None if connector is None else {"name": connector} | ({} if tokens is None else {"tokens": tokens}),
        method=method,
        tokens=tokens if connector is None else None,
        method_options=_options(method_option),
        max_steps=max_steps,
        device_batch_size=device_batch_size,
        evaluation_share=evaluation_share,
        save_steps=save_steps,
        log_steps=log_steps,
        seed=seed,
        dtype=dtype,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        workers=workers,
        limit=limit,
        log_to=log_to,
        progress=progress,
    )
    try:
        summary = training.train(options, dry_run=dry_run)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("ivtp: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    if not summary.main:
        return
    if as_json:
        found = {"model": str(summary.model), "losses": summary.losses, "held_out_loss": summary.held_out_loss}
        typer.echo(to_json({"plan": summary.plan.to_dict()} | ({} if dry_run else found)))
    elif dry_run:
        _show_plan(summary.plan)
    elif summary.was_finished:
        typer.echo(f"was finished before: {summary.model}")
    else:
        held = "" if summary.held_out_loss is None else f", {summary.held_out_loss:.4f} on rows that were held out"
        typer.echo(f"done: {summary.plan.steps:,} steps, loss {summary.losses[-1]:.4f}{held}, in {summary.model}")


def _show_plan(plan: Any) -> None:
    from modeling_ivtp.files.sizes import human_bytes

    table = new_table("", "")
    for name, value in {
        "rows": f"{plan.rows:,} to learn from, {plan.held_out:,} held out",
        "steps": f"{plan.steps:,} ({plan.epochs:.2f} epochs)",
        "a step": f"{plan.processes} processes x {plan.device_batch_size} x {plan.accumulation} times",
        "text tokens of an epoch": f"{plan.tokens.text:,}, of which {plan.tokens.learned:,} are learned",
        "image tokens of an epoch": f"{plan.tokens.image:,}",
        "longest row": f"{plan.tokens.longest:,} tokens; {plan.tokens.cut:,} rows are cut",
        "visual tokens of an image": f"{plan.visual_tokens} final, {plan.layer_averaged_tokens:.1f} layer-averaged",
        "weights": f"{plan.weights:,}, of which {plan.learning:,} learn",
        "disk": f"{human_bytes(plan.disk_bytes)} at most",
        "memory": f"{human_bytes(plan.memory_bytes)} for weights, gradients and optimizer, without activations",
    }.items():
        table.add_row(name, value)
    show(table)
