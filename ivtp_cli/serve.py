"""`ivtp serve`: chat completions over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Debug


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an IVTP-LLaVA.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is everybody's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub repository.", show_default="main")] = None,
    debug: Debug = False,
) -> None:
    """Answer chat completions as OpenAI's API does, images included."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError("a server needs FastAPI and uvicorn: pip install 'ivtp-llava[serve]'") from error
    from modeling_ivtp.serving.server import build, load_handler

    handler = load_handler(model, revision)
    typer.echo(f"serving {model} at http://{host}:{port}/v1")
    uvicorn.run(build(handler, model), host=host, port=port, log_level="warning")
