"""What only a GPU can show: the same answers there, its kernels, caches and graphs, and that the host never waits."""

import functools

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from modeling_ivtp.model import diversity, fused_diversity
from modeling_ivtp.model.attention_maps import weighted_attention
from modeling_ivtp.model.cuda_graphs import Graphs
from modeling_ivtp.model.fused_attention import fused_weighted_attention, is_served
from tests.support.tiny import prompt, tiny_model

pytestmark = pytest.mark.gpu
ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]
EXTENDED = {"importance": "accumulated", "choice": "diverse"}


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("options", [{}, EXTENDED], ids=["ivtp", "extended"])
@torch.no_grad()
def test_logits_are_those_of_the_cpu(options):
    model, inputs = tiny_model(**options), prompt(ROWS)
    expected = model(**inputs).logits[:, -1]
    torch.testing.assert_close(model.cuda()(**on_gpu(inputs)).logits[:, -1].cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
def test_every_cache_gives_the_same_answer(cache):
    model, inputs = tiny_model().cuda(), on_gpu(prompt(ROWS))
    # transformers would compile the steps of an offloaded static cache, whose copies no graph can hold.
    options = {"disable_compile": True} if cache == "offloaded_static" else {}
    assert torch.equal(answer(model, inputs, cache_implementation=cache, **options), answer(model, inputs))


@torch.no_grad()
def test_flash_attention_gives_close_logits():
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    inputs = on_gpu(prompt(ROWS))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = tiny_model().cuda().bfloat16()(**inputs).logits[:, -1]
    flash = tiny_model(attention="flash_attention_2").cuda().bfloat16()(**inputs).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(flash.float(), expected.float()).min() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 16, 577, 577, 64), (3, 8, 2, 65, 130, 80), (1, 4, 4, 33, 7, 16)])
