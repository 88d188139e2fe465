"""An OpenAI-shaped HTTP server around the endpoint handler: `ivtp serve`.

`transformers serve` cannot do it: it looks a checkpoint's class up in transformers itself and does not know the inputs
of a class of remote code. The server offers chat completions with images and nothing else; the handler answers them.
"""

import asyncio
import importlib.util
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..checkpoints.sources import HubOptions, local_folder
from ..files import images
from ..files.shipped import shipped
from .answering import load_model
from .batching import Batcher, Listener
from .schema import ChatRequest, Chunks, Completion, Error, ErrorAnswer, Model, ModelList, explain_errors

logger = logging.getLogger(__name__)

MAX_BODY = 54_000_000
"""Bytes of a request: two images at the handler's limit, as base64, and the text."""
MAX_WAITING = 40
"""Requests whose images are fetched or that wait for the model; others wait with their images unopened."""
# Errors of the handler that say what is wrong with a request.
_REQUESTS_FAULTS = (ValueError, OSError, TemplateError)


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
        As `load_model`.
    """
    folder = local_folder(model) or HubOptions(revision).snapshot(str(model), ["*"])
    sys.modules.setdefault("handler_images", images)
    spec = importlib.util.spec_from_file_location("ivtp_endpoint_handler", shipped("hub_cards/handler.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The package has the classes: no code that came with a checkpoint runs.
    loaded, processor = load_model(
        folder, device=None if torch.cuda.is_available() else "cpu", dtype=module.fitting_dtype(folder)
    )
    return module.EndpointHandler(model=loaded, processor=processor)


def check_key(api_key: str | None) -> None:
    """Raise ValueError for an empty key, which no request could bring."""
    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty; give one with characters, or none to answer everybody")


def build(handler: Any, name: str, *, api_key: str | None = None, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Build the application, whose page at `/docs` lists what a request may hold.

    Parameters
    ----------
    handler : EndpointHandler
        As `load_handler` returns it.
    name : str
        The model's name in requests and answers.
    api_key : str, optional
        The key without which nothing under `/v1` answers; by default everybody is answered.
    cors_origins : sequence of str
        Origins, such as `https://example.com`, whose pages may ask from a browser; `*` is all of them.

    Raises
    ------
    ValueError
        If the key is empty.
    """
    check_key(api_key)
    app = FastAPI(title="IVTP-LLaVA", responses={"default": {"model": ErrorAnswer}})
    app.add_middleware(_Guard, api_key=api_key)
    app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    for kind in (RequestValidationError, StarletteHTTPException, *_REQUESTS_FAULTS, Exception):
        app.add_exception_handler(kind, _refuse)
    # The dependency shows on the page that a key is needed; the guard asks for it before it reads a request.
    router = APIRouter(prefix="/v1", dependencies=[] if api_key is None else [Depends(HTTPBearer(auto_error=False))])
    batcher = Batcher(handler)
    slots = asyncio.Semaphore(MAX_WAITING)

    def check_model(model: str | None) -> None:
        if model not in (None, name):
            raise HTTPException(404, f"there is no model {model!r}; allowed: {name}")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[Model(id=name)])

    @router.get("/models/{model:path}")
    async def retrieve(model: str) -> Model:
        check_model(model)
        return Model(id=name)

    @router.post("/chat/completions", response_model=Completion)
    async def complete(request: ChatRequest) -> Any:
        check_model(request.model)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Any]()
        listener = Listener(request.stops, lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text))
        await slots.acquire()
        try:
            job = await run_in_threadpool(handler.read, *request.for_handler())
            future = batcher.submit(job, listener if request.stream or request.stops else None)
        except BaseException:
            slots.release()
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(slots.release))
        if not request.stream:
            return Completion.of(await asyncio.wrap_future(future), name, request.stops)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(pieces.put_nowait, done))
        first = await pieces.get()
        if not isinstance(first, str):
            first.result()  # an error before the first word has a status of its own
        return StreamingResponse(_events(first, pieces, listener, request, name), media_type="text/event-stream")

    app.include_router(router)
    return app


async def _events(
    piece: Any, pieces: asyncio.Queue[Any], listener: Listener, request: ChatRequest, name: str
) -> AsyncIterator[str]:
    """Write an answer as server-sent events, while it is made."""
    chunks = Chunks(name, request.stream_options is not None and request.stream_options.include_usage)
    try:
        yield chunks.delta(role="assistant", content="")
        while isinstance(piece, str):
            yield chunks.delta(content=piece)
            piece = await pieces.get()
        yield chunks.end(Completion.of(piece.result(), name, request.stops))
    except Exception as error:
        logger.error("an answer broke off", exc_info=error)
        yield f"data: {_error(error)[1].model_dump_json()}\n\n"
    finally:
        listener.finished = True  # nobody reads on: the model need not go on either


def _error(error: Exception) -> tuple[int, ErrorAnswer]:
    """Return the status and the answer, in OpenAI's form, for an error."""
    status, message = 500, f"{type(error).__name__}: {error}"
    if isinstance(error, RequestValidationError):
        status, message = 400, explain_errors(error.errors())
    elif isinstance(error, StarletteHTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, _REQUESTS_FAULTS):
        status, message = 400, " ".join(str(error).split())
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode("utf-8", "backslashreplace").decode()[:1000]
    code = "invalid_api_key" if status == 401 else None
    return status, ErrorAnswer(error=Error(message=message, type=kind, code=code))


async def _refuse(_: Request | None, error: Exception) -> JSONResponse:
    status, answer = _error(error)
    return JSONResponse(answer.model_dump(), status, getattr(error, "headers", None))


class _Guard:
    """Middleware that asks for the key, and stops reading a request that is larger than `MAX_BODY`."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY:,} bytes")
            return message

        if scope["type"] == "http" and scope["path"].startswith("/v1") and self._expected is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                refusal = HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
                await (await _refuse(None, refusal))(scope, receive, send)
                return
        await self.app(scope, limited, send)
