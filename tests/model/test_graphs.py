"""Replayed prompts: what is replayed gives the answers of what is run, and what cannot be replayed is run.

There is no GPU here: a stand-in for a CUDA graph computes again at each run, from the inputs and into the outputs that
it was captured with, which it overwrites as a graph does. `test_gpu.py` has the real ones.
"""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import create_autospec

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache

from modeling_ivtp import methods
from modeling_ivtp.model.cuda_graphs import Graphs, Packing, SharedMemory
from modeling_ivtp.model.prompt_graphs import MAX_GRAPHS, _asks_the_device
from modeling_ivtp.speed.captured_stock import captured
from modeling_ivtp.speed.models import stock_twin
from modeling_ivtp.speed.stopwatch import Stopwatch
from tests.support.tiny import prompt, tiny_model

ROWS = [[3, "image", 7], [4, "image", 6]]
PADDED = [[3, "image", 7], [2, "image", 6]]
OPTIONS = [
    {},
    {"positions": "compact"},
    {"pseudo_cls": "pool"},
    {"importance": "accumulated", "choice": "diverse"},
]


class Standin:
    """Overwrites its outputs at every run, as a CUDA graph does."""

    def __init__(self, function, inputs, packing, memory):
        self.function, self.inputs = function, {name: value.clone() for name, value in inputs.items()}
        self.packing, self.memory, self.runs = packing, memory, 0
        self.outputs = memory.room(packing.sizes, torch.device("cpu"))

    def run(self, inputs):
        self.runs += 1
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.packing.pack(self.function(**self.inputs), self.outputs)
        return self.packing.unpack({dtype: room.clone() for dtype, room in self.outputs.items()})


class StandinMemory(SharedMemory):
    def __init__(self):
        self._rooms = {}


class StandinGraphs(Graphs):
    capture, memory = Standin, StandinMemory

    def can_replay(self, inputs):
        return not torch.is_grad_enabled()

    @staticmethod
    def warm_up(function, inputs, memory):
        return function(**inputs)

    @staticmethod
    def has_room(work_bytes, device):
        return work_bytes < 2**20


class Baked(Standin):
    """Runs no Python, as a CUDA graph does not: only the operations that were launched when it was captured."""

    def __init__(self, function, inputs, packing, memory):
        output = {}

        def launched(*values):
            leaves, output["form"] = tree_flatten(function(**dict(zip(inputs, values, strict=True))))
            output["constants"] = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

        # Tracing fails, too, where a value is asked for.
        traced = make_fx(launched, _allow_non_fake_inputs=True)(*inputs.values())

        def replay(**values):
            tensors = iter(traced(*values.values()))
            leaves = [next(tensors) if constant is None else constant[0] for constant in output["constants"]]
            return tree_unflatten(leaves, output["form"])

        super().__init__(replay, inputs, packing, memory)


class BakedGraphs(StandinGraphs):
    capture = Baked


@pytest.fixture
def model():
    model = tiny_model()
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    return model


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


def replays(model):
    return sum(graph.runs for graph in model.model.prompt_graphs.graphs._captured.values())


def prompts_of(model):
    """The shapes of the captured prompts."""
    keys = [key for key in model.model.prompt_graphs.graphs._captured if key[0][0] == "prompt"]
    return [{name: tuple(shape) for name, shape, *_ in shapes} for *_, shapes in keys]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS, PADDED, [[2, "image", 4, "image", 3]]])
def test_answers_are_those_of_a_model_that_captures_nothing(model, rows):
    plain = tiny_model()
    for seed in range(4):
        inputs = prompt(rows, seed=seed)
        assert torch.equal(answer(model, inputs), answer(plain, inputs))
    # Images and prompts ran once, were captured at the second time, and replayed from then on.
    assert len(model.model.prompt_graphs.graphs) == 2
    assert replays(model) == 2 * 2


