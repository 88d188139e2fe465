"""The application `ivtp`, with its commands in the order in which a person meets them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer

from .batch import batch
from .bench import bench
from .check import check
from .convert import convert
from .evaluate import evaluate
from .explain import explain
from .flops import flops
from .generate import generate
from .options import Debug
from .push import push
from .quality import quality
from .serve import serve
from .train import train

app = typer.Typer(
    name="ivtp",
    help="LLaVA that answers from a fraction of its visual tokens: IVTP, instruction-guided visual token pruning.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def _flowing(command: Callable[..., Any]) -> str:
    """Return a command's help, each paragraph in one line: typer breaks lines where a docstring does, and again."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(command.__doc__ or "").split("\n\n"))


for command in (convert, push, serve, generate, batch, train, explain, flops, bench, quality, evaluate, check):
    app.command(help=_flowing(command))(command)
