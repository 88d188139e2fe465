"""What a prompt and a decoding step launch: no loop over rows, no look at the device, no work of pruning per token."""

import functools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import modeling_ivtp
from tests.support.launches import Launched
from tests.support.tiny import prompt, tiny_model

OURS = str(Path(modeling_ivtp.__file__).parent)

LOOKS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy", "__contains__")
"""Methods of a tensor that its host has to wait for."""


def prepared(model, inputs, **options):
    """What `generate` hands to the model for a prompt, once it has read it."""
    return model.prepare_inputs_for_generation(**inputs, is_first_iteration=True, use_cache=True, **options)


def launched(model, **inputs):
    with torch.no_grad(), Launched() as counted:
        model(**inputs)
    return counted


@pytest.fixture
def model():
    tiny = tiny_model()
    tiny.model.instruction_cache.limit = 0
    return tiny


@pytest.mark.parametrize("rows", [[[3, "image", 7]] * 2, [[3, "image", 7], [2, "image", 5]]], ids=["whole", "padded"])
def test_a_prompt_launches_the_same_whatever_the_batch(model, rows):
    counts = [launched(model, **prepared(model, prompt(rows * times))).names for times in (1, 2, 8)]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].total() > 300


@pytest.mark.parametrize(
    "rows",
    [
        [[3, "image", 7]],
        [[3, "image", 7], [2, "image", 5]],
        [[3, "image", 7], [5], [2, "image", 4, "image", 3]],
    ],
    ids=["whole", "padded", "ragged"],
)
def test_no_step_of_a_prompt_waits(model, rows, monkeypatch):
    inputs = prepared(model, prompt(rows))
    assert looks(model, inputs, monkeypatch) == []
    # The control: without what was read ahead, the prompt reads it first.
    del inputs["prompt_index"]
    assert "tolist" in looks(model, inputs, monkeypatch)


def looks(model, inputs, monkeypatch):
    """What the host asks of tensors during a prompt."""
    asked = []
    with monkeypatch.context() as patch, torch.no_grad():
        for name in LOOKS:
            original = getattr(torch.Tensor, name)

            def looking(self, *args, name=name, original=original, **kwargs):
                asked.append(name)
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, looking)
        model(**inputs)
    return asked


def steps(model, inputs, new_tokens, monkeypatch):
    """What the decoding steps of an answer launch, one after the other."""
    counts = []
    original = type(model).forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        with Launched() as counted:
            result = original(self, *args, **kwargs)
        counts.append(counted.names)
        return result

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(model), "forward", forward)
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return counts[1:]


def test_a_step_launches_what_stock_launches(model, monkeypatch):
    inputs = prompt([[3, "image", 7], [4, "image", 6]])
    ours = steps(model, inputs, 5, monkeypatch)
    with model.pruning(enabled=False):
        stock = steps(model, inputs, 5, monkeypatch)
    assert len(ours) == len(stock) == 4
    # Stock looks whether anything is padded and makes positions; pruning knows, and launches nothing of its own.
    extra = {name: count - stock[-1][name] for name, count in ours[-1].items() if count > stock[-1][name]}
    assert not extra
    assert ours[0] == ours[-1]


def test_a_padded_step_makes_a_mask_for_every_length(model, monkeypatch):
    inputs = prompt([[3, "image", 7], [2, "image", 5]])
    whole = steps(model, prompt([[3, "image", 7], [4, "image", 6]]), 3, monkeypatch)
    padded = steps(model, inputs, 3, monkeypatch)
    assert padded[-1]["le"] == 3  # 9, 6 and 4 visual tokens
    assert whole[-1]["le"] == 0


def called(model, inputs, new_tokens):
    """How often each step of an answer calls which Python function, as (file, function)."""
    calls = []

    def begin(input_ids, scores, **kwargs):
        calls.append(Counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def note(frame, event, argument):
        if event == "call" and calls:
            calls[-1][frame.f_code.co_filename, frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=[begin])
    finally:
        sys.setprofile(None)
    return calls[:-1]


@pytest.mark.slow
def test_a_step_calls_one_function_of_ours_per_layer(model):
    calls = called(model, prompt([[3, "image", 7]]), 4)[-1]
    ours = {(Path(file).stem, name): count for (file, name), count in calls.items() if file.startswith(OURS)}
    layers = model.config.text_config.num_hidden_layers
    assert {name: count for name, count in ours.items() if count >= layers} == {
        ("pseudo_cls_attention", "forward"): layers
    }
    # The rest: masks for each of three lengths, and what is asked once.
    assert ours["language_ivtp", "_causal_mask"] == 3
    # transformers looks whether a published class still takes arguments of old: our forward has the answer ready.
    assert not [name for file, name in calls if name == "_signature_from_function"]
