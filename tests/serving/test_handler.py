"""The endpoint handler, loaded from a laid out repository as the Inference Endpoints toolkit does."""

import base64
import gc
import importlib.util
import io
import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from benchmarks.quality.world import Question, draw_scene, questions
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.publish.staging import stage
from tests.support.hostile import HOSTILE, encoded, hostile_request

SIDE = 336


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    root = tmp_path_factory.mktemp("handler")
    convert(None, None, root / "made", recipe="ivtp-llava-miniature-64", progress=False)
    (root / "repository").mkdir()
    stage(root / "made", "tester/miniature", root / "repository")
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("endpoint_handler", root / "repository" / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.folder = str(root / "repository")
    yield loaded
    sys.path[:] = before
    sys.modules.pop("handler_images", None)


@pytest.fixture(scope="module")
def handler(module: ModuleType) -> Any:
    made = module.EndpointHandler(module.folder)
    made.model.float()
    return made


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, Question]]:
    """Scenes as base64, and questions whose answers differ."""
    found = []
    for number in range(12):
        scene = draw_scene("test", 5000 + number, side=SIDE)
        one = questions(scene, types=("colour", "corner"), style="plain")[number % 2]
        found.append((encoded(Image.fromarray(scene.pixels)), one))
    return found


def short(inputs: Any, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 4} | parameters}


@pytest.mark.slow
def test_one_request_in_every_form(handler: Any, asked: list[Any]) -> None:
    image, question = asked[0]
    url, llavas = f"data:image/png;base64,{image}", f"<image>\n{question.text}"
    chat = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}],
        }
    ]
    forms = [
        {"image": image, "text": question.text},
        {"images": [url], "text": question.text},
        {"image": image, "text": llavas},
        {"messages": chat},
        {"messages": [{"role": "user", "content": [chat[0]["content"][0], {"type": "text", "text": llavas}]}]},
        chat,
    ]
    answers = [handler(short(form)) for form in forms]
    for answer in answers:
        assert answer["generated_text"] == question.answer
        assert answer["visual_tokens"] == [64]
        assert 64 < answer["layer_averaged_tokens"] < 120
        assert answer["seconds"] > 0
        assert 1 <= answer["generated_tokens"] <= 4
    json.dumps(answers)


@pytest.mark.slow
def test_text_alone_and_several_images(handler: Any, asked: list[Any]) -> None:
    answer = handler(short({"text": "Is it raining?"}))
    assert answer["visual_tokens"] == []
    both = handler(short({"images": [asked[0][0], asked[1][0]], "text": "Do you see a scooter here?"}))
    assert both["visual_tokens"] == [64, 64]


@pytest.mark.slow
def test_the_budget_is_the_requests_own(handler: Any, asked: list[Any]) -> None:
    image, question = asked[0]
    for budget, kept in ((16, 16), (200, 200), (None, 576), (576, 576)):
        answer = handler(short({"image": image, "text": question.text}, visual_tokens=budget))
        assert answer["visual_tokens"] == [kept]
    assert handler.model.pruning_config.visual_tokens == 64
    assert handler.model.pruning_config.enabled


def test_pictures_with_budgets_of_their_own_tell_what_they_kept(
    handler: Any, asked: list[tuple[str, Question]]
) -> None:
    requests = [{"image": image, "text": question.text} for image, question in asked[:3]]
    both = {"images": [asked[0][0], asked[1][0]], "text": "Which one is larger?"}
    with handler.model.pruning(choice="diverse", importance="accumulated", coverage=0.9, min_visual_tokens=1):
        together = handler(short([*requests, both]))
        alone = [handler(short(request)) for request in requests]
    assert [answer["visual_tokens"] for answer in together[:3]] == [answer["visual_tokens"] for answer in alone]
    assert len(together[3]["visual_tokens"]) == 2
    counts = [count for answer in together for count in answer["visual_tokens"]]
    assert 1 <= min(counts) < max(counts) < 64
    fixed = handler(short(requests[0]))
    assert fixed["visual_tokens"] == [64]
    layers, pruned = 12, 8
    spared = (64 - together[0]["visual_tokens"][0]) * (layers - pruned) / layers
    assert together[0]["layer_averaged_tokens"] == pytest.approx(fixed["layer_averaged_tokens"] - spared, abs=0.11)


