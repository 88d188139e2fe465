"""The OpenAI-shaped server, asked by OpenAI's own client; and why transformers' server is no way in."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
import uvicorn
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from modeling_ivtp.checkpoints import sources
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.cli import main
from modeling_ivtp.serving.answering import load_model
from modeling_ivtp.serving.server import build, load_handler
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "hub_cards" / "ivtp-llava-miniature" / "images" / "scene.png"
QUESTION = "The tree is on a tile of which colour?"


@pytest.fixture(scope="module")
def handler() -> Any:
    handler = load_handler(ROOT / "examples" / "miniature")
    handler.model.float()
    return handler


@contextmanager
def running(handler: Any, **options: Any) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(build(handler, "mini", **options), log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(handler: Any) -> Iterator[str]:
    with running(handler) as url:
        yield url


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


@pytest.mark.slow
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
        ({"stop": ["a"] * 5}, 'stop=["a", "a", "a", "a", "a"]; allowed: up to 4 texts of at most 256 characters'),
        ({"stop": "a" * 257}, "allowed: up to 4 texts of at most 256 characters"),
        ({"stop": ["b", "a" * 257]}, "allowed: up to 4 texts of at most 256 characters"),
        ({"messages": [{"role": "user", "content": ""}] * 40_001}, "there are more than 512 messages or parts"),
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


@pytest.fixture
def talkative(handler: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The handler with a model that never ends an answer by itself."""
    monkeypatch.setattr(handler.model.generation_config, "eos_token_id", None)
    return handler


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "mini", "messages": messages(), "max_tokens": 48} | options)


@pytest.mark.slow
def test_a_stream_comes_token_by_token(client: Any, talkative: Any) -> None:
    chatter: dict[str, Any] = {"temperature": 4.0, "seed": 1}
    whole = ask(client, **chatter)
    assert whole.usage.completion_tokens == 48
    start = time.monotonic()
    pieces = [
        (time.monotonic() - start, chunk.choices[0].delta.content) for chunk in ask(client, stream=True, **chatter)
    ]
    words = [(seconds, text) for seconds, text in pieces if text]
    assert "".join(text for _, text in words) == whole.choices[0].message.content
    assert len(words) > 20
    assert words[0][0] < 0.6 * words[-1][0]


def test_a_stream_tells_its_usage_if_asked(client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].model_extra["ivtp"]["visual_tokens"] == [64]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    for options in ({}, {"stream_options": {"include_usage": False}}):
        assert all(chunk.usage is None for chunk in ask(client, stream=True, **options))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_the_work(client: Any, talkative: Any, stream: bool) -> None:
    chatter: dict[str, Any] = {"temperature": 4.0, "seed": 1}
    whole = ask(client, **chatter)
    text = whole.choices[0].message.content
    stop = text[len(text) // 3 :][:4]
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    done = ask(client, stop=["never", stop], stream=stream, **chatter, **options)
    if stream:
        *chunks, last = list(done)
        answer, usage = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), last.usage
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer, usage, reason = done.choices[0].message.content, done.usage, done.choices[0].finish_reason
    assert answer == text[: text.index(stop)]
    assert reason == "stop"
    assert usage.completion_tokens < 48


NEUTRAL: dict[str, list[Any]] = {
    "response_format": [{"type": "text"}, None],
    "logit_bias": [{}],
    "tools": [[], None],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "store": [False],
    "metadata": [{}, {"job": "1"}],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0],
    "logprobs": [False],
    "top_logprobs": [0],
    "modalities": [["text"]],
    "service_tier": ["auto", "default"],
    "user": ["somebody"],
    "n": [1],
    "reasoning_effort": [None],
    "prediction": [None],
    "a_field_of_next_year": [None],
}
MEANT = {
    "response_format": {"type": "json_object"},
    "logit_bias": {"7": 1},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "store": True,
    "frequency_penalty": 0.5,
    "top_logprobs": 2,
    "modalities": ["audio"],
}


def test_fields_that_mean_nothing_are_accepted(client: Any) -> None:
    for number in range(2):
        fields = {name: values[min(number, len(values) - 1)] for name, values in NEUTRAL.items()}
        assert ask(client, extra_body=fields).choices[0].message.content == "yellow"


@pytest.mark.parametrize("name", MEANT)
def test_fields_that_mean_something_are_refused(client: Any, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, extra_body={name: MEANT[name]})
    assert f"{name}={json.dumps(MEANT[name])[:40]}; allowed: " in str(raised.value)


def test_unknown_fields_with_a_value_are_refused(client: Any) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"unknown field\(s\) a_field_of_next_year, reasoning_effort; allowed"
    ):
        ask(client, extra_body={"reasoning_effort": "low", "a_field_of_next_year": {}, "prediction": None})


