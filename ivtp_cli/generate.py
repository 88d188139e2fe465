"""`ivtp generate`: one answer, or a pruned one beside an unpruned one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from .options import (
    BudgetOption,
    Debug,
    DeviceOption,
    DtypeOption,
    ImageOption,
    MaxNewTokens,
    MethodOption,
    ModelOption,
    PromptOption,
    load_pictures,
)
from .tables import new_table, show, times, to_json


def generate(
    model: ModelOption,
    prompt: PromptOption,
    image: ImageOption = None,
    visual_tokens: BudgetOption = None,
    method: MethodOption = "ivtp",
    max_new_tokens: MaxNewTokens = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Run without pruning too and show both.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Answer a question about pictures."""
    from modeling_ivtp.methods.names import OWN, UNPRUNED

    if method == UNPRUNED and (compare or visual_tokens is not None):
        raise ValueError(f"--method {UNPRUNED} drops nothing: leave out --visual-tokens and --compare")
    pictures = load_pictures(image)
    from modeling_ivtp.serving import answering
    from modeling_ivtp.trained import make

    # IVTP's options are the checkpoint's own; any other method is applied to the model.
    other = None if method in (OWN, UNPRUNED) else make(method, visual_tokens)
    loaded, processor = answering.load_model(model, device=device, dtype=dtype)
    if method == UNPRUNED:
        loaded.set_pruning(enabled=False)
    elif visual_tokens is not None and other is None:
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
    unpruned, pruned = answering.compare(loaded, processor, inputs, max_new_tokens=max_new_tokens, method=other)
    if as_json:
        typer.echo(to_json({"unpruned": unpruned.to_dict(), "pruned": pruned.to_dict()}))
        return
    show(_comparison(unpruned, pruned))


def _comparison(unpruned: Any, pruned: Any) -> Any:
    """Return the table that shows two answers and their costs side by side."""
    from modeling_ivtp.files.sizes import human_bytes

    table = new_table("", "unpruned", "pruned", "ratio")
    table.add_row("answer", unpruned.text, pruned.text, "")
    table.add_row("answer tokens", str(unpruned.tokens), str(pruned.tokens), "")
    table.add_row(
        "seconds", f"{unpruned.seconds:.3g}", f"{pruned.seconds:.3g}", times(unpruned.seconds, pruned.seconds)
    )
    for name, count in (
        ("visual tokens, final", lambda answer: sum(answer.visual_tokens)),
        ("visual tokens, layer-averaged", lambda answer: answer.layer_averaged_tokens * len(answer.visual_tokens)),
    ):
        before, after = count(unpruned), count(pruned)
        table.add_row(name, f"{round(before, 1):g}", f"{round(after, 1):g}", times(before, after))
    table.add_row(
        "KV cache",
        human_bytes(unpruned.kv_bytes),
        human_bytes(pruned.kv_bytes),
        times(unpruned.kv_bytes, pruned.kv_bytes),
    )
    return table
