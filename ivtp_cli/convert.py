"""`ivtp convert`: join a LLaVA and a CLIP in one folder, or take them apart again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import BudgetOption, Debug, Progress
from .tables import file_table, show


def _check_size(size: str) -> str:
    from modeling_ivtp.files.sizes import byte_count

    byte_count(size, "--max-shard-size")
    return size


Llava = Annotated[
    str | None,
    typer.Argument(
        help="Folder or Hub id of an official-format LLaVA, or of an IVTP-LLaVA; by default the recipe's.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A published setting: a file, or the name of one that ships, such as ivtp-llava-1.5-7b-64. Options "
        "beside it override it.",
        show_default=False,
    ),
]
Stock = Annotated[
    bool, typer.Option("--stock", help="The way back: write an official-format LLaVA without anything of IVTP's.")
]
Clip = Annotated[
    str | None,
    typer.Option(
        help="CLIP with LLaVA's vision tower: a transformers folder or Hub id, open_clip:MODEL/PRETRAINED (such as "
        "open_clip:ViT-L-14-336/openai), or an open_clip .safetensors file. Not needed for an IVTP-LLaVA.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; by default LLaVA's own.", show_default=False)
]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, in KB, MB, GB or TB.", callback=_check_size)]
TowerTokens = Annotated[
    int | None, typer.Option(help="Visual tokens that the vision tower hands over.", show_default=False)
]
LayersPerGroup = Annotated[
    str | None,
    typer.Option(
        metavar="INTEGER|all",
        help="Layers that are rolled out together; all: each stage is one group.",
        show_default=False,
    ),
]
TowerLayers = Annotated[int | None, typer.Option(help="Layers of the vision tower that take part.", show_default=False)]
DecoderLayers = Annotated[
    int | None, typer.Option(help="Layers of the language model that take part.", show_default=False)
]
Threshold = Annotated[
    float | None, typer.Option(help="Cosine from which a word counts as a key word.", show_default=False)
]
Aggregation = Annotated[str | None, typer.Option(help="rollout, mean, max, multiply or last.", show_default=False)]
Coverage = Annotated[
    float | None,
    typer.Option(
        help="Share of importance, up to 1, that a picture's tokens have to cover; visual-tokens is the ceiling.",
        show_default=False,
    ),
]
MinVisualTokens = Annotated[int | None, typer.Option(help="Fewest tokens under a coverage.", show_default=False)]
Importance = Annotated[
    str | None,
    typer.Option(help="own, or accumulated over the groups of the vision tower.", show_default=False),
]
Choice = Annotated[
    str | None, typer.Option(help="top: what is most important; diverse: what is and differs.", show_default=False)
]
Sharpness = Annotated[
    float | None,
    typer.Option(help="Exponent of importance in the diverse choice; 0: diversity alone.", show_default=False),
]
Guidance = Annotated[
    str | None, typer.Option(help="clip, mean_text, text_similarity or visual_cls.", show_default=False)
]
PseudoCLS = Annotated[str | None, typer.Option(help="propagate or pool.", show_default=False)]
Positions = Annotated[str | None, typer.Option(help="original or compact.", show_default=False)]
DecoderChoice = Annotated[
    str | None,
    typer.Option(help="within: choose while the decoder runs; ahead: the same choice before it.", show_default=False),
]


def convert(
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write.")],
    llava: Llava = None,
    recipe: Recipe = None,
    stock: Stock = False,
    clip: Clip = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    visual_tokens: BudgetOption = None,
    coverage: Coverage = None,
    min_visual_tokens: MinVisualTokens = None,
    tower_tokens: TowerTokens = None,
    layers_per_group: LayersPerGroup = None,
    tower_layers: TowerLayers = None,
    decoder_layers: DecoderLayers = None,
    relevance_threshold: Threshold = None,
    aggregation: Aggregation = None,
    importance: Importance = None,
    choice: Choice = None,
    sharpness: Sharpness = None,
    guidance: Guidance = None,
    pseudo_cls: PseudoCLS = None,
    positions: Positions = None,
    decoder_choice: DecoderChoice = None,
    revision: Annotated[str | None, typer.Option(help="Revision of LLaVA on the Hub.", show_default=False)] = None,
    clip_revision: Annotated[str | None, typer.Option(help="Revision of CLIP on the Hub.", show_default=False)] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only files that are already downloaded.")] = False,
    progress: Progress = True,
    debug: Debug = False,
) -> None:
    """Join a LLaVA with CLIP's text tower into a folder that loads as an IVTP-LLaVA."""
    options = {
        "visual_tokens": visual_tokens,
        "coverage": coverage,
        "min_visual_tokens": min_visual_tokens,
        "tower_tokens": tower_tokens,
        "tower_layers": tower_layers,
        "decoder_layers": decoder_layers,
        "relevance_threshold": relevance_threshold,
        "aggregation": aggregation,
        "importance": importance,
        "choice": choice,
        "sharpness": sharpness,
        "guidance": guidance,
        "pseudo_cls": pseudo_cls,
        "positions": positions,
        "decoder_choice": decoder_choice,
    }
    pruning = {name: value for name, value in options.items() if value is not None}
    if layers_per_group is not None:
        pruning["layers_per_group"] = _group_size(layers_per_group)
    shared: dict[str, Any] = {
        "max_shard_size": max_shard_size,
        "dry_run": dry_run,
        "overwrite": overwrite,
        "progress": progress,
        "revision": revision,
        "local_files_only": offline,
    }
    if stock:
        changes = {"--recipe": recipe, "--clip": clip, "--clip-revision": clip_revision, "--dtype": dtype}
        result = _export(llava, out, changes | pruning, shared)
    else:
        from modeling_ivtp.checkpoints.convert import convert as join

        result = join(
            llava, clip, out, recipe=recipe, dtype=dtype, pruning=pruning, clip_revision=clip_revision, **shared
        )
    _show_result(result)


def _group_size(text: str) -> Any:
    """Return the value of `--layers-per-group` as the config's field; None is one group for a whole stage."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--layers-per-group={text!r}; allowed: a whole number from 1, or all")
    return int(text)


def _export(llava: str | None, out: str, changes: dict[str, Any], shared: dict[str, Any]) -> Any:
    """Write an official-format LLaVA; refuse options that would change it."""
    if names := [name for name, value in changes.items() if value is not None]:
        raise ValueError(f"--stock changes no weight and prunes nothing; leave out {', '.join(names)}")
    if llava is None:
        raise ValueError("--stock needs the folder or Hub id of an IVTP-LLaVA")
    from modeling_ivtp.checkpoints.stock import export_stock

    return export_stock(llava, out, **shared)


def _show_result(result: Any) -> None:
    from modeling_ivtp.files.sizes import human_bytes

    table = file_table(result.weight_files)
    table.add_row("config, processor and code", "")
    show(table)
    dtype = str(result.dtype).removeprefix("torch.")
    typer.echo(
        f"{'wrote' if result.written else 'would write'} {human_bytes(result.total_bytes)} to {result.out}: "
        f"{result.llava_tensors} tensors of LLaVA, {result.clip_tensors} of CLIP, {dtype}"
    )
