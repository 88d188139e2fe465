"""The OpenAI-shaped server, asked by OpenAI's own client; and why transformers' server is no way in."""

import base64
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
import uvicorn

from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.cli import main
from modeling_ivtp.serving.server import build, load_handler

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "hub_cards" / "ivtp-llava-miniature" / "images" / "scene.png"
QUESTION = "The tree is on a tile of which colour?"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = load_handler(ROOT / "examples" / "miniature")
    handler.model.float()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(build(handler, "mini"), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=8, timeout=120)


def messages(question: str = QUESTION) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(SCENE.read_bytes()).decode()}"
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
        }
    ]


def test_a_chat_completion_with_an_image(client: Any) -> None:
    done = client.chat.completions.create(model="mini", messages=messages(), max_tokens=4)
    assert done.choices[0].message.content == "yellow"
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == 1
    assert done.usage.prompt_tokens > 576
    assert done.model_extra["ivtp"]["visual_tokens"] == [64]


def test_the_budget_goes_along(client: Any) -> None:
    for budget, kept in ((16, 16), (None, 576)):
        done = client.chat.completions.create(
            model="mini", messages=messages(), max_tokens=4, extra_body={"visual_tokens": budget}
        )
        assert done.model_extra["ivtp"]["visual_tokens"] == [kept]


def test_streams_stops_and_lengths(client: Any) -> None:
    pieces = list(client.chat.completions.create(model="mini", messages=messages(), max_tokens=4, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "yellow"
    assert pieces[-1].choices[0].finish_reason == "stop"
    done = client.chat.completions.create(model="mini", messages=messages(), max_tokens=1, stop=["low"])
    assert done.choices[0].message.content == "yel"
    assert client.chat.completions.create(model="mini", messages=messages(), max_tokens=1).choices[0].finish_reason == (
        "length"
    )


def test_a_conversation_and_text_alone(client: Any) -> None:
    chat = [*messages(), {"role": "assistant", "content": "yellow"}, {"role": "user", "content": "Do you see a drum?"}]
    assert client.chat.completions.create(model="mini", messages=chat, max_tokens=4).choices[0].message.content
    alone = [{"role": "user", "content": "Well?"}]
    assert (
        client.chat.completions.create(model="mini", messages=alone, max_tokens=2).model_extra["ivtp"]["visual_tokens"]
        == []
    )


def test_many_at_once_get_their_own_answers(client: Any) -> None:
    questions = [QUESTION, "Which thing is the nearest one above the tulip?", "Do you see a scooter here?"] * 4

    def ask(question: str) -> str:
        return (
            client.chat.completions.create(model="mini", messages=messages(question), max_tokens=4)
            .choices[0]
            .message.content
        )

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == ["yellow", "drum", "yes"] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 2}, "n=2; allowed: 1"),
        ({"max_tokens": 10**6}, "allowed: 1 to 2048"),
        ({"logprobs": True}, "logprobs=true; allowed: false"),
        ({"extra_body": {"guided_regex": "a"}}, "unknown field(s) guided_regex; allowed: model, messages"),
        ({"max_tokens": "4"}, 'max_tokens="4"; allowed: a valid integer'),
        ({"stop": [1]}, "stop.list[str].0=1; allowed: a valid string"),
        (
            {"messages": [{"role": "root", "content": "x"}]},
            "messages.0.role=\"root\"; allowed: 'system', 'user' or 'assistant'",
        ),
        ({"messages": []}, "messages is a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
            "files",
        ),
        ({"extra_body": {"visual_tokens": 0}}, "visual_tokens=0; allowed: 1 to 576"),
    ],
)
def test_bad_requests_say_what_is_allowed(client: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**({"model": "mini", "messages": messages()} | changes))
    assert said in str(raised.value)


def test_what_is_not_there(client: Any) -> None:
    none: dict[str, Any] = {"n": None, "stop": None, "frequency_penalty": 0, "max_completion_tokens": None}
    done = client.chat.completions.create(model="mini", messages=messages(), max_tokens=4, extra_body=none)
    assert done.choices[0].message.content == "yellow"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; allowed: mini"):
        client.chat.completions.create(model="gpt", messages=messages())
    assert [model.id for model in client.models.list()] == ["mini"]


def test_no_code_that_came_with_a_checkpoint_runs(tmp_path: Path) -> None:
    convert(None, None, tmp_path / "made", recipe="ivtp-llava-miniature-64", progress=False)
    for file in (tmp_path / "made").glob("*.py"):
        file.write_text("raise RuntimeError('code of the checkpoint ran')")
    assert load_handler(tmp_path / "made")({"inputs": {"text": "Well?"}, "parameters": {"max_new_tokens": 1}})
    (tmp_path / "evil").mkdir()
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(evil))
    (tmp_path / "evil" / "evil.py").write_text("raise RuntimeError('code of the checkpoint ran')")
    with pytest.raises(ValueError, match="is of model_type 'evil'"):
        load_handler(tmp_path / "evil")


def test_requests_that_are_none_answer_in_openais_form(address: str) -> None:
    for body, said in (
        (b"{", "the request is not JSON"),
        (b"[]", "the request=[]; allowed: a valid dictionary"),
        (b"[" * 100_000, "pars"),
        (b'{"model": "mini"}', "messages is missing"),
    ):
        answer = httpx.post(f"{address}/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert said in error["message"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    plain = httpx.post(f"{address}/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "no Content-Type: application/json" in plain.json()["error"]["message"]


def test_the_api_page_lists_what_a_request_may_hold(address: str) -> None:
    root = address.removesuffix("/v1")
    assert "swagger" in httpx.get(f"{root}/docs").text
    schemas = httpx.get(f"{root}/openapi.json").json()["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"]
    assert "null answers without pruning" in fields["visual_tokens"]["description"]
    assert fields["n"]["enum"] == [1, None]
    assert {"Completion", "Message", "ErrorAnswer"} <= set(schemas)


def test_a_request_that_is_too_large_is_cut_off(client: Any) -> None:
    huge = [{"role": "user", "content": "x" * 41_000_000}]
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        client.with_options(max_retries=0).chat.completions.create(model="mini", messages=huge)


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "nowhere")]) == 1
    assert "neither a folder here nor the name of a repository" in capsys.readouterr().err


def test_a_taken_port_is_noticed_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("modeling_ivtp.serving.server.load_handler", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(ROOT / "examples" / "miniature"), "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in capsys.readouterr().err
    assert main(["serve", str(ROOT / "examples" / "miniature"), "--host", "203.0.113.1"]) == 1
    assert "port 8000 of 203.0.113.1 cannot be used" in capsys.readouterr().err


def test_the_command_serves(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ivtp_cli", "serve", str(ROOT / "examples" / "miniature"), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            transport = httpx.HTTPTransport(retries=8)
            with httpx.Client(transport=transport, timeout=120) as client:
                assert client.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
        finally:
            process.terminate()
    assert process.returncode in (0, -15)


def test_transformers_own_server_does_not_take_classes_of_remote_code(tmp_path: Path) -> None:
    """Documented in hub_cards/SERVING.md; when this fails, the way in is open and the page has to say so."""
    manager = pytest.importorskip(
        "transformers.cli.serving.model_manager", reason="this transformers has another server"
    ).ModelManager
    convert(None, None, tmp_path / "made", recipe="ivtp-llava-miniature-64", progress=False)
    assert not hasattr(transformers, "IVTPLlavaForConditionalGeneration")
    with pytest.raises((AttributeError, ValueError), match="IVTPLlavaForConditionalGeneration"):
        manager(device="cpu", trust_remote_code=True, force_model=str(tmp_path / "made"))
