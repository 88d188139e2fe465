"""LoRA on the decoder of a vLLM server answers as PEFT does in transformers.

It needs vLLM, in an environment of its own: `make vllm-env`, then `make vllm-test`.
"""

import gc

import pytest
import torch

from benchmarks.serving.engines import TOWER, Engine, Transformers, held_out

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-env, then make vllm-test")
peft = pytest.importorskip("peft", reason="PEFT comes with make vllm-env")

TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)"


@pytest.fixture(scope="module")
def asked():
    return [(text, images) for text, images, _ in held_out(16)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model with an adapter that changes answers, and the adapter's folder."""
    right = Transformers()
    torch.manual_seed(0)
    options = peft.LoraConfig(r=8, lora_alpha=64, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(right.model, options)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return right, model, folder


@pytest.fixture
def base_chooses(adapted, monkeypatch):
    """Let the base model choose in transformers, too, as a server does whose images serve all adapters."""
    right, model, _ = adapted
    language = right.model.model.language_model
    choose = language.choose

    def without_adapter(*args, **kwargs):
        with model.disable_adapter():
            return choose(*args, **kwargs)

    monkeypatch.setattr(language, "choose", without_adapter)


@pytest.mark.parametrize("options", [TOWER, {}], ids=["tower", "guided"])
def test_an_adapter_answers_as_peft_does(adapted, base_chooses, asked, options):
    from vllm.lora.request import LoRARequest

    right, model, folder = adapted
    engine = Engine(
        hf_overrides={"pruning": options}, enable_lora=True, max_lora_rank=8, max_loras=1, enable_prefix_caching=True
    )
    adapter = LoRARequest("adapter", 1, str(folder))
    with_adapter = [right.answer(*question, **options) for question in asked]
    with model.disable_adapter():
        plain = [right.answer(*question, **options) for question in asked]
    assert engine.answers(asked, lora_request=adapter) == with_adapter
    encoded = engine.images.encoded
    # The control: without the adapter other answers come, from the same pictures.
    assert engine.answers(asked) == plain
    assert sum(one != other for one, other in zip(with_adapter, plain, strict=True)) > len(asked) // 4
    assert engine.images.encoded == encoded
    del engine
    gc.collect()
