"""`ivtp generate`: one answer, or two side by side."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from .options import (
    Debug,
    DeviceOption,
    DtypeOption,
    ImageOption,
    ModelOption,
    PromptOption,
    VisualTokens,
    load_pictures,
)
from .tables import new_table, show, times, to_json


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
    pictures = load_pictures(image)
    from ..serving import answering

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
                typer.echo(to_json(result.to_dict()))
            else:
                typer.echo(answering.answer_text(loaded, processor, inputs, max_new_tokens=max_new_tokens))
            return
    unpruned, pruned = answering.compare(loaded, processor, inputs, max_new_tokens=max_new_tokens, system=other)
    if as_json:
        typer.echo(to_json({"unpruned": unpruned.to_dict(), "pruned": pruned.to_dict()}))
        return
    show(_comparison(unpruned, pruned))


def _comparison(unpruned: Any, pruned: Any) -> Any:
    from ..files.folder import human_bytes

    table = new_table("", "unpruned", "pruned", "ratio")
    table.add_row("answer", unpruned.text, pruned.text, "")
    table.add_row("answer tokens", str(unpruned.tokens), str(pruned.tokens), "")
    table.add_row(
        "seconds", f"{unpruned.seconds:.3g}", f"{pruned.seconds:.3g}", times(unpruned.seconds, pruned.seconds)
    )
    for name, of in (
        ("visual tokens, final", lambda answer: sum(answer.visual_tokens)),
        ("visual tokens, layer-averaged", lambda answer: answer.layer_averaged_tokens * len(answer.visual_tokens)),
    ):
        table.add_row(name, f"{of(unpruned):g}", f"{of(pruned):g}", times(of(unpruned), of(pruned)))
    table.add_row(
        "KV cache",
        human_bytes(unpruned.kv_bytes),
        human_bytes(pruned.kv_bytes),
        times(unpruned.kv_bytes, pruned.kv_bytes),
    )
    return table


def _system(name: str, visual_tokens: int | None) -> Any:
    from ..methods import make

    return make(name, 64 if visual_tokens is None else visual_tokens)