def test_models_are_retrieved(client: Any, handler: Any) -> None:
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; allowed: mini"):
        client.models.retrieve("gpt")
    app = build(handler, "owner/llava")
    with TestClient(app) as asked:
        assert asked.get("/v1/models/owner/llava").json()["id"] == "owner/llava"
        assert asked.get("/v1/models/owner%2Fllava").json()["id"] == "owner/llava"


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/nothing", 404), ("POST", "/v1/embeddings", 404), ("GET", "/", 404),
    ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
])  # fmt: skip
def test_unknown_routes_answer_in_openais_form(address: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, address.removesuffix("/v1") + path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_a_key_is_asked_for(handler: Any) -> None:
    with running(handler, api_key="schlüssel") as url:
        for key in ("wrong", "schlussel", "x" * 1000):
            answer = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for stream in (False, True):
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                ask(openai.OpenAI(base_url=url, api_key="wrong"), stream=stream)
        root = url.removesuffix("/v1")
        assert httpx.get(f"{root}/health").json() == {"status": "ok"}
        assert "securitySchemes" in httpx.get(f"{root}/openapi.json").json()["components"]
    with running(handler, api_key="key") as url:
        assert ask(openai.OpenAI(base_url=url, api_key="key")).choices[0].message.content == "yellow"


def test_pages_of_named_origins_may_ask(handler: Any, address: str) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with running(handler, api_key="key", cors_origins=["https://page.test"]) as url:
        for origin, allowed in (("https://page.test", "https://page.test"), ("https://evil.test", None)):
            headers = {"Origin": origin}
            asked = httpx.options(f"{url}/chat/completions", headers=headers | preflight)
            assert asked.headers.get("Access-Control-Allow-Origin") == allowed
            # A page has to be able to read that its key is wrong.
            refused = httpx.get(f"{url}/models", headers=headers)
            assert (refused.status_code, refused.headers.get("Access-Control-Allow-Origin")) == (401, allowed)
    assert (
        "Access-Control-Allow-Origin"
        not in httpx.get(f"{address}/models", headers={"Origin": "https://a.test"}).headers
    )


def together(work: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(work, jobs))


@pytest.mark.slow
def test_sixteen_at_once_take_far_less_than_sixteen_times_one(client: Any, talkative: Any) -> None:
    questions = [QUESTION, "Which thing is the nearest one above the tulip?", "Do you see a scooter here?", "Well?"] * 4

    def answer(question: str) -> Any:
        done = ask(client, messages=messages(question), max_tokens=96)
        return done.choices[0].message.content, done.usage

    alone = []
    start = time.monotonic()
    for question in questions[:4]:
        alone.append(answer(question))
    one = (time.monotonic() - start) / 4
    start = time.monotonic()
    assert together(answer, questions) == alone * 4
    seconds = time.monotonic() - start
    assert seconds < 16 * one / 2, (seconds, one)


@pytest.mark.slow
def test_streams_are_answered_together_as_they_are_alone(client: Any, talkative: Any) -> None:
    questions = [QUESTION, "Do you see a scooter here?", "Well?", "What is below the tulip?"]

    def answer(job: tuple[str, bool]) -> str:
        done = ask(client, messages=messages(job[0]), stream=job[1])
        return "".join(c.choices[0].delta.content or "" for c in done) if job[1] else done.choices[0].message.content

    alone = [answer((question, False)) for question in questions]
    jobs = [(question, number % 3 > 0) for number, question in enumerate(questions * 2)]
    assert together(answer, jobs) == alone * 2


def test_a_failure_in_one_does_not_fail_the_others(client: Any, handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_ivtp.serving.batching.GATHERING", 1.0)
    original, sizes = handler.model.generate, []

    def failing(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if (inputs["attention_mask"].sum(1) > 700).any():
            raise RuntimeError("out of memory")
        return original(**inputs)

    monkeypatch.setattr(handler.model, "generate", failing)
    patient = client.with_options(max_retries=0)

    def answer(job: tuple[str, bool]) -> Any:
        try:
            done = ask(patient, messages=messages(job[0]), max_tokens=4, stream=job[1])
            return (
                "".join(c.choices[0].delta.content or "" for c in done) if job[1] else done.choices[0].message.content
            )
        except openai.APIError as error:
            return type(error), str(error.message)

    answers = together(
        answer, [(QUESTION, False), ("And here? " * 60, False), (QUESTION, True), ("And here? " * 60, True)]
    )
    assert answers[0] == answers[2] == "yellow"
    for kind, message in (answers[1], answers[3]):
        assert kind is openai.InternalServerError
        assert "out of memory" in message
    assert max(sizes) > 1


def test_a_stream_that_breaks_off_says_so(client: Any, talkative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = talkative.model.generate

    def failing(**inputs: Any) -> Any:
        original(**inputs | {"max_new_tokens": 8})
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(talkative.model, "generate", failing)
    words = []
    with pytest.raises(openai.APIError, match="the device is gone"):  # noqa: PT012
        for chunk in ask(client, stream=True):
            words.append(chunk.choices[0].delta.content)
    assert any(words)


def test_who_hangs_up_ends_the_work(address: str, talkative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, lengths = talkative.model.generate, []

    def watched(**inputs: Any) -> Any:
        output = original(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(talkative.model, "generate", watched)
    body = {"messages": messages(), "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", f"{address}/chat/completions", json=body, timeout=120) as answer:
        assert next(line for line in answer.iter_lines() if '"content":"' in line and '"content":""' not in line)
    ends = time.monotonic() + 60
    while not lengths and time.monotonic() < ends:
        time.sleep(0.1)
    assert lengths
    assert lengths[0] < 1000


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert(root / "llava", root / "clip", root / "ivtp", pruning=PRUNING, progress=False)
    return root / "ivtp"


def test_a_checkpoint_without_some_weights_is_not_served(tiny_folder: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers, and say so in a log alone."""
    shutil.copytree(tiny_folder, tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    less = {name: tensor for name, tensor in tensors.items() if "layers.3." not in name}
    save_file(less, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of the model"):
        load_handler(tmp_path / "made")


def test_pickled_weights_are_not_opened(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "made")
    torch.save(load_file(tmp_path / "made" / "model.safetensors"), tmp_path / "made" / "pytorch_model.bin")
    (tmp_path / "made" / "model.safetensors").unlink()
    for load in (load_handler, lambda path: load_model(path, device="cpu")):
        with pytest.raises(ValueError, match=r"made has no model\.safetensors .*only pytorch_model\.bin"):
            load(tmp_path / "made")
    handler_class = type(load_handler(tiny_folder))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        handler_class(str(tmp_path / "made"))


def test_pickled_weights_of_the_hub_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources.HubOptions, "check", lambda *_: None)
    monkeypatch.setattr(sources.HubOptions, "snapshot", lambda *_: tmp_path)
    monkeypatch.setattr(sources, "converted_revision", lambda *_: None)
    monkeypatch.setattr(sources.HfApi, "list_repo_files", lambda *_, **__: ["pytorch_model.bin"])
    with pytest.raises(ValueError, match=r"owner/name has no model\.safetensors .*only pytorch_model\.bin"):
        load_model("owner/name", device="cpu")


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
    huge = [{"role": "user", "content": "x" * 55_000_000}]
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        client.with_options(max_retries=0).chat.completions.create(model="mini", messages=huge)


def test_two_pictures_at_the_limit_are_read(address: str) -> None:
    """They are none, which is said of the first; nobody says that the request is too large."""
    url = f"data:image/png;base64,{base64.b64encode(bytes(20_000_000)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}] * 2
    body = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "?" * 20_000}]}]}
    answer = httpx.post(f"{address}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "not an image in a known format" in answer.json()["error"]["message"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "nowhere"), "--port", str(free_port())]) == 1
    assert "neither a folder here nor the name of a repository" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, handler: Any, key: str
) -> None:
    """Nobody could bring it."""
    with pytest.raises(ValueError, match="the API key is empty"):
        build(handler, "mini", api_key=key)
    monkeypatch.setattr("modeling_ivtp.serving.server.load_handler", lambda *_: pytest.fail("loaded"))
    assert main(["serve", str(ROOT / "examples" / "miniature"), "--api-key", key, "--port", str(free_port())]) == 1
    assert "the API key is empty" in capsys.readouterr().err


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_command_serves(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ivtp_cli", "serve", str(ROOT / "examples" / "miniature"), "--port", str(port)]
    command += ["--cors-origin", "https://one.test", "--cors-origin", "https://two.test"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"IVTP_API_KEY": "key"}) as process:
        try:
            transport = httpx.HTTPTransport(retries=8)
            with httpx.Client(transport=transport, timeout=120) as client:
                assert client.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
                models = f"http://127.0.0.1:{port}/v1/models"
                assert client.get(models).status_code == 401
                answer = client.get(models, headers={"Authorization": "Bearer key", "Origin": "https://two.test"})
                assert answer.headers["Access-Control-Allow-Origin"] == "https://two.test"
        finally:
            process.terminate()
    assert process.returncode in (0, -15)


@pytest.mark.slow
def test_transformers_own_server_does_not_take_classes_of_remote_code(tmp_path: Path) -> None:
    """Documented in docs/serving.md; when this fails, the way in is open and the page has to say so."""
    manager = pytest.importorskip(
        "transformers.cli.serving.model_manager", reason="this transformers has another server"
    ).ModelManager
    convert(None, None, tmp_path / "made", recipe="ivtp-llava-miniature-64", progress=False)
    assert not hasattr(transformers, "IVTPLlavaForConditionalGeneration")
    with pytest.raises((AttributeError, ValueError), match="IVTPLlavaForConditionalGeneration"):
        manager(device="cpu", trust_remote_code=True, force_model=str(tmp_path / "made"))
