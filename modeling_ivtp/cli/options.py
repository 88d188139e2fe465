"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

state = {"debug": False}


def _set_debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


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


def load_pictures(sources: list[str] | None) -> list[Any]:
    """What `ImageOption` names."""
    from ..files.images import load_image

    return [load_image(source) for source in sources or ()]
