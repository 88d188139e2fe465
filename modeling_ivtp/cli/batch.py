"""`ivtp batch`: answers to a data set."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, DeviceOption, DtypeOption, ModelOption, VisualTokens


def batch(
    model: ModelOption,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="A .jsonl, .json or .parquet file, or a pattern of such files in quotes; a folder of images, with "
            "--prompt; any other folder or Hub id that `datasets` reads, as NAME or NAME:CONFIG.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the answers; one that was begun goes on.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    image_column: Annotated[
        str,
        typer.Option(
            help="Paths, addresses or stored images, one or a list in a row, or none; relative paths start at the "
            "data. An empty name: there are no pictures."
        ),
    ] = "image",
    prompt_column: Annotated[str | None, typer.Option(help="The questions.", show_default="question")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Names of the rows, to go with the answers.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question for all rows.", show_default=False)
    ] = None,
    visual_tokens: VisualTokens = None,
    method: Annotated[
        str, typer.Option(help="System that prunes: ivtp, or one to compare with, such as fastv.")
    ] = "ivtp",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Most rows in a batch; memory may allow fewer.")] = 64,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What a batch may take beside the weights, in each process, such as 8GB.",
            show_default="a part of what is free",
        ),
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows in one file of answers.", show_default="a 64th of all, from 16 to 1024"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows.", show_default="all")] = None,
    progress: Annotated[bool, typer.Option(help="Show rows done, rows per second and the time left.")] = True,
    debug: Debug = False,
) -> None:
    """Answer a data set; a run that was stopped goes on when the same command is given again.

    Answers are Parquet: row, id, answer, error, tokens, prompt_tokens, images. A bad row has an error and stops nobody.

    Several processes, on GPUs or CPUs: accelerate launch --multi_gpu --num_processes 2 -m modeling_ivtp.cli batch ...

    (With --cpu instead, accelerate starts one process only.) Machines that share the folder share the work.
    """
    try:
        for needed in ("datasets", "filelock", "pyarrow"):
            import_module(needed)
    except ImportError as error:
        raise ImportError(
            "answering a data set needs datasets, pyarrow and filelock: pip install 'ivtp-llava[batch]'"
        ) from error
    if prompt is not None and prompt_column is not None:
        raise ValueError("batch takes one of --prompt and --prompt-column")
    from .. import batch as batches
    from ..files.folder import byte_count

    options = batches.Options(
        model=model,
        data=data,
        out=Path(out).expanduser(),
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
        device=device,
        dtype=dtype,
        limit=limit,
        progress=progress,
    )
    try:
        done = batches.run(options)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        raise
    if done.main:
        was = "was finished before" if done.was_finished else "done"
        typer.echo(f"{was}: {done.rows:,} rows, {done.errors:,} of them errors, in {out}")