def test_the_kernel_is_weights_times_the_averaged_map(dtype, shape):
    batch, heads, kv_heads, queries, keys, width = shape
    draws = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(batch, queries, heads, width, generator=draws, device="cuda", dtype=dtype).transpose(1, 2)
    key = torch.randn(batch, keys, kv_heads, width, generator=draws, device="cuda", dtype=dtype).transpose(1, 2)
    weights = torch.rand(batch, queries, generator=draws, device="cuda")
    assert is_served(query, key)
    found = fused_weighted_attention(weights, query, key, width**-0.5)
    # The same numbers in float64 on the CPU.
    query, key = query.cpu().double(), key.cpu().double().repeat_interleave(heads // kv_heads, 1)
    attention = (query @ key.transpose(2, 3) * width**-0.5).softmax(-1).mean(1)
    expected = (weights.cpu().double()[:, None] @ attention)[:, 0]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(
        found, fused_weighted_attention(weights, *(x.cuda().to(dtype) for x in (query, key)), width**-0.5)
    )


def test_the_kernel_writes_no_map(monkeypatch):
    query = torch.randn(8, 16, 577, 64, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(8, 1, 577, device="cuda")

    def peak():
        weighted_attention(weights, query[:, :, None], query, 0.125)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weighted_attention(weights, query[:, :, None], query, 0.125)
        return torch.cuda.max_memory_allocated() - before

    one_map = 8 * 577 * 577 * 4
    assert peak() < one_map / 2
    monkeypatch.setattr("modeling_ivtp.model.attention_maps.is_served", lambda *_: False)
    assert peak() > 16 * one_map


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
@pytest.mark.parametrize("options", [{}, EXTENDED], ids=["ivtp", "extended"])
@torch.no_grad()
def test_a_prompt_is_run_without_waiting_for_the_gpu(rows, cache, options):
    model, inputs = tiny_model(**options).cuda(), on_gpu(prompt(rows))
    answer(model, inputs)  # what is allocated once is allocated
    generation = model.prepare_inputs_for_generation
    prompts = []

    def prepared(*args, **kwargs):
        prepared_inputs = generation(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            prompts.append(prepared_inputs)
            torch.cuda.set_sync_debug_mode("error")
        return prepared_inputs

    original = type(model).forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model.prepare_inputs_for_generation = prepared
    type(model).forward = forward
    try:
        answer(model, inputs, cache_implementation=cache)
    finally:
        type(model).forward = original
        torch.cuda.set_sync_debug_mode("default")
    assert len(prompts) == 1
    # The control: what the host has to know makes it wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [20, 576])
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_diverse_choices_are_those_of_the_cpu(tokens, kernels, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(3, tokens, 640, generator=draws) + torch.randn(640, generator=draws)
    weights = torch.rand(3, tokens, generator=draws, dtype=torch.float64)
    distance = torch.cdist(features, features)
    assert fused_diversity.is_served(weights[:, :, None].cuda())
    if not kernels:
        monkeypatch.setattr(diversity, "is_served", lambda _: False)
    for keep in (1, 16, tokens):
        for function, inputs in ((diversity.spanning, (features, weights, weights)), (diversity.farthest, (distance,))):
            assert torch.equal(function(*(tensor.cuda() for tensor in inputs), keep).cpu(), function(*inputs, keep))


@pytest.mark.parametrize("options", [{}, EXTENDED], ids=["ivtp", "extended"])
@pytest.mark.parametrize("asked", [False, True])
def test_replayed_prompts_give_the_same_answers(asked, options):
    model, plain = tiny_model(**options).cuda(), tiny_model(**options).cuda()
    plain.capture_prompts(0)
    if asked:
        model.capture_prompts()
    for length in (6, 7, 23):  # words of one and of four of CLIP's windows
        for rows in ([[3, "image", length]], [[3, "image", length], [2, "image", length - 1]]):
            for seed in range(4):
                inputs = on_gpu(prompt(rows, seed=seed))
                assert torch.equal(answer(model, inputs), answer(plain, inputs))
    # Images of one and two rows; prompts of one and two rows, filled up to 32 and 48 tokens.
    assert len(model.model.prompt_graphs.graphs) == 6
    assert len(plain.model.prompt_graphs.graphs) == 0


def test_streams_take_turns_with_a_graph():
    model, plain = tiny_model().cuda(), tiny_model().cuda()
    plain.capture_prompts(0)
    inputs = [on_gpu(prompt([[3, "image", 7]], seed=seed)) for seed in range(8)]
    expected = [plain(**batch, use_cache=True).logits[:, -1].detach() for batch in inputs]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    with torch.no_grad():
        for batch in inputs[:2]:
            model(**batch, use_cache=True)
        logits = []
        for number, batch in enumerate(inputs * 3):
            with torch.cuda.stream(streams[number % 4]):
                logits.append(model(**batch, use_cache=True).logits[:, -1])
    torch.cuda.synchronize()
    for found, right in zip(logits, expected * 3, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=0)
    assert len(model.model.prompt_graphs.graphs) == 2


def test_a_capture_that_fails_leaves_nothing_behind(caplog):
    graphs, module = Graphs(4), torch.nn.Linear(4, 4).cuda()
    before = torch.cuda.current_stream()

    def function(hidden):
        if torch.cuda.is_current_stream_capturing():
            hidden.sum().item()
        return [module(hidden)]

    hidden = torch.ones(2, 4, device="cuda")
    with torch.no_grad():
        outputs = [graphs.run(module, "it", function, {"hidden": hidden}) for _ in range(3)]
        assert outputs[0] is None
        torch.testing.assert_close(outputs[1][0], module(hidden))
        assert outputs[2] is None
    assert graphs.limit == 0
    assert "CUDA graphs are given up" in caplog.text
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()


def test_a_model_need_not_be_on_the_current_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, plain = tiny_model().to("cuda:1"), tiny_model()
    for seed in range(4):
        inputs = prompt([[3, "image", 7]], seed=seed)
        moved = {name: value.to("cuda:1") for name, value in inputs.items()}
        assert torch.equal(answer(model, moved).cpu(), answer(plain, inputs))
    assert len(model.model.prompt_graphs.graphs) == 2


def test_graphs_share_their_memory():
    model = tiny_model().cuda()
    with torch.no_grad():
        for length in range(8, 72, 8):
            for _ in range(2):
                model(**on_gpu(prompt([[4, "image", length]])), use_cache=True)
    graphs = model.model.prompt_graphs.graphs
    assert len(graphs) == 9
    needed = [graph.packing.nbytes for graph in graphs._captured.values()]
    held = sum(room.nbytes for memory in graphs._memory.values() for room in memory._rooms.values())
    assert held < 2 * max(needed) < sum(needed)


def test_cuda_graphs_of_prompt_and_decoding_give_the_same_answer():
    model, inputs = tiny_model().cuda(), on_gpu(prompt([[3, "image", 7], [4, "image", 6]]))
    others = on_gpu(prompt([[3, "image", 7], [4, "image", 6]], seed=5))
    expected = [answer(model, one) for one in (inputs, others)]
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    try:
        for _ in range(3):
            for one, right in zip((inputs, others), expected, strict=True):
                assert torch.equal(answer(model, one, cache_implementation="static"), right)
    finally:
        torch._dynamo.reset()
