"""Conversations as a person has them: the processor writes the prompt, `generate` answers, the cache goes on."""

import copy

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, StaticCache

from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for

FIRST = "USER: <image>\nWhat colour is the cat? ASSISTANT:"
SECOND = " USER: <image>\nIs there a cup on the table? ASSISTANT:"
TEXT = " USER: And the dog? ASSISTANT:"


@pytest.fixture(scope="module")
def loaded():
    processor = make_processor(size=56)
    pictures = [Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, y), 40).convert("RGB") for y in (1.5, 1.1)]
    return model_for(processor, relevance_threshold=0.0), processor, pictures


def answer_first(loaded, cache):
    model, processor, pictures = loaded
    inputs = processor(images=pictures[0], text=FIRST, return_tensors="pt")
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)


def conversation(loaded, answered, tail, pictures):
    """The whole conversation through the processor, with the answer's own tokens in it."""
    _, processor, _ = loaded
    later = processor(images=pictures or None, text=tail, return_tensors="pt")
    start = int(later["input_ids"][0, 0] == processor.tokenizer.bos_token_id)
    later = {name: later[name][:, start:] if later[name].shape[1] == later["input_ids"].shape[1] else later[name]
             for name in later}  # fmt: skip
    ids = torch.cat([answered, later["input_ids"]], 1)
    return later, later | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def key_words(model, processor, inputs, cache):
    image = model.explain(processor=processor, past_key_values=cache, **inputs).images[0]
    return [token.text for token in image.tokens]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_spans_of_the_new_words_alone_stay_with_their_words(loaded, kind):
    model, _, pictures = loaded
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=200)
    answered = answer_first(loaded, cache)
    _, whole = conversation(loaded, answered, SECOND, pictures[1:])
    padded = torch.nn.functional.pad(whole["clip_spans"], (0, 0, answered.shape[1], 0))
    expected = model.generate(
        **whole | {"clip_spans": padded}, past_key_values=copy.deepcopy(cache), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(model.generate(**whole, past_key_values=cache, max_new_tokens=6, do_sample=False), expected)


def test_the_words_of_the_turn_are_the_ones_that_count(loaded):
    model, processor, pictures = loaded
    cache = DynamicCache()
    answered = answer_first(loaded, cache)
    later, _ = conversation(loaded, answered, SECOND, pictures[1:])
    new = later | {"input_ids": torch.cat([answered[:, -1:], later["input_ids"]], 1)}
    new.pop("attention_mask")
    words = "".join(key_words(model, processor, new, cache)).replace("\u2581", " ").strip()
    assert words == "Is there a cup on the table?"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_whole_conversation_with_all_its_images_goes_on_from_the_cache(loaded, beams):
    model, _, pictures = loaded
    cache = DynamicCache()
    answered = answer_first(loaded, cache)
    _, whole = conversation(loaded, answered, SECOND, pictures[1:])
    first = loaded[1](images=pictures[0], text=FIRST, return_tensors="pt")
    both = torch.cat([first["pixel_values"], whole["pixel_values"]])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    expected = model.generate(**whole, past_key_values=copy.deepcopy(cache), **options)
    assert torch.equal(
        model.generate(**whole | {"pixel_values": both}, past_key_values=copy.deepcopy(cache), **options), expected
    )
    # A text turn on the same conversation may bring the images along, too.
    _, text = conversation(loaded, answered, TEXT, [])
    without = model.generate(**text, past_key_values=copy.deepcopy(cache), **options)
    text["pixel_values"] = first["pixel_values"]
    assert torch.equal(model.generate(**text, past_key_values=copy.deepcopy(cache), **options), without)


@pytest.mark.slow
def test_explaining_a_later_turn_leaves_its_cache_and_counts_the_whole(loaded):
    model, processor, pictures = loaded
    cache = DynamicCache()
    answered = answer_first(loaded, cache)
    length = cache.get_seq_length()
    later, _ = conversation(loaded, answered, SECOND, pictures[1:])
    later.pop("attention_mask")
    trace = model.explain(processor=processor, past_key_values=cache, **later)
    assert cache.get_seq_length() == length
    assert 0 < trace.kv_bytes_saved < trace.kv_bytes_unpruned
    assert trace.kv_bytes_unpruned == 6 * 2 * 2 * 8 * 4 * (length + later["input_ids"].shape[1])


@pytest.mark.parametrize("all_pictures", [True, False])
def test_a_conversation_is_explained_as_generate_takes_it(loaded, all_pictures):
    model, processor, pictures = loaded
    cache = DynamicCache()
    answered = answer_first(loaded, cache)
    later, whole = conversation(loaded, answered, SECOND, pictures[1:])
    new = later | {"input_ids": whole["input_ids"][:, cache.get_seq_length() :], "attention_mask": None}
    expected = model.explain(processor=processor, past_key_values=cache, **new)
    if all_pictures:
        first = processor(images=pictures[0], text=FIRST, return_tensors="pt")
        whole["pixel_values"] = torch.cat([first["pixel_values"], whole["pixel_values"]])
    trace = model.explain(processor=processor, past_key_values=cache, **whole)
    assert trace.to_dict() == expected.to_dict()
    assert trace.kv_bytes_unpruned == 6 * 2 * 2 * 8 * 4 * whole["input_ids"].shape[1]


def test_a_static_cache_counts_as_what_it_holds(loaded):
    model, processor, pictures = loaded
    inputs = processor(images=pictures[0], text=FIRST, return_tensors="pt")
    static = StaticCache(config=model.config.text_config, max_cache_len=200)
    trace, expected = model.explain(**inputs, past_key_values=static), model.explain(**inputs)
    assert (trace.kv_bytes, trace.kv_bytes_unpruned) == (expected.kv_bytes, expected.kv_bytes_unpruned)
    assert trace.kv_bytes_saved > 0
