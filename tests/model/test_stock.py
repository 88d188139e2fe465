"""With pruning off the model is stock LLaVA: the same numbers, by the same operations."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.support.tiny import image_features, prompt, rows_alone, tiny_model

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]


def stock_twin(model, attention="sdpa"):
    """Stock LLaVA with the same weights."""
    options = {
        k: v for k, v in model.config.to_dict().items() if k not in ("pruning", "clip_text_config", "model_type")
    }
    stock = LlavaForConditionalGeneration._from_config(LlavaConfig(**options), attn_implementation=attention).eval()
    ours = {name for name in model.state_dict() if "clip_text_model" in name or "visual_projection" in name}
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if name not in ours}, strict=True)
    stock.generation_config = model.generation_config
    return stock


def without_clip(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("clip")}


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **kwargs or {})


OFF = {
    "off": {"enabled": False},
    "budget of all": {"visual_tokens": 16, "tower_tokens": None},
    "above": {"visual_tokens": 99, "tower_tokens": None},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("off", OFF)
@torch.no_grad()
def test_logits_are_bit_equal_to_stock(off, attention):
    model = tiny_model(attention=attention, **OFF[off])
    stock = stock_twin(model, attention)
    inputs = prompt(ROWS)
    ours, theirs = model(**inputs), stock(**without_clip(inputs))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(image_features(ours), image_features(theirs))
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert type(mine) is type(other)
        assert torch.equal(mine.keys, other.keys)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_bit_equal_to_stock(cache):
    model = tiny_model(enabled=False)
    stock = stock_twin(model)
    (inputs,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = model.generate(**inputs, **options), stock.generate(**without_clip(inputs), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@torch.no_grad()
def test_pruning_off_costs_not_one_operation():
    model = tiny_model(enabled=False)
    stock = stock_twin(model)
    (inputs,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    counts = []
    for each, batch in ((model, inputs), (stock, without_clip(inputs))):
        with Operations() as operations:
            past = each(**batch).past_key_values
            for token in range(3):
                each(input_ids=torch.tensor([[token + 5]]), past_key_values=past)
        counts.append(operations.count)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 100


@torch.no_grad()
def test_a_decoding_step_behind_a_pruned_prompt_costs_no_more_operations_than_stock():
    model = tiny_model()
    stock = stock_twin(model)
    (inputs,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    counts = []
    for each, batch in ((model, inputs), (stock, without_clip(inputs))):
        past = each(**batch).past_key_values
        with Operations() as operations:
            each(input_ids=torch.tensor([[5]]), past_key_values=past)
        counts.append(sum(operations.count.values()))
    assert counts[0] <= counts[1]


@torch.no_grad()
def test_with_pruning_on_the_logits_differ():
    model = tiny_model()
    inputs = prompt(ROWS)
    assert (model(**inputs).logits[:, -1] - stock_twin(model)(**without_clip(inputs)).logits[:, -1]).abs().max() > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_no_attention_map_is_asked_for():
    model = tiny_model(attention="sdpa")
    asked = []
    hook = lambda module, args, kwargs: asked.append(kwargs.get("output_attentions"))  # noqa: E731
    for module in model.modules():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    model(**prompt(ROWS))
    assert not any(asked)
