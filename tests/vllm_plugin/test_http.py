"""vLLM's HTTP server with the plug-in, asked by OpenAI's client: answers, budgets, metrics, and hostile requests.

It needs vLLM, in an environment of its own: `make vllm-env`, then `make vllm-test`.
"""

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.serving.engines import MINIATURE, NEW_TOKENS, Transformers, held_out
from benchmarks.serving.servers import http_server
from tests.support.hostile import HOSTILE, hostile_request

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-env, then make vllm-test")
openai = pytest.importorskip("openai", reason="the client comes with vLLM")

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

CEILING = 192
CHAT = "/v1/chat/completions"
MUCH = 40e6
"""Bytes by which a server may grow while it refuses."""

VLLMS_OWN = {
    "an image in the text": "a word like others, if no picture comes with it",
    "an unknown field": "fields that vLLM does not know are left out",
    "an unknown role": "the checkpoint's template takes every role",
    "the answer is there": "it is continued",
}
"""What the handler refuses and vLLM takes from everybody, and why that harms nothing."""

PICTURES = (
    "not a public address",
    "cannot be reached",
    "pixels",
    "larger than 20,000,000 bytes",
    "not an image in a known format",
    "more than 100 scans",
)
"""What is said of pictures, in the words of the handler."""


@pytest.fixture(scope="module")
def right():
    return Transformers()


