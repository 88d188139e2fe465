"""`ivtp serve`: chat completions over HTTP."""

from __future__ import annotations

import os
import socket
from typing import Annotated

import typer

from .options import Debug


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an IVTP-LLaVA.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is everybody's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="IVTP_API_KEY", help="Key that requests have to bring; by default none.", show_default=False
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may ask from a browser, such as https://example.com, or *; may be repeated.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub repository.", show_default="main")] = None,
    debug: Debug = False,
) -> None:
    """Answer chat completions as OpenAI's API does, images included."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError("a server needs FastAPI and uvicorn: pip install 'ivtp-llava[serve]'") from error
    from modeling_ivtp.serving.server import build, check_key, load_handler

    check_key(api_key)
    # Loading takes minutes; that the port is taken is known before, and nobody takes it meanwhile.
    with _bound(host, port):
        app = build(load_handler(model, revision), model, api_key=api_key, cors_origins=cors_origin or ())
    typer.echo(f"serving {model} at http://{host}:{port}/v1")
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, on which nobody listens yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise OSError(f"--host {host} cannot be used: {error.strerror or error}") from error
    try:
        if os.name != "nt":  # on Windows the option would share a port that is taken
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    return listener
