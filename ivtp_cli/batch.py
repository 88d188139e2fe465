"""`ivtp batch`: answer a data set."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, DeviceOption, DtypeOption, MaxNewTokens, MethodOption, ModelOption, VisualTokens

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="A .jsonl, .json or .parquet file, or a pattern of such files in quotes; a folder of images, with "
        "--prompt; any other folder or Hub id that `datasets` reads, as NAME or NAME:CONFIG. Files may lie "
        "at an address, such as s3://….",
    ),
]
ImageColumn = Annotated[
    str,
    typer.Option(
        help="Column of the pictures: paths, addresses or stored images, one, a list or none in each row; relative "
        "paths start at the data's folder. An empty name: there are no pictures."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory that a batch may take beside the weights, in each actor, such as 8GB.",
        show_default="a part of what is free",
    ),
]
ShardRows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows in one file of answers.", show_default="a 64th of all, from 16 to 1024"),
]
Engine = Annotated[str, typer.Option(help="transformers, or vllm with this package's plug-in.")]
Actors = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that answer.", show_default="one for each GPU; without GPUs one on each machine"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of each.", show_default="all, shared among the actors; one beside a GPU"),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A Ray cluster that this machine belongs to: auto or HOST:PORT.", show_default="this machine alone"
    ),
]


def batch(
    model: ModelOption,
    data: DataOption,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the answers; a run that was begun there goes on.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: ImageColumn = "image",
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions.", show_default="question")] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the rows' names, which are written beside the answers. An empty name: there are none.",
            show_default="id, if there is one",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question for all rows.", show_default=False)
    ] = None,
    visual_tokens: VisualTokens = None,
    method: MethodOption = "ivtp",
    max_new_tokens: MaxNewTokens = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Most rows in a batch; memory may allow fewer.")] = 64,
    memory: Memory = None,
    shard_rows: ShardRows = None,
    engine: Engine = "transformers",
    actors: Actors = None,
    threads: Threads = None,
    address: Address = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first rows.", show_default="all")] = None,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit with status 1 if any row failed, not only if all did.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show Ray Data's progress, on a terminal.")] = True,
    debug: Debug = False,
) -> None:
    """Answer a data set. The same command continues a run that was stopped.

    Answers are Parquet files: row, id, answer, error, tokens, prompt_tokens, images. A failed row is recorded with its
    error; the run continues. The exit status is 1 if all rows failed.

    Ray runs it: on all GPUs of this machine, with --actors 2 in two processes, with --address on a cluster.
    """
    check_not_launched("batch", " --actors {}")
    check_installed()
    if prompt is not None and prompt_column is not None:
        raise ValueError("batch takes one of --prompt and --prompt-column")
    from modeling_ivtp import batch as batches
    from modeling_ivtp.files.sizes import byte_count

    options = batches.Options(
        model=model,
        data=data,
        out=out if "://" in out else Path(out).expanduser(),
        split=split,
        image_column=image_column,
        prompt_column=prompt_column or "question",
        id_column=id_column,
        prompt=prompt,
        visual_tokens=visual_tokens,
        method=method,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        memory=None if memory is None else byte_count(memory, "--memory"),
        shard_rows=shard_rows,
        engine=engine,
        actors=actors,
        threads=threads,
        address=address,
        device=device,
        dtype=dtype,
        limit=limit,
        progress=progress,
    )
    try:
        summary = batches.run(options)
    except KeyboardInterrupt:
        print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        raise
    done = "was finished before" if summary.was_finished else "done"
    typer.echo(f"{done}: {summary.rows:,} rows, {summary.errors:,} of them errors, in {out}")
    if summary.errors == summary.rows or (summary.errors and fail_on_error):
        failed = "all" if summary.errors == summary.rows else f"{summary.errors:,} of"
        raise ValueError(f"{failed} {summary.rows:,} rows failed; the first: {summary.first_error}")


def check_not_launched(command: str, more: str = "") -> None:
    """Refuse `accelerate launch`, which started the processes of a command before Ray did.

    Parameters
    ----------
    command : str
    more : str
        What takes the place of the launcher's number of processes, with `{}` for it.
    """
    if not any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")):
        return
    if os.environ.get("RANK", "0") != "0":
        raise typer.Exit(1)  # the first process says it for all
    arguments = sys.argv[sys.argv.index(command) :] if command in sys.argv else [command, "..."]
    instead = f"ivtp {shlex.join(arguments)}{more.format(os.environ.get('WORLD_SIZE', '1'))}"
    raise ValueError(f"{command} starts its processes itself; in place of accelerate launch, type: {instead}")


def check_installed() -> None:
    """Refuse to answer a data set without the libraries of the extra `batch`."""
    # Importing Ray takes seconds; whether it is there is known at once.
    if any(find_spec(library) is None for library in ("datasets", "filelock", "pyarrow", "ray")):
        raise ImportError("answering a data set needs datasets, pyarrow and Ray: pip install 'ivtp-llava[batch]'")
