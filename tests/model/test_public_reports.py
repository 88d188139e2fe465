"""What people reported of LLaVA and of pruning projects, tried on this one: each test names its report."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer

from modeling_ivtp import IVTPLlavaForConditionalGeneration, methods
from tests.support.tiny import prompt, rows_alone, tiny_model

ROWS = [[3, "image", 6], ["image", 9]]
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs():
    return prompt(ROWS)


def answer(model, inputs):
    return model.generate(**inputs, **OPTIONS)[:, -OPTIONS["max_new_tokens"] :]


def test_a_processor_that_writes_one_placeholder_too_few_is_named(model):
    """transformers 36002, unsloth 3783: "tokens: 575, features: 576" told nobody what to change."""
    inputs = prompt([[3, "image", 6]])
    inputs["input_ids"][0, 3] = 5
    with pytest.raises(ValueError, match=r"need 16 image tokens.*\[15\].*num_additional_image_tokens=1"):
        model.generate(**inputs, **OPTIONS)


def test_a_prompt_that_was_cut_off_is_named(model):
    """LlamaFactory 8434: a cut-off length that ends within the image."""
    inputs = prompt([[3, "image", 6]])
    short = {n: v[:, :10] if n in ("input_ids", "attention_mask", "clip_spans") else v for n, v in inputs.items()}
    with pytest.raises(ValueError, match=r"\[7\].*truncation"):
        model.generate(**short, **OPTIONS)


def test_a_batch_padded_on_the_right_answers_as_its_rows_alone(model, inputs):
    """LLaVA-NeXT 365 and 398, transformers 32268: batches padded on the right answered otherwise, or nothing."""
    alone = rows_alone(inputs, ROWS)
    length = max(row["input_ids"].shape[1] for row in alone)
    batch = {"pixel_values": inputs["pixel_values"], "clip_input_ids": inputs["clip_input_ids"]}
    for name in ("input_ids", "attention_mask"):
        missing = [length - row[name].shape[1] for row in alone]
        padded = [torch.nn.functional.pad(row[name], (0, n)) for row, n in zip(alone, missing, strict=True)]
        batch[name] = torch.cat(padded)
    spans = [row["clip_spans"] for row in alone]
    batch["clip_spans"] = torch.cat(
        [torch.nn.functional.pad(span, (0, 0, 0, length - span.shape[1])) for span in spans]
    )
    logits = model(**batch).logits
    for place, row in enumerate(alone):
        last = row["input_ids"].shape[1] - 1
        torch.testing.assert_close(logits[place, last], model(**row).logits[0, -1], atol=1e-5, rtol=1e-5)
        assert torch.equal(answer(model, batch)[place], answer(model, row)[0])


def test_the_same_tokens_are_kept_with_and_without_a_cache(model, inputs):
    """FastV 13: without a cache, other tokens were kept at every step."""
    assert torch.equal(model.generate(**inputs, **OPTIONS, use_cache=False), model.generate(**inputs, **OPTIONS))


def test_more_contextual_tokens_than_there_is_room_for_are_refused(model):
    """VisionZip 30: a shape error in the middle of the tower."""
    with pytest.raises(ValueError, match="contextual=9; allowed: a whole number from 0 to 4"):
        methods.VisionZip(4, contextual=9)(model)


def test_tiles_of_llava_1_6_are_named(model, inputs):
    """VisPruner 3, VScan 6: pictures in tiles, (I, tiles, 3, height, width), are another model's."""
    with pytest.raises(ValueError, match=r"pixel_values has 5 dimensions.*\(images, 3, height, width\)"):
        model.generate(**inputs | {"pixel_values": inputs["pixel_values"][None]}, **OPTIONS)


def test_an_answer_may_end_with_the_padding_token(model, inputs):
    """transformers 25790: pad and end token are the same in many tokenizers."""
    expected = answer(model, inputs)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id
    try:
        assert torch.equal(answer(model, inputs), expected)
    finally:
        model.generation_config.eos_token_id = None


def test_new_words_can_be_added(inputs):
    """transformers 23401: an embedding that was resized for new tokens."""
    model = tiny_model()
    expected = answer(model, inputs)
    model.resize_token_embeddings(140)
    assert torch.equal(answer(model, inputs), expected)
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == 140


def test_a_merged_adapter_answers_as_before_and_after_saving(inputs, tmp_path):
    """LLaVA 1200 and 1492: what LoRA trained was lost on the way to a checkpoint."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = answer(adapted, inputs)
    assert not torch.equal(expected, answer(tiny_model(), inputs))
    merged = adapted.merge_and_unload()
    assert torch.equal(answer(merged, inputs), expected)
    merged.save_pretrained(tmp_path)
    loaded = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path)
    loaded.generation_config = merged.generation_config
    assert torch.equal(answer(loaded, inputs), expected)


@pytest.mark.slow
def test_an_answer_can_be_streamed_from_a_thread(model):
    """LLaVA-NeXT's demos and many others: a streamer that reads while generate runs."""

    class Numbers:
        def decode(self, tokens, **_):
            return " ".join(map(str, tokens))

    inputs = prompt([[3, "image", 6]])
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **OPTIONS, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer).split()
    thread.join()
    assert [int(token) for token in streamed] == answer(model, inputs)[0].tolist()
