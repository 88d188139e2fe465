"""Clients of OpenAI's kind, asking `ivtp serve` on this machine about a picture, as their users write it."""

import base64
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "hub_cards" / "ivtp-llava-miniature" / "images" / "scene.png"
QUESTION, ANSWER = "The tree is on a tile of which colour?", "yellow"
KEY = "no key is needed"

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that a user started with one command."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ivtp_cli", "serve", str(ROOT / "examples" / "miniature"), "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait(url: str, process: Any, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def model(address: str) -> str:
    """The name under which the server offers its model."""
    return str(httpx.get(f"{address}/models").json()["data"][0]["id"])


def messages() -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(SCENE.read_bytes()).decode()}"
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": content}]


def test_openai(address: str, model: str) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed; make test-clients does it")
    client = openai.OpenAI(base_url=address, api_key=KEY)
    assert [entry.id for entry in client.models.list()] == [model]
    done = client.chat.completions.create(model=model, messages=messages(), max_completion_tokens=8)
    assert done.choices[0].message.content == ANSWER
    pieces = client.chat.completions.create(model=model, messages=messages(), temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ANSWER


def test_openai_asynchronously(address: str, model: str) -> None:
    import asyncio

    openai = pytest.importorskip("openai", reason="openai is not installed; make test-clients does it")

    async def ask_twice() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY) as client:
            calls = [client.chat.completions.create(model=model, messages=messages()) for _ in range(2)]
            return [done.choices[0].message.content for done in await asyncio.gather(*calls)]

    assert asyncio.run(ask_twice()) == [ANSWER] * 2


def test_langchain(address: str, model: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed; see test-clients")
    from langchain_core.messages import HumanMessage

    chat = langchain.ChatOpenAI(base_url=address, api_key=KEY, model=model, temperature=0)
    question = HumanMessage(content=messages()[0]["content"])
    answer = chat.invoke([question])
    assert answer.content == ANSWER
    assert answer.usage_metadata["input_tokens"] > 576
    assert "".join(piece.content for piece in chat.stream([question])) == ANSWER
    assert [entry.content for entry in chat.batch([[question], [question]])] == [ANSWER] * 2


def test_litellm(address: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices when it is imported
    litellm = pytest.importorskip("litellm", reason="litellm is not installed; make test-clients does it")
    options = {"model": f"openai/{model}", "api_base": address, "api_key": KEY, "messages": messages()}
    done = litellm.completion(**options, temperature=0)
    assert done.choices[0].message.content == ANSWER
    assert done.usage.completion_tokens == 1
    pieces = litellm.completion(**options, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ANSWER