@pytest.fixture(scope="module")
def asked():
    """Chats on drawn scenes, and the pictures in them."""
    return [SimpleNamespace(text=question_of(text), images=images) for text, images, _ in held_out(12)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose clients may ask for up to 192 visual tokens, in float32 as the engine that it is compared with."""
    flags = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--trust-request-mm-kwargs"]
    flags += ["--mm-processor-kwargs", json.dumps({"max_visual_tokens": CEILING})]
    # So few blocks are all in use soon: a cache that fills for the first time looks like a leak.
    flags += ["--num-gpu-blocks-override", "48"]
    with http_server(MINIATURE, *flags, log=tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


def question_of(prompt):
    return prompt.partition("<image>\n")[2].partition(" ASSISTANT:")[0].strip()


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text, *images):
    pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def ask(client, server, chat, **options):
    return client.chat.completions.create(
        model=server.model, messages=chat, **({"max_tokens": NEW_TOKENS, "temperature": 0} | options)
    )


def expected(right, chat, images, **options):
    """Return the answer of the transformers engine to a chat, and the tokens of its prompt."""
    plain = []
    for turn in chat:
        parts = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        plain.append({**turn, "content": [{"type": "image"} if "image_url" in part else part for part in parts]})
    text = right.processor.apply_chat_template(plain, add_generation_prompt=True)
    tokens = right.answer(text, images, **options)
    prompt = right.processor(images=images or None, text=text, return_tensors="pt")["input_ids"].shape[1]
    return right.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), prompt


def test_no_flag_is_needed(tmp_path, right, asked):
    """With `--model` alone it prunes, compiled, in the checkpoint's precision, and takes no budget from strangers."""
    chat = [user(asked[0].text, *asked[0].images)]
    with http_server(MINIATURE, log=tmp_path / "log.txt") as plain:
        client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", timeout=300, max_retries=0)
        before = {name: value for name, value in plain.metrics().items() if name.startswith("ivtp:")}
        assert not any(before.values())  # vLLM's own warm-up is no request
        answer = ask(client, plain, chat)
        said, tokens = expected(right, chat, asked[0].images)
        assert answer.choices[0].message.content.strip() == said
        assert answer.usage.prompt_tokens == tokens - 576 + 64
        with pytest.raises(openai.BadRequestError, match="--trust-request-mm-kwargs"):
            ask(client, plain, chat, extra_body={"mm_processor_kwargs": {"visual_tokens": 16}})
        assert "--enforce-eager" not in plain.process.cmdline()
        assert "torch_compile_cache" in plain.log.read_text()


def test_pictures_turns_and_texts_are_answered_as_by_transformers(client, server, right, asked):
    one, other = asked[0], asked[1]
    chats = [
        ([user(one.text, *one.images)], one.images),
        ([user("Is there a cup in the picture?", *one.images, *other.images)], [*one.images, *other.images]),
        (
            [user(one.text, *one.images), {"role": "assistant", "content": "yes"}, user("Is there a dog?")],
            one.images,
        ),
        (
            [
                user(one.text, *one.images),
                {"role": "assistant", "content": "yes"},
                user("And is there a dog here?", *other.images),
            ],
            [*one.images, *other.images],
        ),
        ([user("Is it raining?")], []),
    ]
    for chat, images in chats:
        answer = ask(client, server, chat)
        said, tokens = expected(right, chat, images)
        assert answer.usage.prompt_tokens == tokens - 512 * len(images)
        # In a later turn a picture keeps what its own turn kept; transformers would choose anew for a whole prompt.
        if len(chat) == 1:
            assert answer.choices[0].message.content.strip() == said


def test_streams_give_the_same(client, server, asked):
    chat = [user(asked[2].text, *asked[2].images)]
    whole = ask(client, server, chat)
    pieces = list(ask(client, server, chat, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_request_has_its_own_budget_up_to_the_ceiling(client, server, right, asked):
    chat = [user(asked[3].text, *asked[3].images)]
    for budget in (16, CEILING):
        answer = ask(client, server, chat, extra_body={"mm_processor_kwargs": {"visual_tokens": budget}})
        said, tokens = expected(right, chat, asked[3].images, visual_tokens=budget)
        assert answer.choices[0].message.content.strip() == said
        assert answer.usage.prompt_tokens == tokens - 576 + budget
    for budget, message in (
        (CEILING + 1, f"above this server's ceiling of {CEILING}"),
        (0, "visual_tokens=0; allowed"),
        ("many", "visual_tokens='many'; allowed"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, server, chat, extra_body={"mm_processor_kwargs": {"visual_tokens": budget}})


def test_a_request_changes_nothing_else_of_the_processor(client, server, asked):
    """Pixels of another size would end the engine."""
    chat = [user(asked[3].text, *asked[3].images)]
    for options in ({"crop_size": {"height": 14, "width": 14}}, {"size": {"height": 100_000, "width": 100_000}}):
        with pytest.raises(openai.BadRequestError, match=f"has '{next(iter(options))}'; allowed: visual_tokens"):
            ask(client, server, chat, extra_body={"mm_processor_kwargs": options})
    assert ask(client, server, chat).choices


def test_more_pictures_than_there_are_positions_for_are_refused(client, server, asked):
    """Pruned they fit into the context; at their original positions they would be behind the end of vLLM's angles."""
    chat = [user("Is there a cup?", *[one.images[0] for one in asked * 2])]
    with pytest.raises(openai.BadRequestError, match="made for 2048"):
        ask(client, server, chat)
    assert ask(client, server, [user("Is there a cup?", *asked[0].images)]).choices


def test_a_picture_by_its_uuid_alone_guides_no_later_one(client, server, asked):
    """It is answered from the cache as long as it stands alone."""
    chat = [user(asked[4].text, *asked[4].images)]
    chat[0]["content"][0]["uuid"] = "known"
    first = ask(client, server, chat).choices[0].message.content
    chat[0]["content"][0]["image_url"] = None
    assert ask(client, server, chat).choices[0].message.content == first
    later = [*chat, {"role": "assistant", "content": "yes"}, user("And here?", *asked[5].images)]
    with pytest.raises(openai.BadRequestError, match="as its uuid alone"):
        ask(client, server, later)


def test_metrics_count_what_stays_and_what_is_spared(client, server, right, asked):
    names = ("ivtp:kept_visual_tokens", "ivtp:dropped_visual_tokens", "ivtp:spared_kv_cache_bytes")
    before = server.metrics()
    ask(client, server, [user("Is it raining?")])
    ask(client, server, [user(asked[0].text, *asked[0].images)])
    body = {"mm_processor_kwargs": {"visual_tokens": 16}}
    ask(client, server, [user(asked[0].text, *asked[0].images, *asked[1].images)], extra_body=body)
    after = server.metrics()

    def more(name):
        return after[name] - before.get(name, 0)

    assert [more(f"{name}_count") for name in names] == [2, 2, 2]
    assert more(f"{names[0]}_sum") == 64 + 2 * 16
    assert more(f"{names[1]}_sum") == 512 + 2 * 560
    text = right.model.config.text_config
    cached = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * 4  # bytes of a token in float32
    assert more(f"{names[2]}_sum") == (512 + 2 * 560) * cached


def test_many_at_once_get_their_own_answers(client, server, asked):
    chats = [[user(one.text, *one.images)] for one in asked]
    alone = [ask(client, server, chat).choices[0].message.content for chat in chats]
    assert len(set(alone)) > 3
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda chat: ask(client, server, chat).choices[0].message.content, chats * 2)
        assert list(together) == alone * 2


def is_base64(source):
    try:
        base64.b64decode(source, validate=True)
    except ValueError:
        return False
    return True


def body_of(request):
    """Write a request of the handler's as JSON of the chat API; half a character goes as its escape."""
    if isinstance(request, dict):
        sources = request.get("images") or ([request["image"]] if "image" in request else [])
        # The handler takes bare base64, the API has an address for it.
        urls = [f"data:image;base64,{source}" if is_base64(source) else source for source in sources]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        if "text" in request:
            parts.append({"type": "text", "text": request["text"]})
        rest = {name: value for name, value in request.items() if name not in ("image", "images", "text")}
        request, more = [{"role": "user", "content": parts}], rest
    else:
        more = {}
    return json.dumps(
        {"model": str(MINIATURE), "messages": request, "max_tokens": NEW_TOKENS, "temperature": 0, **more}
    )


def post(server, body):
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + CHAT, content=body, headers=headers, timeout=300)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused(server, name):
    answer = post(server, body_of(hostile_request(name)))
    if name in VLLMS_OWN:
        assert answer.status_code == 200
    else:
        assert 400 <= answer.status_code < 500, answer.text[:500]
    if HOSTILE[name][1] in PICTURES:
        assert HOSTILE[name][1] in answer.text
    assert "Traceback" not in answer.text
    assert server.process.is_running()


def test_an_image_token_in_a_text_is_refused_beside_a_picture(client, server, asked):
    """A single one is where the picture goes; vLLM has it so for all models."""
    answer = ask(client, server, [user("And <image> this?", *asked[0].images)])
    assert answer.usage.prompt_tokens < 576
    with pytest.raises(openai.BadRequestError, match="placeholders"):
        ask(client, server, [user("And <image> or <image>?", *asked[0].images)])


def test_nothing_else_is_fetched(server):
    """Sound and video would be further ways to reach what this machine reaches."""
    for kind in ("video_url", "audio_url"):
        for url in ("http://127.0.0.1:1/x", "data:application/octet-stream;base64,AAAA"):
            parts = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "x"}]
            body = json.dumps({"model": str(MINIATURE), "messages": [{"role": "user", "content": parts}]})
            answer = post(server, body)
            assert 400 <= answer.status_code < 500, answer.text[:500]


def test_memory_is_flat_over_500_hostile_requests(client, server, asked):
    """16 at a time, with good requests among them: each gets its own answer, and the server neither ends nor grows."""
    hostile = {name: body_of(hostile_request(name)) for name in HOSTILE if name != "too many bytes"}
    draws = random.Random(0)
    chats = [[user(one.text, *one.images)] for one in asked]
    alone = [ask(client, server, chat).choices[0].message.content for chat in chats]

    def refused(name):
        status = post(server, hostile[name]).status_code
        return status == 200 if name in VLLMS_OWN else 400 <= status < 500

    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            good = [pool.submit(ask, client, server, chat) for chat in chats[:4]]
            assert all(pool.map(refused, draws.choices(sorted(hostile), k=100)))
            assert [answer.result().choices[0].message.content for answer in good] == alone[:4]
            sizes.append(server.resident_bytes())
    # The first hundred fill pools and caches.
    assert max(sizes[1:]) - sizes[0] < MUCH, sizes
