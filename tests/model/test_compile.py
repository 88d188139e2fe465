"""Prompts and decoding steps as compiled graphs: one each at a fixed budget, with the same answers."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from modeling_ivtp import methods
from modeling_ivtp.model.compat import CACHE
from tests.support.tiny import prompt, tiny_model

ROWS = [[3, "image", 7], [4, "image", 6]]
PADDED = [[3, "image", 7], [2, "image", 5]]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)


def compiled(model, **options):
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager", **options)
    return model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, PADDED, [[3, "image", 7, "image", 4]]], ids=["whole", "padded", "two images"])
@pytest.mark.parametrize("kind", [None, DynamicCache, StaticCache])
@pytest.mark.parametrize("extended", [{}, {"importance": "accumulated", "choice": "diverse"}], ids=["ivtp", "extended"])
def test_a_prompt_is_one_graph(rows, kind, extended):
    model, inputs = tiny_model(**extended), prompt(rows)
    options = {} if kind is None else {"config": model.config.text_config}
    if kind is StaticCache:
        options["max_cache_len"] = 64
    caches = [None if kind is None else kind(**options) for _ in range(2)]
    expected = model(**inputs, use_cache=kind is not None, **{CACHE: caches[0]}).logits[:, -1]
    if kind is StaticCache:
        call = model.prepare_inputs_for_generation(
            **inputs, is_first_iteration=True, use_cache=True, **{CACHE: caches[1]}
        )
    else:
        call = inputs | {"use_cache": kind is not None, CACHE: caches[1]}
    found = compiled(model)(**call).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    if kind is not None:
        lengths = [[layer.keys.shape[2] for layer in cache.layers] for cache in caches]
        assert lengths[0] == lengths[1]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_answers_of_a_compiled_model(cache):
    model = tiny_model()
    batches = [prompt(rows, seed=seed) for rows in (ROWS, PADDED) for seed in (1, 2)]
    expected = [answer(model, inputs) for inputs in batches]
    compiled(model, dynamic=True if cache == "dynamic" else None)
    for _ in range(2):
        for inputs, right in zip(batches, expected, strict=True):
            assert torch.equal(answer(model, inputs, cache_implementation=cache), right)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_other_words_of_the_same_length_need_no_other_graph():
    model = compiled(tiny_model())
    answer(model, prompt(ROWS, seed=1), cache_implementation="static")
    answer(model, prompt(PADDED, seed=1), cache_implementation="static")
    graphs = counters["stats"]["unique_graphs"]
    # Words, places of the image and paddings differ; CLIP's windows are as many.
    for rows in (ROWS, ROWS[::-1], PADDED, PADDED[::-1], [[3, "image", 7], [1, "image", 6]]):
        for seed in (2, 3):
            answer(model, prompt(rows, seed=seed), cache_implementation="static")
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@torch.no_grad()
def test_a_row_with_too_few_image_tokens_fails_when_the_graph_runs():
    model, inputs = compiled(tiny_model()), prompt(ROWS)
    model(**inputs)
    ids = inputs["input_ids"].clone()
    ids[0, 4] = 5
    with pytest.raises(RuntimeError, match="Image features and image tokens do not match"):
        model(**inputs | {"input_ids": ids})


@torch.no_grad()
def test_what_cannot_be_one_graph_says_so():
    inputs = prompt([[3, "image", 7], [2, "image", 4, "image", 3]])
    with pytest.raises(Exception, match="as many images in every row"):
        compiled(tiny_model())(**inputs)


@pytest.mark.slow
@torch.no_grad()
def test_counts_that_depend_on_the_picture_cannot_be_one_graph():
    model, inputs = tiny_model(), prompt(ROWS)
    with methods.PruMergePlus(keep=4)(model), pytest.raises(Exception, match=r"(?i)fullgraph=False|data.dependent"):
        compiled(model)(**inputs)


def test_the_memory_of_a_static_cache_is_used_again():
    """Its addresses are in the graphs: another one would be captured for every answer."""
    model, inputs = tiny_model(), prompt(ROWS)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    first = answer(model, inputs, **{CACHE: cache})
    places = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    assert torch.equal(answer(model, inputs, **{CACHE: cache}), first)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    cache.reset()
    with model.pruning(visual_tokens=2):
        other = answer(model, inputs, **{CACHE: cache})
        assert torch.equal(other, answer(model, inputs))
    assert cache.layers[-1].max_cache_len == 64 - 16 + 2
