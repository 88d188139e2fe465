"""`ivtp bench`: pruning against stock LLaVA, timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, DeviceOption


def bench(
    shape: Annotated[
        str | None,
        typer.Option(help="A published shape with random weights, such as llava-1.5-7b.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint instead.", show_default=False)
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="What to time against stock LLaVA: a system and its budget, or off (pruning off); on a GPU also "
            "stock+graphs and ivtp@64+graphs (CUDA graphs whatever they hold), ivtp@64-graphs (none). May be repeated.",
            show_default="off and ivtp@64",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be repeated.", show_default="1")] = None,
    text_tokens: Annotated[list[int] | None, typer.Option(help="May be repeated.", show_default="64")] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 128,
    repeats: Annotated[int, typer.Option(help="Pairs of runs.")] = 7,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2; of all arms.")] = "sdpa",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run all arms compiled, with static caches; on a GPU as CUDA graphs.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.", show_default="PyTorch's")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the results.")] = "speed",
    label: Annotated[str, typer.Option(help="Part of the results' name, such as growth.", show_default=False)] = "",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    debug: Debug = False,
) -> None:
    """Time pruning against stock LLaVA on this machine, in interleaved pairs."""
    import torch

    from ..checkpoints.llava_source import read_config
    from ..checkpoints.sources import HubOptions, open_checkpoint
    from ..files.console import quiet, steps_bar, told_command
    from ..flops import load_shape
    from ..serving.answering import check_device, load_model
    from ..speed import bench as speed
    from ..speed import report

    if (shape is None) == (model is None):
        raise ValueError("bench needs one of --shape and --model")
    settings = speed.Settings(
        arms=tuple(arm or ("off", "ivtp@64")),
        batches=tuple(batch or (1,)),
        text_tokens=tuple(text_tokens or (64,)),
        new_tokens=new_tokens,
        repeats=repeats,
        dtype=dtype,
        attention=attention,
        compiled=compiled,
        label=label,
    )
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads={threads}; allowed: at least 1")
        torch.set_num_threads(threads)
    if device is not None:
        check_device(device)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded, weights = None, None
    if model is None:
        config = load_shape(str(shape))
    else:
        checkpoint, files = open_checkpoint(model, HubOptions(), extra=("*.json",))
        config, weights = read_config(files, model, quantized=True), checkpoint.loaded_bytes(speed.DTYPES[dtype])
    speed.check_largest(config, settings, place, weights)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # rather now than after an hour of timing
    if model is not None:
        loaded, _ = load_model(model, device=str(place), dtype=dtype)
        loaded.set_attn_implementation(attention)
        loaded.generation_config.eos_token_id = None
        config = loaded.config
    name, command = shape or Path(str(model)).name, told_command("ivtp", sys.argv[1:])
    file: Path | None = None

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal file
        file = report.write(speed.results(name, settings, rows, place, command), folder, file)

    try:
        with quiet(), steps_bar(settings.runs, "timing", progress) as advance:
            rows = speed.bench(config, settings, device=place, model=loaded, advance=advance, keep=keep)
        typer.echo(report.markdown(speed.results(name, settings, rows, place, command)))
    finally:
        if file is not None:
            typer.echo(f"written: {file}, and beside it .md and .png")