@pytest.mark.slow
def test_a_batch_is_answered_as_its_requests_are_alone(handler: Any, asked: list[Any]) -> None:
    alone = [handler(short({"image": image, "text": question.text})) for image, question in asked]
    together = handler(short([{"image": image, "text": question.text} for image, question in asked]))
    assert [one["generated_text"] for one in together] == [one["generated_text"] for one in alone]
    assert len({one["generated_text"] for one in together}) > 3


def test_a_bad_one_does_not_sink_the_others(
    handler: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image, question = asked[0]
    good = {"image": image, "text": question.text}
    bad = [{"image": "/etc/passwd", "text": "x"}, {"text": ""}, 7, {**good, "parameters": {"visual_tokens": 0}}]
    answers = handler(short([good, *bad, good]))
    assert answers[0]["generated_text"] == answers[-1]["generated_text"] == question.answer
    assert all(set(answer) == {"error"} for answer in answers[1:-1])
    assert not caplog.records
    # One that only fails inside the model is found out, too.
    original = handler.model.generate

    def failing(**inputs: Any) -> Any:
        if (inputs["attention_mask"].sum(1) > 700).any():
            raise RuntimeError("out of memory")
        return original(**inputs)

    monkeypatch.setattr(handler.model, "generate", failing)
    caplog.clear()
    answers = handler(short([good, {**good, "text": "And here? " * 60}, good]))
    assert answers[1] == {"error": "out of memory"}
    # The one who runs the endpoint is told where it came from; of a bad request there is nothing to tell.
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError]
    assert answers[0]["generated_text"] == answers[2]["generated_text"] == question.answer


@pytest.mark.slow
def test_sampling_is_repeatable(handler: Any, asked: list[Any]) -> None:
    one = {"image": asked[0][0], "text": asked[0][1].text}
    request = short(one, do_sample=True, temperature=3.0, seed=5)
    alone = handler(request)["generated_text"]
    assert handler(request)["generated_text"] == alone
    # Neither who else asks, nor what was asked before, has a say, and a seed is not left behind.
    together = handler(short([one, one, one], do_sample=True, temperature=3.0, seed=5))
    assert [answer["generated_text"] for answer in together] == [alone] * 3
    before = torch.get_rng_state()
    handler(request)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_says_why_an_answer_ended(handler: Any, asked: list[Any]) -> None:
    image, question = asked[0]
    for length, reason in ((1, "length"), (4, "stop")):
        answer = handler(short({"image": image, "text": question.text}, max_new_tokens=length))
        assert answer["finish_reason"] == reason


def test_base64_may_have_line_breaks(handler: Any, asked: list[Any]) -> None:
    image, question = asked[0]
    broken = base64.encodebytes(base64.b64decode(image)).decode()
    assert handler(short({"image": broken, "text": question.text}))["generated_text"] == question.answer


@pytest.mark.slow
def test_large_pictures_do_not_wait_at_full_size(handler: Any) -> None:
    image = encoded(Image.new("L", (4000, 4000)))
    sizes = []
    original = handler._generate

    def watched(jobs: Any, extra: Any) -> Any:
        sizes.extend(picture.size for job in jobs for picture in job.images)
        return original(jobs, extra)

    handler._generate = watched
    try:
        handler(short([{"images": [image] * 2, "text": "x"}] * 4, max_new_tokens=1))
    finally:
        del handler._generate
    assert sizes == [(SIDE, SIDE)] * 8


