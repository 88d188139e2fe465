"""`ivtp bench`: time pruning against stock LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, DeviceOption, Invocation, Progress, set_threads

Arms = Annotated[
    list[str] | None,
    typer.Option(
        help="What to time against stock LLaVA: a method and its budget, or off (pruning off); on a GPU also "
        "stock+graphs and ivtp@64+graphs (CUDA graphs whatever they hold), ivtp@64-graphs (none). May be repeated.",
        show_default="off and ivtp@64",
    ),
]
Attention = Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2, in all arms.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Run all arms compiled, with static caches; on a GPU as CUDA graphs.")
]


def bench(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(help="A published shape with random weights, such as llava-1.5-7b.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint instead.", show_default=False)
    ] = None,
    arm: Arms = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; may be repeated.", show_default="1")] = None,
    text_tokens: Annotated[
        list[int] | None, typer.Option(help="Text tokens of the prompt; may be repeated.", show_default="64")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of the answers, in tokens.")] = 128,
    repeats: Annotated[int, typer.Option(help="Pairs of runs.")] = 7,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    attention: Attention = "sdpa",
    compiled: Compiled = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the results.")] = "speed",
    label: Annotated[str, typer.Option(help="Part of the results' name, such as growth.", show_default=False)] = "",
    progress: Progress = True,
    debug: Debug = False,
) -> None:
    """Time pruning against stock LLaVA on this machine, in interleaved pairs."""
    from modeling_ivtp.files.console import shareable_command
    from modeling_ivtp.speed import bench as speed

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
    set_threads(threads)
    command = shareable_command("ivtp", context.ensure_object(Invocation).arguments)
    _time(settings, shape, model, _device(device), Path(out).expanduser(), command, progress)


def _device(name: str | None) -> Any:
    import torch

    from modeling_ivtp.serving.answering import check_device

    if name is not None:
        check_device(name)
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _time(
    settings: Any, shape: str | None, model: str | None, device: Any, folder: Path, command: str, progress: bool
) -> None:
    """Time all arms, write the results after every row, and show them."""
    from modeling_ivtp.files.console import quiet, steps_bar
    from modeling_ivtp.speed import bench as speed
    from modeling_ivtp.speed import report

    config, weights = _shape(shape, model, settings.dtype)
    speed.check_largest(config, settings, device, weights)
    folder.mkdir(parents=True, exist_ok=True)  # rather now than after an hour of timing
    loaded = None
    if model is not None:
        loaded = _load(model, device, settings)
        config = loaded.config
    name, file = shape or Path(str(model)).name, None

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal file
        file = report.write(speed.results(name, settings, rows, device, command), folder, file)

    try:
        with quiet(), steps_bar(settings.runs, "timing", progress) as advance:
            rows = speed.bench(config, settings, device=device, model=loaded, advance=advance, keep=keep)
        typer.echo(report.markdown(speed.results(name, settings, rows, device, command)))
    finally:
        if file is not None:
            typer.echo(f"written: {file}, and beside it .md and .png")


def _shape(shape: str | None, model: str | None, dtype: str) -> tuple[Any, int | None]:
    """Return the configuration to time, and the bytes of a checkpoint's weights; None for random ones."""
    from modeling_ivtp.checkpoints.llava_source import read_config
    from modeling_ivtp.checkpoints.sources import HubOptions, open_checkpoint
    from modeling_ivtp.flops import load_shape
    from modeling_ivtp.speed.bench import DTYPES

    if model is None:
        return load_shape(str(shape)), None
    checkpoint, files = open_checkpoint(model, HubOptions(), extra=("*.json",))
    return read_config(files, model, quantized=True), checkpoint.loaded_bytes(DTYPES[dtype])


def _load(model: str, device: Any, settings: Any) -> Any:
    """Load a checkpoint that answers to the full length."""
    from modeling_ivtp.serving.answering import load_model

    loaded, _ = load_model(model, device=str(device), dtype=settings.dtype)
    loaded.set_attn_implementation(settings.attention)
    loaded.generation_config.eos_token_id = None
    return loaded
