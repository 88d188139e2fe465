"""Options that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass
class Invocation:
    """One call of the command line; commands find it in their context's `obj`.

    Attributes
    ----------
    arguments : list of str
        Everything after `ivtp`.
    debug : bool
        Whether an error shows its traceback.
    """

    arguments: list[str] = field(default_factory=list)
    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> None:
    # The option may stand before the command or after it.
    invocation = context.ensure_object(Invocation)
    invocation.debug = invocation.debug or value


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
    typer.Option(
        "--prompt",
        "-p",
        help="The question, with or without an <image> for every image; with role markers, a whole prompt.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        help="Method that prunes: ivtp, one to compare with, such as fastv, a trained one's folder, or unpruned.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1; by default the GPUs if there are any.", show_default=False)
]
DtypeOption = Annotated[str, typer.Option(help="float32, float16, bfloat16; auto is the checkpoint's.")]
VisualTokens = Annotated[
    int | None,
    typer.Option("--visual-tokens", help="Visual tokens of one image that are left in the end.", show_default=False),
]


def _budget(value: str | int) -> int | str:
    """Read a number, or `auto`."""
    try:
        return value if value == "auto" else int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r}; allowed: a whole number, or auto.") from None


BudgetOption = Annotated[
    Any,
    typer.Option(
        "--visual-tokens",
        parser=_budget,
        metavar="NUMBER|auto",
        help="Visual tokens of one image that are left in the end; auto: a budget of its own for every picture.",
        show_default=False,
    ),
]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.")]


def load_pictures(sources: list[str] | None) -> list[Any]:
    """Load the pictures that `ImageOption` names."""
    from modeling_ivtp.files.images import load_image

    return [load_image(source) for source in sources or ()]


def check_file(file: str | os.PathLike[str]) -> None:
    """Find out that a file cannot be written before the work, not after it.

    Raises
    ------
    ValueError
        If it has no name.
    OSError
        If it is a folder, or in a folder that does not exist or may not be written.
    """
    if not os.fspath(file):  # a variable of the shell that is not set
        raise ValueError("the file to write has no name")
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a file to write")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"no permission to write {file}")


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads that PyTorch uses; None leaves it as it is.

    Raises
    ------
    ValueError
        If it is below 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads={threads}; allowed: at least 1")
    import torch

    torch.set_num_threads(threads)
