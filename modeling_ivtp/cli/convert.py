"""`ivtp convert`: a LLaVA and a CLIP become one folder, or the way back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Debug, VisualTokens
from .tables import new_table, show


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
    from ..checkpoints.convert import convert as join
    from ..files.folder import human_bytes

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
        from ..checkpoints.stock import export_stock

        result = export_stock(llava, out, **shared)
    else:
        result = join(
            llava, clip, out, recipe=recipe, dtype=dtype, pruning=changed, clip_revision=clip_revision, **shared
        )
    table = new_table("file", "bytes")
    for file, size in result.weight_files.items():
        table.add_row(file, human_bytes(size))
    table.add_row("config, processor and code", "")
    show(table)
    dtype_name = str(result.dtype).removeprefix("torch.")
    typer.echo(
        f"{'wrote' if result.written else 'would write'} {human_bytes(result.total_bytes)} to {result.out}: "
        f"{result.llava_tensors} tensors of LLaVA, {result.clip_tensors} of CLIP, {dtype_name}"
    )


def _check_size(size: str) -> str:
    from ..files.folder import byte_count

    byte_count(size, "--max-shard-size")
    return size


def _group_size(given: str) -> int | None:
    """The value of `--layers-per-group` as the field of that name; None is one group for a whole stage."""
    if given == "all":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--layers-per-group={given!r}; allowed: a whole number from 1, or all")
    return int(given)