def test_a_model_that_is_timed_replays_nothing_and_replays_again_afterwards(model):
    """Inside a graph nothing can be timed."""
    inputs, watch = prompt(ROWS), Stopwatch()
    expected = [answer(model, inputs) for _ in range(3)][-1]
    before = replays(model)
    assert before == 2
    with watch.watching(model):
        assert torch.equal(answer(model, inputs), expected)
    assert replays(model) == before
    assert watch.selection > 0
    answer(model, inputs)
    assert replays(model) == before + 2


def test_other_shapes_are_captured_apart(model):
    for rows in (ROWS[:1], [[3, "image", 28]]):
        for seed in (1, 2):
            answer(model, prompt(rows, seed=seed))
    assert len(model.model.prompt_graphs.graphs) == 3  # images share one


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("after", [5, 6], ids=["whole", "padded"])
@torch.no_grad()
def test_prompts_of_many_lengths_share_a_graph(options, after):
    """With 16 patches and 4 tokens before them, prompts of 25 to 32 tokens are filled up to 32."""
    plain, model = tiny_model(**options), tiny_model(**options)
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    for length in range(5, 13):
        rows = [[4, "image", length], [length + after - 5 - 1, "image", 5]]
        inputs = prompt(rows, seed=length)
        ours, right = model(**inputs, use_cache=True), plain(**inputs, use_cache=True)
        torch.testing.assert_close(ours.logits[:, -1], right.logits[:, -1], atol=5e-5, rtol=0)
        assert ours.logits.shape == right.logits.shape
        for layer, other in zip(ours.past_key_values.layers, right.past_key_values.layers, strict=True):
            # A shorter row is filled up with any token.
            mask = other.cache_index.key_mask
            present = torch.ones_like(other.keys[:, 0, :, 0]).bool() if mask is None else mask.bool()
            for found, expected in ((layer.keys, other.keys), (layer.values, other.values)):
                torch.testing.assert_close(
                    found.transpose(1, 2)[present], expected.transpose(1, 2)[present], atol=5e-5, rtol=0
                )
            for name in ("stored", "dropped", "croppable"):
                assert getattr(layer.cache_index, name) == getattr(other.cache_index, name)
            if mask is not None:
                assert torch.equal(layer.cache_index.key_mask, mask)
        assert torch.equal(answer(model, inputs), answer(plain, inputs))
    assert {lengths["input_ids"] for lengths in prompts_of(model)} == {(2, 32)}
    assert replays(model) >= 20


def test_a_prompt_that_ends_on_an_image_keeps_its_length(model):
    plain = tiny_model()
    for seed in range(3):
        inputs = prompt([[3, "image"]], seed=seed)
        assert torch.equal(answer(model, inputs), answer(plain, inputs))
    assert [lengths["input_ids"] for lengths in prompts_of(model)] == [(1, 19)]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_was_launched_once_serves_all_prompts_of_its_shapes(options):
    plain, model = tiny_model(**options), tiny_model(**options)
    model.model.prompt_graphs.graphs = BakedGraphs(8)
    kinds = [
        [[3, "image", 7]],
        [[3, "image", 9]],
        [[4, "image", 7], [2, "image", 6]],
        [[2, "image", 9], [4, "image", 5]],
        [[2, "image", 4, "image", 3]],
        [[6, "image", 2, "image", 1]],
        [[3, "image"]],
    ]
    for rows in kinds * 2:
        for seed in range(2):
            inputs = prompt(rows, seed=seed)
            assert torch.equal(answer(model, inputs), answer(plain, inputs))
    assert replays(model) > 2 * len(kinds)


@torch.no_grad()
def test_a_prompt_is_not_filled_up_beyond_a_window():
    model = tiny_model("mistral")
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    model.config.text_config.sliding_window = 26
    for seed in range(3):
        model(**prompt([[3, "image", 7]], seed=seed), use_cache=True)
    assert [lengths["input_ids"] for lengths in prompts_of(model)] == [(1, 26)]


