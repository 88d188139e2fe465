"""An OpenAI-shaped HTTP server around the endpoint handler: `ivtp serve`.

`transformers serve` cannot do it: it looks a checkpoint's class up in transformers itself and does not know what a
class of remote code takes. Only what chat completions with images need is here; the handler does the work.
"""

import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import local_folder
from ..files import images
from ..files.shipped import shipped

MAX_BODY = 40_000_000
"""Bytes of a request: two images at the handler's limit, as base64."""
_GENERATION = ("temperature", "top_p", "seed")
_READ = ("model", "messages", "stream", "stream_options", "n", "stop", "max_tokens", "max_completion_tokens", "user")
_NONE = ("frequency_penalty", "presence_penalty", "logprobs")
"""What clients send without meaning anything by it; any other value is refused."""


def load_handler(model: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The endpoint handler on a checkpoint, with this package's classes.

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
    folder = local_folder(model) or Path(snapshot_download(str(model), revision=revision))
    read_config(folder, str(model), quantized=True)
    sys.modules.setdefault("handler_images", images)
    spec = importlib.util.spec_from_file_location("ivtp_endpoint_handler", shipped("hub_cards/handler.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The package has the classes: no code that came with a checkpoint runs.
    return module.EndpointHandler(str(folder), trust_remote_code=False)


def build(handler: Any, name: str) -> Any:
    """The FastAPI application.

    Parameters
    ----------
    handler : callable
        Takes a request as `hub_cards/handler.py` says; runs in a thread.
    name : str
        What the model is called.
    """
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse, StreamingResponse

    app = FastAPI(title="IVTP-LLaVA", docs_url=None, redoc_url=None)

    def refused(message: str, status: int = 400) -> Any:
        kind = "invalid_request_error" if status < 500 else "server_error"
        message = message.encode("utf-8", "backslashreplace").decode()[:1000]
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "ivtp-llava"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                return refused(f"the request is larger than {MAX_BODY:,} bytes", 413)
        try:
            asked = json.loads(body)
            wanted = _request(asked)
        except (ValueError, RecursionError) as error:
            return refused(str(error))
        if asked.get("model", name) != name:
            return refused(f"there is no model {asked['model']!r}; allowed: {name}", 404)
        try:
            answer = await run_in_threadpool(handler, wanted)
        except ValueError as error:
            return refused(str(error))
        except Exception as error:
            return refused(f"{type(error).__name__}: {error}", 500)
        told = _completion(answer, name, asked)
        if asked.get("stream"):
            return StreamingResponse(_events(told), media_type="text/event-stream")
        return JSONResponse(told)

    return app


def _request(asked: Any) -> dict[str, Any]:
    """OpenAI's request as the handler's.

    Raises
    ------
    ValueError
        For what this server does not do.
    """
    if not isinstance(asked, Mapping):
        raise ValueError("the request is not a JSON object")
    # A null is what is not there, but for the budget, of which it says something.
    asked = {name: value for name, value in asked.items() if value is not None or name == "visual_tokens"}
    meant = {name for name in asked if name not in _NONE or asked[name]}
    if unknown := sorted(meant - {*_READ, *_GENERATION, "visual_tokens"}):
        allowed = ", ".join([*_READ, *_GENERATION, "visual_tokens"])
        raise ValueError(f"unknown field(s) {', '.join(unknown)[:200]}; allowed: {allowed}")
    if asked.get("n", 1) != 1:
        raise ValueError(f"n={asked['n']!r}; allowed: 1")
    stop = asked.get("stop")
    if not (
        stop is None or isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))
    ):
        raise ValueError("stop is a text or a list of texts")
    parameters = {name: asked[name] for name in ("visual_tokens",) if name in asked}
    longest = asked.get("max_completion_tokens", asked.get("max_tokens"))
    if longest is not None:
        parameters["max_new_tokens"] = longest
    # Greedy unless a temperature or top_p asks for more, as LLaVA is used.
    if asked.get("temperature", 1.0 if "top_p" in asked else 0):
        parameters |= {name: asked[name] for name in _GENERATION if name in asked}
        parameters["do_sample"] = True
    return {"inputs": {"messages": asked.get("messages")}, "parameters": parameters}


def _completion(answer: Mapping[str, Any], name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    text, stop = answer["generated_text"], asked.get("stop") or []
    cut = min(
        (text.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one and one in text), default=None
    )
    message = {"role": "assistant", "content": text if cut is None else text[:cut]}
    reason = answer["finish_reason"] if cut is None else "stop"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": answer["prompt_tokens"],
            "completion_tokens": answer["generated_tokens"],
            "total_tokens": answer["prompt_tokens"] + answer["generated_tokens"],
        },
        "ivtp": {key: answer[key] for key in ("visual_tokens", "layer_averaged_tokens", "seconds")},
    }


def _events(told: Mapping[str, Any]) -> Iterator[str]:
    """The answer as server-sent events: whole, in one piece, as it comes from a batch."""
    shared = {key: told[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    choice = told["choices"][0]
    for delta, reason in ((choice["message"], None), ({}, choice["finish_reason"])):
        chunk = shared | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"
