"""`ivtp explain`: what was kept for a question, and why."""

from __future__ import annotations

from pathlib import Path
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
from .tables import new_table, show, to_json


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
    pictures = load_pictures(image)
    if not pictures:
        raise ValueError("explain needs at least one --image")
    for file in (out, json_file):
        _check_file(file)
    if out is not None:
        _check_picture_type(out)
    from modeling_ivtp.serving import answering

    loaded, processor = answering.load_model(model, device=device, dtype=dtype)
    if visual_tokens is not None:
        answering.set_budget(loaded, visual_tokens)
    text = answering.as_prompt(processor, prompt, len(pictures))
    trace = answering.explain(loaded, processor, answering.prepare(loaded, processor, pictures, text))
    typer.echo(trace.summary())
    for number, traced in enumerate(trace.images):
        show(_groups(traced, f"image {number + 1}" if len(trace.images) > 1 else None))
    if json_file is not None:
        Path(json_file).write_text(to_json(trace.to_dict()) + "\n")
    if out is not None:
        for number, picture in enumerate(pictures):
            path = Path(out)
            if len(pictures) > 1:
                path = path.with_stem(f"{path.stem}-{number + 1}")
            trace.plot(picture, number).savefig(path)


def _groups(traced: Any, title: str | None) -> Any:
    table = new_table("stage", "layers", "patches before", "kept", title=title)
    for group in traced.groups:
        first, last = group.layers
        table.add_row(group.stage, f"{first} to {last}", str(len(group.candidates)), str(len(group.kept)))
    return table


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