@torch.no_grad()
def test_a_cache_is_its_owners(model):
    """The next prompt overwrites what the graph put out; an answer that goes on later must not see that."""
    plain, inputs = tiny_model(), [prompt(ROWS[:1], seed=seed) for seed in range(4)]
    outputs = [model(**batch, use_cache=True) for batch in inputs]
    expected = [plain(**batch, use_cache=True) for batch in inputs]
    step = torch.tensor([[9]])
    for ours, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours.logits[:, -1], right.logits[:, -1], atol=1e-5, rtol=0)
        for layer, other in zip(ours.past_key_values.layers, right.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-5, rtol=0)
            assert layer.cache_index.dropped == other.cache_index.dropped
            assert layer.cache_index.croppable == other.cache_index.croppable
        logits = [
            llava(input_ids=step, past_key_values=output.past_key_values).logits
            for llava, output in ((model, ours), (plain, right))
        ]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_a_conversation_goes_on(model):
    plain = tiny_model()
    for seed in range(3):
        first, turn = prompt(ROWS[:1], seed=seed), prompt([[2, "image", 6]], seed=10 + seed)
        answers = []
        for llava in (model, plain):
            cache = DynamicCache(config=llava.config.text_config)
            before = answer(llava, first, past_key_values=cache)
            ids = torch.cat([before, turn["input_ids"]], 1)
            spans = torch.nn.functional.pad(turn["clip_spans"], (0, 0, before.shape[1], 0))
            conversation = turn | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "clip_spans": spans}
            answers.append(answer(llava, conversation, past_key_values=cache))
        assert torch.equal(*answers)


@torch.no_grad()
def test_options_are_part_of_a_graphs_key(model):
    inputs, plain = prompt(ROWS), tiny_model()
    for _ in range(3):
        for budget in (4, 2):
            with model.pruning(visual_tokens=budget), plain.pruning(visual_tokens=budget):
                assert torch.equal(answer(model, inputs), answer(plain, inputs))
    assert len(model.model.prompt_graphs.graphs) == 4


@pytest.mark.slow
def test_what_cannot_be_replayed_is_run(model):
    plain, ragged = tiny_model(), prompt([[3, "image", 7], [5], [2, "image", 4, "image", 3]])
    for _ in range(3):
        assert torch.equal(answer(model, ragged), answer(plain, ragged))
    before = replays(model)
    inputs = prompt(ROWS)
    for _ in range(3):
        with methods.FastV(keep=4)(model), methods.FastV(keep=4)(plain):
            assert torch.equal(answer(model, inputs), answer(plain, inputs))
        assert torch.equal(answer(model, inputs, use_cache=False), answer(plain, inputs))
        assert torch.equal(
            answer(model, inputs, cache_implementation="static"), answer(plain, inputs, cache_implementation="static")
        )
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not prompts_of(model)
    assert replays(model) > before  # the images, of the calls without a cache


def test_hidden_states_are_run(model):
    inputs = prompt(ROWS[:1])
    for _ in range(3):
        out = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        assert len(out.hidden_states[0]) == 7
    assert not prompts_of(model)


def test_proposals_are_taken_back(model):
    """Assisted decoding crops the cache that a graph filled."""
    plain, inputs = tiny_model(), prompt(ROWS[:1])
    for _ in range(3):
        assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3), answer(plain, inputs))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double().float(),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    ],
)
def test_graphs_are_dropped_when_weights_change(model, change):
    for _ in range(2):
        answer(model, prompt(ROWS))
    assert len(model.model.prompt_graphs.graphs) == 2
    held = [parameter.data for parameter in model.parameters()]  # so that no address is used again
    change(model)
    plain = tiny_model()
    assert torch.equal(answer(model, prompt(ROWS)), answer(plain, prompt(ROWS)))
    assert replays(model) == 0
    assert held


