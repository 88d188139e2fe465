"""The command line, `ivtp`. Whatever goes wrong is one line on standard error and exit status 1."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="ivtp",
    help="LLaVA that answers from a fraction of its visual tokens: IVTP, instruction-guided visual token pruning.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Errors that say what the person can do about them; any other is a mistake of this program and says so.
_EXPECTED = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
_state = {"debug": False}


def _set_debug(value: bool) -> None:
    _state["debug"] = _state["debug"] or value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.")
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.")
]
ImageOption = Annotated[
    list[str] | None, typer.Option("--image", "-i", help="File, http(s) address or data URL; may be repeated.")
]
PromptOption = Annotated[
    str,
    typer.Option("--prompt", "-p", help="The question, or a whole prompt with an <image> for every image."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1; by default the GPUs if there are any.", show_default=False)
]
DtypeOption = Annotated[str, typer.Option(help="float32, float16, bfloat16; auto is the checkpoint's.")]
VisualTokens = Annotated[
    int | None, typer.Option("--visual-tokens", help="Visual tokens of one image left in the end.", show_default=False)
]


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("ivtp-llava"))
        raise typer.Exit


@app.callback()
def _ivtp(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _check_size(size: str) -> str:
    from .hub.folder import byte_count

    byte_count(size, "--max-shard-size")
    return size


def _group_size(given: str) -> int | None:
    """The value of `--layers-per-group` as the field of that name; None is one group for a whole stage."""
    if given == "all":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--layers-per-group={given!r}; allowed: a whole number from 1, or all")
    return int(given)


@app.command()
def convert(
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write.")],
    llava: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hub id of an official-format LLaVA, or of an IVTP-LLaVA; by default the recipe's.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A published setting: a file, or the name of one that ships, such as ivtp-llava-1.5-7b-64. Options "
            "beside it go before it.",
            show_default=False,
        ),
    ] = None,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="The way back: write an official-format LLaVA without anything of IVTP's."),
    ] = False,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP with LLaVA's vision tower: a transformers folder or Hub id, open_clip:MODEL/PRETRAINED (such as "
            "open_clip:ViT-L-14-336/openai), or an open_clip .safetensors file. Not needed for an IVTP-LLaVA.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; by default LLaVA's own.", show_default=False)
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, in KB, MB, GB or TB.", callback=_check_size)
    ] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    visual_tokens: VisualTokens = None,
    tower_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens that the vision tower hands over.", show_default=False)
    ] = None,
    layers_per_group: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER|all",
            help="Layers that are rolled out together; all: each stage is one group.",
            show_default=False,
        ),
    ] = None,
    tower_layers: Annotated[
        int | None, typer.Option(help="Layers of the vision tower that take part.", show_default=False)
    ] = None,
    decoder_layers: Annotated[
        int | None, typer.Option(help="Layers of the language model that take part.", show_default=False)
    ] = None,
    relevance_threshold: Annotated[
        float | None, typer.Option(help="Cosine from which a word counts as a key word.", show_default=False)
    ] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="rollout, mean, max, multiply or last.", show_default=False)
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(help="clip, mean_text, text_similarity or visual_cls.", show_default=False)
    ] = None,
    pseudo_cls: Annotated[str | None, typer.Option(help="propagate or pool.", show_default=False)] = None,
    positions: Annotated[str | None, typer.Option(help="original or compact.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of LLaVA on the Hub.", show_default=False)] = None,
    clip_revision: Annotated[str | None, typer.Option(help="Revision of CLIP on the Hub.", show_default=False)] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what is downloaded already.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    debug: Debug = False,
) -> None:
    """Join a LLaVA with CLIP's text tower into a folder that loads as an IVTP-LLaVA."""
    grouping = {} if layers_per_group is None else {"layers_per_group": _group_size(layers_per_group)}
    from .hub.convert import convert as join
    from .hub.folder import human_bytes

    pruning = {
        "visual_tokens": visual_tokens,
        "tower_tokens": tower_tokens,
        "tower_layers": tower_layers,
        "decoder_layers": decoder_layers,
        "relevance_threshold": relevance_threshold,
        "aggregation": aggregation,
        "guidance": guidance,
        "pseudo_cls": pseudo_cls,
        "positions": positions,
    }
    changed = {name: value for name, value in pruning.items() if value is not None} | grouping
    shared: dict[str, Any] = {
        "max_shard_size": max_shard_size,
        "dry_run": dry_run,
        "overwrite": overwrite,
        "progress": progress,
        "revision": revision,
        "local_files_only": offline,
    }
    if stock:
        beside = {"--recipe": recipe, "--clip": clip, "--clip-revision": clip_revision, "--dtype": dtype} | changed
        if given := [name for name, value in beside.items() if value is not None]:
            raise ValueError(f"--stock changes no weight and prunes nothing; leave out {', '.join(given)}")
        if llava is None:
            raise ValueError("--stock needs the folder or Hub id of an IVTP-LLaVA")
        from .hub.stock import export_stock

        result = export_stock(llava, out, **shared)
    else:
        result = join(
            llava, clip, out, recipe=recipe, dtype=dtype, pruning=changed, clip_revision=clip_revision, **shared
        )
    table = _table("file", "bytes")
    for file, size in result.weight_files.items():
        table.add_row(file, human_bytes(size))
    table.add_row("config, processor and code", "")
    _print(table)
    dtype_name = str(result.dtype).removeprefix("torch.")
    typer.echo(
        f"{'wrote' if result.written else 'would write'} {human_bytes(result.total_bytes)} to {result.out}: "
        f"{result.llava_tensors} tensors of LLaVA, {result.clip_tensors} of CLIP, {dtype_name}"
    )


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="Folder of an IVTP-LLaVA, as convert writes it.")],
    repo_id: Annotated[str, typer.Argument(help="Where on the Hub: owner/name, or the name of one of your own.")],
    card: Annotated[
        str | None,
        typer.Option(
            help="Model card: a file, or one of hub_cards/ by name; by default that of the checkpoint's recipe.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a repository that is made.", show_default="as the account has it"),
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="By default the one of `hf auth login`.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; made if there is none.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    commit_message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload IVTP-LLaVA",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Lay out, check and show; stop before the network.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Publish a checkpoint on the Hub, with code, card and endpoint handler, in one commit."""
    if not (dry_run or yes or sys.stdin.isatty()):
        raise ValueError("nobody is there to ask; give --yes to upload, or --dry-run to look")
    from .hub.push import push as publish

    def confirm(made: Any) -> bool:
        _show_upload(made)
        what = "the repository that is there" if made.exists else "a new repository"
        return yes or typer.confirm(f"Upload to {what}, {made.repo_id}?")

    done = publish(
        folder,
        repo_id,
        confirm=confirm,
        dry_run=dry_run,
        card=card,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    if dry_run:
        _show_upload(done)
        typer.echo(f"would upload to {done.repo_id}; nothing was sent")
    elif done.revision is None:
        typer.echo("nothing was sent")
    else:
        typer.echo(f"uploaded: {done.url}")
        typer.echo(f'pinned: from_pretrained("{done.repo_id}", revision="{done.revision}", trust_remote_code=True)')


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an IVTP-LLaVA.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is everybody's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository.", show_default="main")] = None,
    debug: Debug = False,
) -> None:
    """Answer chat completions as OpenAI's API does, images included."""
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("a server needs FastAPI and uvicorn: pip install 'ivtp-llava[serve]'") from error
    from .hub.server import build, load_handler

    handler = load_handler(model, revision)
    typer.echo(f"serving {model} at http://{host}:{port}/v1")
    uvicorn.run(build(handler, model), host=host, port=port, log_level="warning")


@app.command()
def generate(
    model: ModelOption,
    prompt: PromptOption,
    image: ImageOption = None,
    visual_tokens: VisualTokens = None,
    method: Annotated[
        str, typer.Option(help="System that prunes: ivtp, or one to compare with, such as fastv.")
    ] = "ivtp",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Run without pruning too and show both.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Answer a question about pictures."""
    pictures = _pictures(image)
    from .hub import answering

    other = None if method == "ivtp" else _system(method, visual_tokens)
    loaded, processor = answering.load_model(model, device=device, dtype=dtype)
    if visual_tokens is not None and other is None:
        answering.set_budget(loaded, visual_tokens)
    text = answering.as_prompt(processor, prompt, len(pictures))
    with nullcontext() if other is None else other(loaded):
        inputs = answering.prepare(loaded, processor, pictures, text)
        if not compare:
            if as_json:
                result = answering.answer(loaded, processor, inputs, max_new_tokens=max_new_tokens)
                typer.echo(_json(result.to_dict()))
            else:
                typer.echo(answering.answer_text(loaded, processor, inputs, max_new_tokens=max_new_tokens))
            return
    unpruned, pruned = answering.compare(loaded, processor, inputs, max_new_tokens=max_new_tokens, system=other)
    if as_json:
        typer.echo(_json({"unpruned": unpruned.to_dict(), "pruned": pruned.to_dict()}))
        return
    _print(_comparison(unpruned, pruned))


@app.command()
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
    from . import batch as batches
    from .hub.folder import byte_count

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


def _system(name: str, visual_tokens: int | None) -> Any:
    from .methods import make

    return make(name, 64 if visual_tokens is None else visual_tokens)


@app.command()
def explain(
    model: ModelOption,
    prompt: PromptOption,
    image: ImageOption = None,
    visual_tokens: VisualTokens = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Picture to write, such as trace.png.", show_default=False)
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="File to write everything to.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: Debug = False,
) -> None:
    """Show which patches are kept for a question, and which of its words decide."""
    pictures = _pictures(image)
    if not pictures:
        raise ValueError("explain needs at least one --image")
    for file in (out, json_file):
        _check_file(file)
    if out is not None:
        _check_picture_type(out)
    from .hub import answering

    loaded, processor = answering.load_model(model, device=device, dtype=dtype)
    if visual_tokens is not None:
        answering.set_budget(loaded, visual_tokens)
    text = answering.as_prompt(processor, prompt, len(pictures))
    trace = answering.explain(loaded, processor, answering.prepare(loaded, processor, pictures, text))
    typer.echo(trace.summary())
    for number, traced in enumerate(trace.images):
        _print(_groups(traced, f"image {number + 1}" if len(trace.images) > 1 else None))
    if json_file is not None:
        Path(json_file).write_text(_json(trace.to_dict()) + "\n")
    if out is not None:
        for number, picture in enumerate(pictures):
            path = Path(out)
            if len(pictures) > 1:
                path = path.with_stem(f"{path.stem}-{number + 1}")
            trace.plot(picture, number).savefig(path)


@app.command()
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
    from . import flops as counting

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
        typer.echo(_json(rows if sweep else rows[0]))
        return
    _print(_flops_sweep(counts, texts) if sweep else _flops_parts(*counts.values()))


def _show_upload(made: Any) -> None:
    from .hub.folder import human_bytes

    table = _table("file", "bytes")
    files = made.repository.files
    for name, size in files.items():
        table.add_row(name, human_bytes(size))
    for name in made.removed:
        table.add_row(name, "removed there")
    table.add_row("all", human_bytes(sum(files.values())))
    _print(table)
    typer.echo(f"card: {made.repository.card}")
    if made.answer is None:
        typer.echo("checked: weights and code fit; there is too little free memory here to load them")
    else:
        typer.echo(f"checked: a fresh process loads it and answers {made.answer!r}")
    if made.repository.left_out:
        typer.echo(f"stays here: {', '.join(made.repository.left_out)}")


def _shape_of(model: str | None) -> Any:
    """The configuration of a checkpoint, without its weights."""
    from .configuration_ivtp import IVTPLlavaConfig
    from .hub.llava_source import read_config
    from .hub.sources import local_folder

    folder = local_folder(str(model))
    return IVTPLlavaConfig.from_pretrained(model) if folder is None else read_config(folder, str(model), quantized=True)


def _flops_parts(found: Any) -> Any:
    from .hub.folder import human_bytes

    table = _table("part", "executed, TFLOPs", "closed formula, TFLOPs")
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
    table = _table("method", "visual tokens", "layer-averaged", *(f"{text} text tokens" for text in texts))
    table.caption = "TFLOPs of one image and its prompt, executed"
    for name, budget in dict.fromkeys(key[:2] for key in counts):
        row = [counts[name, budget, text] for text in texts]
        average = sum(row[0].layer_tokens) / len(row[0].layer_tokens)
        table.add_row(name, str(budget), f"{average:.1f}", *(f"{found.total_tflops:.3f}" for found in row))
    return table


@app.command()
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
    import shlex

    import torch

    from .flops import load_shape
    from .hub.answering import check_device
    from .hub.console import quiet, steps_bar
    from .hub.sources import local_folder
    from .speed import bench as speed
    from .speed import report

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
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # rather now than after an hour of timing
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded, config = None, None if shape is None else load_shape(shape)
    if model is not None:
        from .hub.answering import load_model

        local_folder(model)
        loaded, _ = load_model(model, device=str(place), dtype=dtype)
        loaded.set_attn_implementation(attention)
        loaded.generation_config.eos_token_id = None
        config = loaded.config
    name, command = shape or Path(str(model)).name, shlex.join(["ivtp", *_without_out(sys.argv[1:])])
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


def _without_out(arguments: list[str]) -> list[str]:
    """A command as it counts for others: where its results went is this machine's business."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--out", "-o") and not argument.startswith("--out="):
            kept.append(argument)
        skip = not skip and argument in ("--out", "-o")
    return kept


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def quality(context: typer.Context) -> None:
    """Measure what pruning costs in accuracy, on the drawn world of the quality benchmark (from a clone)."""
    _benchmark("quality.evaluate_quality").run(context.args, "ivtp quality")


def _benchmark(name: str) -> Any:
    """A module of `benchmarks/`, which belongs to the repository and not to the installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir():
        raise ImportError(
            "the benchmarks are not part of the installed package: clone the repository, and there run "
            "pip install --editable '.[dev]'"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(f"benchmarks.{name}")


def _pictures(sources: list[str] | None) -> list[Any]:
    from .hub.images import load_image

    return [load_image(source) for source in sources or ()]


def _check_file(file: str | None) -> None:
    """Find out that a file cannot be written before the work, not after it."""
    if file is None:
        return
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a file to write")
    if not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(file).parent} to write {Path(file).name} into")


def _check_picture_type(file: str) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'ivtp-llava[plot]'") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{file} has no ending of a picture; allowed: {', '.join(sorted(known))}")


def _comparison(unpruned: Any, pruned: Any) -> Any:
    from .hub.folder import human_bytes

    table = _table("", "unpruned", "pruned", "ratio")
    table.add_row("answer", unpruned.text, pruned.text, "")
    table.add_row("answer tokens", str(unpruned.tokens), str(pruned.tokens), "")
    table.add_row(
        "seconds", f"{unpruned.seconds:.3g}", f"{pruned.seconds:.3g}", _times(unpruned.seconds, pruned.seconds)
    )
    for name, of in (
        ("visual tokens, final", lambda answer: sum(answer.visual_tokens)),
        ("visual tokens, layer-averaged", lambda answer: answer.layer_averaged_tokens * len(answer.visual_tokens)),
    ):
        table.add_row(name, f"{of(unpruned):g}", f"{of(pruned):g}", _times(of(unpruned), of(pruned)))
    table.add_row(
        "KV cache",
        human_bytes(unpruned.kv_bytes),
        human_bytes(pruned.kv_bytes),
        _times(unpruned.kv_bytes, pruned.kv_bytes),
    )
    return table


def _times(unpruned: float, pruned: float) -> str:
    return f"{unpruned / pruned:.2f}x" if pruned else ""


def _groups(traced: Any, title: str | None) -> Any:
    table = _table("stage", "layers", "patches before", "kept", title=title)
    for group in traced.groups:
        first, last = group.layers
        table.add_row(group.stage, f"{first} to {last}", str(len(group.candidates)), str(len(group.kept)))
    return table


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    # What models and people write is text, even where it looks like markup: "[/INST]".
    Console(markup=False, highlight=False).print(table)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _one_line(error: BaseException) -> str:
    """What went wrong, without line breaks and error numbers."""
    text = str(error)
    if hasattr(error, "format_message"):  # how typer and click word a wrong option
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, _EXPECTED) or hasattr(error, "format_message"):
        return text
    return f"{type(error).__name__}: {text} (this should not happen; --debug shows where)"


def _warn(message: object) -> None:
    print(f"ivtp: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        _warn(message)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Whatever this package or a library warns of is one line of ours, be it a Python warning or one in the log."""
    log, handler = logging.getLogger("modeling_ivtp"), _LogHandler(logging.WARNING)
    propagated = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done. 1: an error, told in one line on standard error. 130: stopped by Ctrl-C.
    """
    _state["debug"] = False
    try:
        with _warnings_as_lines():
            status = app(arguments, prog_name="ivtp", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if _state["debug"]:
            traceback.print_exc()
        else:
            print(f"ivtp: {_one_line(error)}", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
