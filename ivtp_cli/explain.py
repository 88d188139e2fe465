"""`ivtp explain`: what was kept for a question, and why."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    BudgetOption,
    Debug,
    DeviceOption,
    DtypeOption,
    ImageOption,
    ModelOption,
    PromptOption,
    check_file,
    load_pictures,
)
from .tables import new_table, show, to_json


def explain(
    model: ModelOption,
    prompt: PromptOption,
    image: ImageOption = None,
    visual_tokens: BudgetOption = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Method that prunes, such as topk; by default ivtp. Repeat it to see what each keeps at the same "
            "budget, as in the paper's Fig. 5: --method topk --method ivtp.",
            show_default=False,
        ),
    ] = None,
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
    pictures = load_pictures(image)
    if not pictures:
        raise ValueError("explain needs at least one --image")
    for file in (out, json_file):
        if file is not None:
            check_file(file)
    if out is not None:
        if json_file is not None and os.path.realpath(out) == os.path.realpath(json_file):
            raise ValueError(f"--out and --json name the same file, {out}; give each its own")
        _check_picture_type(out)
    from modeling_ivtp.serving import answering
    from modeling_ivtp.trained import is_adapter, make

    names = list(dict.fromkeys(method or ["ivtp"]))
    for name in names:
        if name != "ivtp":
            make(name, visual_tokens)  # refused before the model is loaded
    loaded, processor = answering.load_model(model, device=device, dtype=dtype)
    if visual_tokens is not None:
        answering.set_budget(loaded, visual_tokens)
    text, budget = answering.as_prompt(processor, prompt, len(pictures)), loaded.pruning_config.visual_tokens
    traces = []
    for name in names:
        keep = visual_tokens if is_adapter(name) else budget
        with nullcontext() if name == "ivtp" else make(name, keep)(loaded):
            traces.append(answering.explain(loaded, processor, answering.prepare(loaded, processor, pictures, text)))
    for trace in traces:
        _show(trace, name_it=len(traces) > 1)
    if json_file is not None:
        records = [trace.to_dict() for trace in traces]
        Path(json_file).write_text(to_json(records if len(records) > 1 else records[0]) + "\n", encoding="utf-8")
    if out is not None:
        for number, picture in enumerate(pictures):
            path = Path(out)
            if len(pictures) > 1:
                path = path.with_stem(f"{path.stem}-{number + 1}")
            # a method that asks no word has no instruction in its trace
            title = None if any(trace.images[number].tokens for trace in traces) else prompt
            traces[0].plot(picture, number, title=title, beside=traces[1:]).savefig(path)


def _show(trace: Any, name_it: bool) -> None:
    """Print a trace's summary and a table for every image."""
    # a summary names every method but IVTP
    typer.echo(("ivtp: " if name_it and trace.method == "ivtp" else "") + trace.summary())
    for number, traced in enumerate(trace.images):
        table = new_table(
            "stage", "layers", "patches before", "kept", title=f"image {number + 1}" if len(trace.images) > 1 else None
        )
        for group in traced.groups:
            first, last = group.layers
            layers = f"{first} to {last}" if first >= 0 else ""
            table.add_row(group.stage, layers, str(len(group.candidates)), str(len(group.kept)))
        show(table)


def _check_picture_type(file: str) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'ivtp-llava[plot]'") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{file} has no ending of a picture; allowed: {', '.join(sorted(known))}")