def test_the_last_graphs_are_kept(model):
    model.model.prompt_graphs.graphs.limit = 3
    for length in range(1, 41, 8):
        for _ in range(2):
            answer(model, prompt([[3, "image", length]]))
    assert len(model.model.prompt_graphs.graphs) == 3


def test_a_copy_captures_for_itself(model):
    for _ in range(2):
        answer(model, prompt(ROWS))
    copied = copy.deepcopy(model)
    assert len(copied.model.prompt_graphs.graphs) == 0
    assert copied.model.prompt_graphs.graphs.limit == 8
    assert len(pickle.loads(pickle.dumps(Graphs(5)))) == 0


def test_a_failed_capture_is_reported_and_given_up(model, caplog):
    class Failing(StandinGraphs):
        def capture(self, *args):
            raise RuntimeError("operation not permitted when stream is capturing")

    model.model.prompt_graphs.graphs, plain = Failing(8), tiny_model()
    for seed in range(3):
        assert torch.equal(answer(model, prompt(ROWS, seed=seed)), answer(plain, prompt(ROWS, seed=seed)))
    assert caplog.text.count("CUDA graphs are given up") == 1


@pytest.mark.parametrize("limit", [-1, 1.5, True, "all"])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match=r"limit=.*allowed"):
        tiny_model().capture_prompts(limit)


def test_without_a_gpu_it_says_so():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"whole model on one GPU; it is on cpu"):
        model.capture_prompts()
    model.capture_prompts(0)
    assert model.model.prompt_graphs.graphs.limit == 0
    # The way back is open everywhere: such a model looks for itself whether it can.
    model.capture_prompts(automatic=True)
    untouched = tiny_model().model.prompt_graphs.graphs
    assert (model.model.prompt_graphs.graphs.limit, model.model.prompt_graphs.graphs.automatic) == (
        untouched.limit,
        untouched.automatic,
    )


def test_the_replayed_baseline_is_stock_llava():
    model = tiny_model()
    twin, graphs = stock_twin(model), StandinGraphs(8)
    replayed = captured(stock_twin(model), graphs)
    for seed in range(3):
        inputs = {name: value for name, value in prompt(ROWS, seed=seed).items() if not name.startswith("clip_")}
        assert torch.equal(answer(replayed, inputs), answer(twin, inputs))
    assert sum(graph.runs for graph in graphs._captured.values()) == 2


@pytest.mark.slow
def test_threads_get_their_own_answers(model):
    plain = tiny_model()
    inputs = [prompt(ROWS[:1], seed=seed) for seed in range(12)]
    expected = [answer(plain, batch) for batch in inputs]
    for batch in inputs[:2]:
        answer(model, batch)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda batch: answer(model, batch), inputs * 2))
    assert all(torch.equal(*pair) for pair in zip(answers, expected * 2, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.language_model.double().float(),
        lambda inner: inner.vision_tower.load_state_dict(copy.deepcopy(inner.vision_tower.state_dict()), assign=True),
        lambda inner: inner.set_input_embeddings(copy.deepcopy(inner.get_input_embeddings())),
        lambda inner: setattr(inner, "visual_projection", copy.deepcopy(inner.visual_projection)),
        lambda inner: setattr(inner.language_model.norm.weight, "data", inner.language_model.norm.weight.data.clone()),
    ],
    ids=["cast", "loaded", "embeddings", "module", "data"],
)
def test_a_part_with_other_weights_is_not_replayed(model, change):
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    before = replays(model)
    assert before > 0
    inner = model.model
    held = [parameter.data for parameter in inner.parameters()]  # so that no address is used again
    change(inner)
    assert torch.equal(answer(model, prompt(ROWS, seed=5)), answer(tiny_model(), prompt(ROWS, seed=5)))
    assert replays(model) == 0
    assert held


