"""What only a GPU can show: the same answers there, with its caches and its attention kernels."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.tiny import prompt, tiny_model

pytestmark = pytest.mark.gpu
ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


@torch.no_grad()
def test_logits_are_those_of_the_cpu():
    model, inputs = tiny_model(), prompt(ROWS)
    expected = model(**inputs).logits[:, -1]
    torch.testing.assert_close(model.cuda()(**on_gpu(inputs)).logits[:, -1].cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
def test_every_cache_gives_the_same_answer(cache):
    model, inputs = tiny_model().cuda(), on_gpu(prompt(ROWS))
    assert torch.equal(answer(model, inputs, cache_implementation=cache), answer(model, inputs))


@torch.no_grad()
def test_flash_attention_gives_close_logits():
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    inputs = on_gpu(prompt(ROWS))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = tiny_model().cuda().bfloat16()(**inputs).logits[:, -1]
    flash = tiny_model(attention="flash_attention_2").cuda().bfloat16()(**inputs).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(flash.float(), expected.float()).min() > 0.9