@pytest.mark.slow
def test_a_ribbon_is_answered_from_its_middle(handler: Any, asked: list[Any]) -> None:
    image, question = asked[0]
    ribbon = Image.new("RGB", (120 * SIDE, SIDE), "red")
    ribbon.paste(Image.open(io.BytesIO(base64.b64decode(image))), ((ribbon.width - SIDE) // 2, 0))
    assert handler(short({"image": encoded(ribbon), "text": question.text}))["generated_text"] == question.answer


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused(handler: Any, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(HOSTILE[name][1])):
        handler(short(hostile_request(name)))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"visual_tokens": 0}, "visual_tokens=0; allowed: 1 to 576, or null"),
        ({"visual_tokens": 600}, "allowed: 1 to 576"),
        ({"visual_tokens": True}, "allowed: 1 to 576"),
        ({"max_new_tokens": 10**6}, "allowed: 1 to 2048"),
        ({"num_beams": 16, "max_new_tokens": 2048}, "max_new_tokens times num_beams is above 4096"),
        ({"temperature": 0.5}, "temperature needs do_sample=true"),
        ({"do_sample": 1}, "allowed: true, false"),
        ({"output_attentions": True}, "unknown parameter 'output_attentions'; allowed: max_new_tokens"),
    ],
)
def test_parameters_out_of_range(handler: Any, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        handler({"inputs": {"text": "x"}, "parameters": parameters})


@pytest.mark.parametrize("parts", [[""] * 513, [[{"type": "text", "text": ""}] * 513], [[]] * 200 + [[""] * 313]])
def test_many_messages_or_parts_are_refused_before_they_are_read(handler: Any, parts: list[Any]) -> None:
    chat = [{"role": "user", "content": content} for content in parts]
    with pytest.raises(ValueError, match="more than 512 messages or parts"):
        handler(short({"messages": chat}))


def test_an_image_is_not_left_out_for_others(handler: Any) -> None:
    with pytest.raises(ValueError, match="image and images are both there; allowed: one of them"):
        handler(short({"image": "data:,a", "images": ["data:,b"], "text": "What is this?"}))


def test_requests_that_are_none(handler: Any) -> None:
    for data in ({}, [], {"inputs": []}, {"inputs": [{"text": "x"}] * 40}, {"inputs": {"text": "x"}, "parameters": 3}):
        with pytest.raises(ValueError, match=r"request|entries|parameters"):
            handler(data)


class _Redirecting(BaseHTTPRequestHandler):
    places: dict[str, tuple[int, str, bytes]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        status, location, body = self.places[self.path]
        while not status:
            # A header that never ends, one letter at a time; the client hangs up.
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Wait: " if not body else b"x")
                body += b"x"
                time.sleep(0.1)
            except OSError:
                self.close_connection = True
                return
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        # More than what is read may be sent: the client hangs up.
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def public(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that counts as public, unlike everything else on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    images = sys.modules["handler_images"]
    original = images._is_public
    monkeypatch.setattr(images, "_is_public", lambda address: address == "127.0.0.1" or original(address))
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_addresses_are_followed_to_where_they_lead(
    module: ModuleType, handler: Any, asked: list[Any], public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 2)
    image, question = asked[0]
    port = public.rpartition(":")[2]
    _Redirecting.places = {
        "/picture": (200, "", base64.b64decode(image)),
        "/moved": (302, f"{public}/picture", b""),
        "/inside": (302, f"http://127.0.0.2:{port}/picture", b""),
        "/file": (302, "file:///etc/passwd", b""),
        "/circle": (302, f"{public}/circle", b""),
        "/endless": (200, "", b"x" * 30_000_000),
        "/nothing": (404, "", b""),
        "/drip": (0, "", b""),
    }
    for path in ("/picture", "/moved"):
        assert handler(short({"image": public + path, "text": question.text}))["generated_text"] == question.answer
    for path, said in (
        ("/inside", "127.0.0.2 is not a public address"),
        ("/file", "302"),
        ("/circle", "302"),
        ("/endless", "larger than 20,000,000 bytes"),
        ("/nothing", "404"),
        ("/drip", "longer than"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            handler(short({"image": public + path, "text": "x"}))


def test_slow_addresses_hold_up_only_each_other(
    module: ModuleType, handler: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that comes along is opened meanwhile, and who waits for others has less time left."""
    content, release, allowed = base64.b64decode(asked[0][0]), threading.Event(), []

    def slow(url: str, timeout: float, *_: Any, **__: Any) -> bytes:
        allowed.append(timeout)
        release.wait(30)
        return content

    monkeypatch.setattr(module, "download", slow)
    monkeypatch.setattr(handler, "_fetching", threading.Semaphore(6))
    ends = time.monotonic() + 10
    with ThreadPoolExecutor(8) as pool:
        try:
            waiting = [pool.submit(handler._picture, "http://slow.test/x.png", ends) for _ in range(7)]
            quick = pool.submit(handler._picture, f"data:image/png;base64,{asked[0][0]}", ends)
            assert quick.result(5).size
            assert len(allowed) == 6
            with pytest.raises(ValueError, match="fetching the images took longer than 60 seconds"):
                handler._picture("http://slow.test/x.png", time.monotonic() + 0.2)
            time.sleep(0.3)
        finally:
            release.set()
        assert all(picture.result(5).size == quick.result().size for picture in waiting)
    assert len(allowed) == 7
    assert allowed[-1] < min(allowed[:-1]) - 0.3


def test_an_address_that_holds_no_picture_is_named(
    module: ModuleType, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "download", lambda *_, **__: b"hello")
    with pytest.raises(ValueError, match=re.escape("http://a.test/x.png is not an image in a known format")):
        handler(short({"image": " http://a.test/x.png", "text": "x"}))


@pytest.mark.slow
def test_under_load_nothing_is_mixed_up_or_kept(handler: Any, asked: list[Any]) -> None:
    """200 requests, 16 at a time: every good one gets its own answer, every hostile one is refused, memory is flat."""
    hostile = {name: hostile_request(name) for name in HOSTILE if name != "too many bytes"}
    draws = random.Random(0)
    jobs = [draws.choice(sorted(hostile)) if draws.random() < 0.4 else draws.randrange(len(asked)) for _ in range(200)]
    budgets = [64 + number % 2 for number in range(len(asked))]
    wanted = [
        handler(short({"image": image, "text": question.text}, visual_tokens=budget))["generated_text"]
        for (image, question), budget in zip(asked, budgets, strict=True)
    ]
    assert sum(answer == question.answer for answer, (_, question) in zip(wanted, asked, strict=True)) >= 9

    def work(job: Any) -> Any:
        if isinstance(job, int):
            image, question = asked[job]
            return handler(short({"image": image, "text": question.text}, visual_tokens=budgets[job]))
        try:
            return handler(short(hostile[job]))
        except ValueError as error:
            return str(error)

    process = psutil.Process()
    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(jobs), 50):
            for job, told in zip(jobs[start : start + 50], pool.map(work, jobs[start : start + 50]), strict=True):
                if isinstance(job, int):
                    assert (told["generated_text"], told["visual_tokens"]) == (wanted[job], [budgets[job]])
                else:
                    assert HOSTILE[job][1] in told, job
            gc.collect()
            sizes.append(process.memory_info().rss)
    # The first fifty fill pools and caches.
    assert max(sizes[1:]) - sizes[0] < 150e6, sizes
    assert handler.model.pruning_config.visual_tokens == 64


@pytest.mark.slow
def test_nothing_that_ships_unpickles(module: ModuleType) -> None:
    files = [file for file in Path(module.folder).rglob("*") if file.is_file()]
    code = {file.name: file.read_text() for file in files if file.suffix == ".py"}
    assert {"handler.py", "handler_images.py", "modeling_ivtp.py", "configuration_ivtp.py"} <= set(code)
    for name, text in code.items():
        assert "torch.load(" not in text, name
        assert "pickle" not in text, name
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5")]
    for file in (Path(__file__).parents[2] / "modeling_ivtp").rglob("*.py"):
        assert "torch.load(" not in file.read_text(), file
        assert "import pickle" not in file.read_text(), file