def test_another_attention_is_captured_apart(model):
    inputs = prompt(ROWS)
    for _ in range(2):
        answer(model, inputs)
    model.set_attn_implementation("eager")
    answer(model, inputs)
    assert len(model.model.prompt_graphs.graphs) == 2
    answer(model, inputs)
    assert len(model.model.prompt_graphs.graphs) == 4


def test_other_kernels_are_captured_apart(model):
    inputs = prompt(ROWS)
    for _ in range(2):
        answer(model, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        answer(model, inputs)
        assert (len(model.model.prompt_graphs.graphs), replays(model)) == (2, 0)
        answer(model, inputs)
    assert len(model.model.prompt_graphs.graphs) == 4


@torch.no_grad()
def test_a_mask_may_speak_of_tokens_to_come(model):
    inputs, plain = prompt(PADDED), tiny_model()
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    for _ in range(3):
        found = model(**inputs, use_cache=True).logits[:, -1]
        torch.testing.assert_close(found, plain(**inputs, use_cache=True).logits[:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_the_configuration_asks_for_is_run(model):
    model.config.text_config.output_hidden_states = True
    for _ in range(3):
        assert len(model(**prompt(ROWS), use_cache=True).hidden_states) == 7


@torch.no_grad()
def test_an_offloaded_cache_is_filled_by_running(model, monkeypatch):
    """There is no GPU to prefetch to, so that its first layer is as far as a prompt gets."""

    class Filled(Exception):
        pass

    update = DynamicCache.update

    def stop_at_an_offloaded_one(self, *args, **kwargs):
        if self.offloading:
            raise Filled
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", stop_at_an_offloaded_one)
    for _ in range(3):
        cache = DynamicCache(config=model.config.text_config)
        cache.offloading = True
        with pytest.raises(Filled):
            model(**prompt(ROWS), past_key_values=cache)
    assert not prompts_of(model)


def test_with_a_hook_nothing_is_replayed(model):
    plain, seen = tiny_model(), []
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    before = replays(model)
    hook = model.model.language_model.layers[2].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(answer(model, prompt(ROWS)), answer(plain, prompt(ROWS)))
    assert seen
    assert replays(model) == before
    hook.remove()
    answer(model, prompt(ROWS))
    assert replays(model) == before + 2


def test_hooks_that_transformers_leaves_behind_are_idle(model):
    inputs = prompt(ROWS)
    with model.pruning(enabled=False):
        answer(model, inputs)  # stock LLaVA takes the features from hidden states, which hooks collect
    assert any(module._forward_hooks for module in model.modules())
    for _ in range(3):
        answer(model, inputs)
    assert replays(model) == 2


def test_inference_mode_and_no_grad_take_turns(model):
    plain = tiny_model()
    for seed in range(6):
        inputs = prompt(ROWS, seed=seed)
        with torch.inference_mode() if seed % 2 else torch.no_grad():
            found = model(**inputs, use_cache=True).logits[:, -1]
            torch.testing.assert_close(found, plain(**inputs, use_cache=True).logits[:, -1], atol=1e-5, rtol=0)
    assert replays(model) == 4


def test_a_hook_that_was_there_first_refuses_nothing_for_good(model):
    hook = model.model.vision_tower.register_forward_hook(lambda *_: None)
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    assert len(model.model.prompt_graphs.graphs) == 0
    hook.remove()
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    assert replays(model) > 0


@pytest.mark.slow
def test_a_forward_that_was_replaced_is_called(model):
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    before, layer = replays(model), model.model.language_model.layers[2]
    original = layer.forward
    layer.forward = lambda hidden, **kwargs: 2 * original(hidden, **kwargs)
    plain = tiny_model()
    patched = plain.model.language_model.layers[2]
    stock = patched.forward
    patched.forward = lambda hidden, **kwargs: 2 * stock(hidden, **kwargs)
    assert torch.equal(answer(model, prompt(ROWS)), answer(plain, prompt(ROWS)))
    assert replays(model) == before
    del layer.forward
    answer(model, prompt(ROWS))
    assert replays(model) == before + 2


@torch.no_grad()
def test_a_text_tower_that_joins_is_asked():
    whole, model = tiny_model(), tiny_model(clip=False)
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    inputs = prompt(ROWS)
    bare = {name: value for name, value in inputs.items() if not name.startswith("clip_")}
    for _ in range(3):
        model(**bare, use_cache=True)
    before = replays(model)
    model.model.clip_text_model = copy.deepcopy(whole.model.clip_text_model)
    model.model.visual_projection = copy.deepcopy(whole.model.visual_projection)
    model.config.clip_text_config = whole.config.clip_text_config
    for _ in range(3):
        found = model(**inputs, use_cache=True).logits[:, -1]
        torch.testing.assert_close(found, whole(**inputs, use_cache=True).logits[:, -1], atol=1e-5, rtol=0)
    assert before == 2
    assert len(model.model.prompt_graphs.graphs) == 2  # earlier graphs were dropped


def test_a_bias_that_joins_is_read(model):
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32))
    answer(model, prompt(ROWS))
    assert replays(model) == 0


def test_training_mode_is_run():
    """With gradient checkpointing a decoder leaves out the cache there."""
    model = tiny_model().train()
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    model.gradient_checkpointing_enable()
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    assert len(model.model.prompt_graphs.graphs) == 0


@pytest.mark.parametrize("change", [lambda model: model.half().float(), lambda model: model.to("cpu")])
def test_a_model_that_is_moved_or_cast_drops_its_graphs(model, change):
    for seed in range(3):
        answer(model, prompt(ROWS, seed=seed))
    assert len(model.model.prompt_graphs.graphs) == 2
    change(model)
    assert len(model.model.prompt_graphs.graphs) == 0
    assert not model.model.prompt_graphs.graphs._memory


@pytest.mark.slow
def test_a_model_is_freed_without_a_search_for_cycles():
    model = tiny_model()
    model.model.prompt_graphs.graphs = StandinGraphs(8)
    model.model.prompt_graphs.graphs.capture = lambda *args: Packing(
        []
    )  # a stand-in holds the function, which a graph does not
    for seed in range(2):
        answer(model, prompt(ROWS, seed=seed))
    assert len(model.model.prompt_graphs.graphs) == 2
    weight = weakref.ref(model.model.language_model.layers[0].mlp.down_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_more_shapes_than_are_kept_are_captured_ever_less(model):
    model.model.prompt_graphs.graphs.limit = 2
    captured = []
    original = StandinGraphs.capture
    model.model.prompt_graphs.graphs.capture = lambda *args: captured.append(1) or original(*args)
    rounds = []
    for _ in range(8):
        for length in (4, 12, 20, 28):
            answer(model, prompt([[3, "image", length]]))
        rounds.append(len(captured))
    assert rounds[-1] - rounds[-4] <= 2
    assert model.model.prompt_graphs.graphs._sightings > 2


def test_rotary_embeddings_that_look_at_the_length_are_run(model):
    text = model.config.text_config
    for name in ("dynamic", "longrope"):
        text.rope_parameters = {**text.rope_parameters, "rope_type": name}
        for _ in range(3):
            answer(model, prompt(ROWS))
        assert not prompts_of(model)


def test_padding_under_flash_attention_is_run():
    text = tiny_model().config.text_config
    mask = torch.ones(1, 4)
    for attention, padded, whole in (
        ("sdpa", False, False),
        ("eager", False, False),
        ("flash_attention_2", True, False),
    ):
        text._attn_implementation = attention
        assert _asks_the_device(text, mask) == padded
        assert _asks_the_device(text, None) == whole


def test_an_error_in_the_work_is_the_callers(model):
    """It is raised as without graphs, and other prompts are replayed as ever."""
    good, bad = prompt(ROWS), prompt(ROWS)
    bad["input_ids"] = bad["input_ids"].clone()
    bad["input_ids"][0, -1] = 10_000
    for _ in range(3):
        with pytest.raises(IndexError), torch.no_grad():
            model(**bad, use_cache=True)
        answer(model, good)
    assert model.model.prompt_graphs.graphs.limit == 8
    assert prompts_of(model)


@pytest.fixture
def unasked():
    model = tiny_model()
    model.model.prompt_graphs.graphs = StandinGraphs(8, automatic=True)
    return model


def test_unasked_small_work_is_replayed(unasked):
    plain = tiny_model()
    for seed in range(3):
        assert torch.equal(answer(unasked, prompt(ROWS, seed=seed)), answer(plain, prompt(ROWS, seed=seed)))
    assert replays(unasked) == 2


def test_unasked_large_outputs_are_not(unasked, monkeypatch):
    asked = []
    monkeypatch.setattr(
        StandinGraphs,
        "has_room",
        staticmethod(lambda work_bytes, device: asked.append(work_bytes) or work_bytes < 2**16),
    )
    plain = tiny_model()
    for seed in range(4):
        assert torch.equal(answer(unasked, prompt(ROWS, seed=seed)), answer(plain, prompt(ROWS, seed=seed)))
    assert not prompts_of(unasked)
    assert replays(unasked) == 2  # the images
    unasked.model.prompt_graphs.graphs.automatic = False
    unasked.model.prompt_graphs.graphs.forget()
    for seed in range(4):
        answer(unasked, prompt(ROWS, seed=seed))
    assert prompts_of(unasked)
    # What it was said to take is what it puts out and some more.
    images, prompts = (graph.packing.nbytes for graph in unasked.model.prompt_graphs.graphs._captured.values())
    assert images < asked[0]
    assert prompts < asked[1] < 4 * prompts


class Doubling(torch.nn.Linear):
    """A layer of another library, with a switch."""

    doubled = False

    def forward(self, hidden):
        return super().forward(hidden) * (2 if self.doubled else 1)


def test_unasked_layers_of_other_libraries_are_not(unasked):
    layer = unasked.model.language_model.layers[3].mlp.down_proj
    layer.__class__ = Doubling
    for _ in range(3):
        before = answer(unasked, prompt(ROWS))
    assert len(unasked.model.prompt_graphs.graphs) == 0
    layer.doubled = True
    assert not torch.equal(answer(unasked, prompt(ROWS)), before)


def test_unasked_integer_weights_are_not(unasked):
    unasked.model.language_model.register_parameter(
        "codes", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    )
    for _ in range(3):
        answer(unasked, prompt(ROWS))
    assert len(unasked.model.prompt_graphs.graphs) == 0


def test_a_model_replays_unasked():
    graphs = tiny_model().model.prompt_graphs.graphs
    assert (graphs.automatic, graphs.limit) == (True, MAX_GRAPHS)
    copied = pickle.loads(pickle.dumps(graphs))
    assert (copied.automatic, copied.limit) == (True, MAX_GRAPHS)


def test_outputs_are_packed_and_unpacked():
    draws = torch.Generator().manual_seed(0)
    outputs = {
        "odd": torch.randn(3, 5, generator=draws),
        "turned": torch.randn(4, 6, generator=draws).T,
        "none": None,
        "more": [torch.arange(7), (torch.randn(8, 2, generator=draws), 5)],
        "few": torch.zeros(0, 4, dtype=torch.bool),
        "scalar": torch.tensor(2.5),
    }
    packing = Packing(outputs)
    assert packing.nbytes == 4 * (15 + 24 + 16 + 1) + 8 * 7
    memory = {dtype: torch.empty(size + 3, dtype=dtype)[:size] for dtype, size in packing.sizes.items()}
    packing.pack(outputs, memory)
    found = packing.unpack(memory)
    assert found["none"] is None
    assert found["more"][1][1] == 5
    pairs = [(found[name], outputs[name]) for name in ("odd", "turned", "few", "scalar")]
    pairs += [(found["more"][0], outputs["more"][0]), (found["more"][1][0], outputs["more"][1][0])]
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    # A tensor of a multiple of 16 bytes starts at such a multiple.
    assert (found["turned"].data_ptr() - memory[torch.float32].data_ptr()) % 16 == 0
    assert (found["more"][1][0].data_ptr() - memory[torch.float32].data_ptr()) % 16 == 0


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's objects as PyTorch has them, doing nothing: what is called is called as their signatures say."""
    for name in ("Stream", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    for name in ("graph_pool_handle", "current_stream", "stream", "set_stream", "memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    torch.cuda.memory_reserved.return_value = torch.cuda.memory_allocated.return_value = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", create_autospec(torch.cuda.mem_get_info))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return torch.cuda


@torch.no_grad()
def test_a_capture_calls_cuda_as_it_is(cuda):
    graphs, module, hidden = Graphs(2, automatic=True), torch.nn.Linear(4, 4), torch.ones(2, 4)
    cuda.mem_get_info.return_value = (2**20, 2**20)

    def function(hidden):
        return {"out": module(hidden), "none": None}

    outputs = [graphs.run(module, "it", function, {"hidden": hidden}, work_bytes=64) for _ in range(4)]
    assert outputs[0] is None
    assert all(torch.equal(output["out"], module(hidden)) for output in outputs[1:])
    assert cuda.graph.call_args.kwargs["capture_error_mode"] == "thread_local"
    (captured,) = graphs._captured.values()
    assert captured.graph.replay.call_count == captured.runs == 2


@pytest.mark.parametrize(("free", "total"), [(2**20, 4095), (511, 2**20)])
@torch.no_grad()
def test_unasked_work_that_is_large_beside_a_gpu_is_not_captured(cuda, free, total):
    graphs, module, hidden = Graphs(2, automatic=True), torch.nn.Linear(4, 4), torch.ones(2, 4)
    cuda.mem_get_info.return_value = (free, total)
    outputs = [graphs.run(module, "it", lambda hidden: [module(hidden)], {"hidden": hidden}, 64) for _ in range(3)]
    assert outputs[0] is outputs[2] is None
    assert not cuda.graph.called
    graphs.automatic = False
    graphs.forget()
    for _ in range(2):
        graphs.run(module, "it", lambda hidden: [module(hidden)], {"hidden": hidden}, 64)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_capture_that_fails_gives_the_stream_back(cuda, caplog):
    graphs, module, hidden = Graphs(2), torch.nn.Linear(4, 4), torch.ones(2, 4)
    cuda.graph.side_effect = RuntimeError("operation not permitted when stream is capturing")
    outputs = [graphs.run(module, "it", lambda hidden: [module(hidden)], {"hidden": hidden}) for _ in range(2)]
    assert torch.equal(outputs[1][0], module(hidden))
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)
    assert "CUDA graphs are given up" in caplog.text
    assert graphs.limit == 0


@pytest.mark.slow
def test_memory_that_runs_out_refuses_one_prompt(model, caplog):
    class Full(StandinGraphs):
        def capture(self, function, inputs, packing, memory):
            if inputs.get("input_ids") is not None and inputs["input_ids"].shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Standin(function, inputs, packing, memory)

    model.model.prompt_graphs.graphs, plain = Full(8), tiny_model()
    for seed in range(3):
        for rows in (ROWS, ROWS[:1]):
            inputs = prompt(rows, seed=seed)
            assert torch.equal(answer(model, inputs), answer(plain, inputs))
    assert caplog.text.count("not captured as a CUDA graph") == 1
    assert len(model.model.prompt_graphs.graphs) == 3  # both batches' images, and the prompts of one row
