"""An OpenAI-shaped HTTP server around the endpoint handler: `ivtp serve`.

`transformers serve` cannot do it: it looks a checkpoint's class up in transformers itself and does not know the inputs
of a class of remote code. The server offers chat completions with images and nothing else; the handler answers them.
"""

import importlib.util
import os
import sys
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, local_folder
from ..files import images
from ..files.shipped import shipped
from .schema import ChatRequest, Completion, Error, ErrorAnswer, Model, ModelList, explain_errors

MAX_BODY = 40_000_000
"""Bytes of a request: two images at the handler's limit, as base64."""


def load_handler(model: str | os.PathLike[str], revision: str | None = None) -> Any:
    """Load the endpoint handler on a checkpoint, with this package's classes.

    Parameters
    ----------
    model : str or path
        Folder or Hub id of an IVTP-LLaVA.
    revision : str, optional
        Of a Hub repository.

    Raises
    ------
    OSError, ValueError
        If there is no such checkpoint, or it cannot be loaded.
    """
    folder = local_folder(model) or HubOptions(revision).snapshot(str(model), ["*"])
    read_config(folder, str(model), quantized=True)
    sys.modules.setdefault("handler_images", images)
    spec = importlib.util.spec_from_file_location("ivtp_endpoint_handler", shipped("hub_cards/handler.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The package has the classes: no code that came with a checkpoint runs.
    return module.EndpointHandler(str(folder), trust_remote_code=False)


def build(handler: Any, name: str) -> FastAPI:
    """Build the application, whose page at `/docs` lists what a request may hold.

    Parameters
    ----------
    handler : callable
        Takes a request as `hub_cards/handler.py` describes it; runs in a thread.
    name : str
        The model's name in requests and answers.
    """
    app = FastAPI(title="IVTP-LLaVA", responses={"default": {"model": ErrorAnswer}})
    app.add_middleware(_BodyLimit)
    for kind in (RequestValidationError, StarletteHTTPException, ValueError, Exception):
        app.add_exception_handler(kind, _refuse)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[Model(id=name)])

    @app.post("/v1/chat/completions", response_model=Completion)
    async def complete(request: ChatRequest) -> Any:
        if request.model not in (None, name):
            raise HTTPException(404, f"there is no model {request.model!r}; allowed: {name}")
        answer = await run_in_threadpool(handler, request.for_handler())
        completion = Completion.of(answer, name, request.stop)
        if request.stream:
            return StreamingResponse(iter(completion.events()), media_type="text/event-stream")
        return completion

    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer an error in OpenAI's form."""
    status, message = 500, f"{type(error).__name__}: {error}"
    if isinstance(error, RequestValidationError):
        status, message = 400, explain_errors(error.errors())
    elif isinstance(error, StarletteHTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, ValueError):
        status, message = 400, str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode("utf-8", "backslashreplace").decode()[:1000]
    return JSONResponse(ErrorAnswer(error=Error(message=message, type=kind)).model_dump(), status)


class _BodyLimit:
    """Middleware that stops reading a request that is larger than `MAX_BODY`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY:,} bytes")
            return message

        await self.app(scope, limited, send)
