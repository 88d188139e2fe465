"""The model reads the question from a prompt's tokens where the processor's inputs are missing or misplaced."""

import copy

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.model.text_relevance import instruction_tokens, misplaced_spans
from tests.support.text_tokenizers import (
    CHATML_TEMPLATE,
    LLAVA_TEMPLATE,
    MISTRAL_TEMPLATE,
)
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for

QUESTIONS = [
    "What is the colour of the bird?",
    "Is there a cup of café crème, ½ full, on the 木のテーブル 🙂 table?",
    "Describe   the image\nin detail, please:  " + "which of the people wears a hat? " * 20,
    "",
]
PROMPTS = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS[:2]]
ANSWERS = [" It is red and sits on a branch.", " No."]


@pytest.fixture(scope="module")
def processor():
    return make_processor(size=56)


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """A model with its processor beside it, and one without."""
    model = model_for(processor, relevance_threshold=0.0)
    whole, bare = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("bare")
    model.save_pretrained(whole)
    processor.save_pretrained(whole)
    model.save_pretrained(bare)
    return whole, bare


@pytest.fixture
def model(saved):
    return IVTPLlavaForConditionalGeneration.from_pretrained(saved[0])


@pytest.fixture
def bare(saved):
    return IVTPLlavaForConditionalGeneration.from_pretrained(saved[1])


@pytest.fixture(scope="module")
def pictures():
    return [Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, y), 40).convert("RGB") for y in (1.5, 1.1)]


def without_clip(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("clip_")}


def kept(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits, model.model(**inputs).kept_tokens


@pytest.mark.parametrize(
    ("template", "special"),
    [
        (LLAVA_TEMPLATE, ()),
        (CHATML_TEMPLATE, ("<|im_start|>", "<|im_end|>")),
        (MISTRAL_TEMPLATE, ("[INST]", "[/INST]")),
    ],
    ids=["llava", "chatml", "mistral"],
)
def test_a_question_read_from_tokens_is_the_one_that_the_processor_writes(template, special, pictures):
    processor = make_processor(*special, size=56, chat_template=template)
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in QUESTIONS
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=[pictures[0]] * len(texts), text=texts, padding=True, return_tensors="pt")
    read = processor.read_instruction(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(read["clip_input_ids"], inputs["clip_input_ids"])
    assert torch.equal(read["clip_spans"], inputs["clip_spans"])
    assert instruction_tokens(inputs["clip_spans"])[:3].any(-1).all()


def test_images_side_by_side_and_apart_are_read_as_the_processor_writes_them(processor, pictures):
    texts = ["USER: <image><image>\nWhich red cube differs?", "USER: <image> before the big cat and <image>, what?"]
    inputs = processor(images=[pictures, pictures], text=texts, padding=True, return_tensors="pt")
    read = processor.read_instruction(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(read["clip_input_ids"], inputs["clip_input_ids"])
    assert torch.equal(read["clip_spans"], inputs["clip_spans"])


def test_byte_level_tokens_are_read_too(pictures):
    byte_level = make_processor(size=56, tokenizer=_byte_level_tokenizer())
    inputs = byte_level(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    read = byte_level.read_instruction(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(read["clip_input_ids"], inputs["clip_input_ids"])
    assert torch.equal(read["clip_spans"], inputs["clip_spans"])


def test_answers_that_were_appended_are_no_question(processor, pictures):
    inputs = processor(images=pictures, text=PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    answers = torch.tensor([[9999, 31, 7, 7], [12, 7, 45, 3]])  # not as the tokenizer would cut any text
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    read = processor.read_instruction(ids, mask)
    assert torch.equal(read["clip_input_ids"], inputs["clip_input_ids"])
    assert torch.equal(read["clip_spans"][:, : inputs["input_ids"].shape[1]], inputs["clip_spans"])
    assert not read["clip_spans"][:, inputs["input_ids"].shape[1] :].any()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_missing_inputs_change_nothing(model, processor, pictures, options):
    inputs = processor(images=pictures, text=PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    expected, kept_tokens = kept(model, inputs)
    logits, same = kept(model, without_clip(inputs))
    assert torch.equal(same, kept_tokens)
    assert torch.equal(logits, expected)
    options = options | {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**without_clip(inputs), **options), model.generate(**inputs, **options))
    # The question does decide: guided by the image alone, other tokens stay.
    with model.pruning(guidance="visual_cls"):
        assert not torch.equal(kept(model, inputs)[1], kept_tokens)


@pytest.mark.slow
def test_a_processor_without_clip_inputs_returns_stock_inputs_and_changes_nothing(saved, model, pictures, tmp_path):
    plain = AutoProcessor.from_pretrained(saved[0], clip_inputs=False)
    full = AutoProcessor.from_pretrained(saved[0])
    options = {"images": pictures, "text": PROMPTS, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs, expected = plain(**options), full(**options)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} == set(plain.model_input_names)
    assert set(expected) - set(inputs) == {"clip_input_ids", "clip_spans"}
    for result, right in zip(kept(model, inputs), kept(model, expected), strict=True):
        assert torch.equal(result, right)
    plain.save_pretrained(tmp_path)
    assert not AutoProcessor.from_pretrained(tmp_path).clip_inputs
    model.save_pretrained(tmp_path)
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(kept(again, inputs)[0], kept(model, expected)[0])


def as_trained(processor, pictures):
    """A batch as a collator makes it: prompts padded on the left, answers appended, then all padding on the right."""
    prompts = processor(images=pictures, text=PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    answers = processor.tokenizer(
        ANSWERS, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    rows, labels = [], []
    for row in range(len(PROMPTS)):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        answer = answers["input_ids"][row][answers["attention_mask"][row].bool()]
        rows.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, -100), answer]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": pad(labels, batch_first=True, padding_value=-100)}
    return prompts, batch | {"pixel_values": prompts["pixel_values"]}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("passed", ["misplaced", "dropped", "same length"])
def test_a_collators_batch_keeps_the_patches_of_the_prompts_alone(model, processor, pictures, passed, training):
    prompts, batch = as_trained(processor, pictures)
    clip = {"misplaced": prompts, "dropped": {}, "same length": _shifted(prompts, batch)}[passed]
    batch |= {name: clip[name] for name in ("clip_input_ids", "clip_spans") if name in clip}
    model.train(training)
    together = model.model(**{name: value for name, value in batch.items() if name != "labels"}).kept_tokens
    assert model(**batch).loss.isfinite()
    model.eval()
    for row, text in enumerate(PROMPTS):
        alone = processor(images=pictures[row], text=text, return_tensors="pt")
        length = alone["input_ids"].shape[1]
        assert torch.equal(together[row, :length], kept(model, alone)[1][0])


def _shifted(prompts, batch):
    spans = torch.nn.functional.pad(prompts["clip_spans"], (0, 0, 0, batch["input_ids"].shape[1]))
    return {"clip_input_ids": prompts["clip_input_ids"], "clip_spans": spans[:, : batch["input_ids"].shape[1]]}


def test_spans_that_cannot_be_aligned_are_refused_without_a_processor(bare, processor, pictures):
    prompts, batch = as_trained(processor, pictures)
    clip = {name: prompts[name] for name in ("clip_input_ids", "clip_spans")}
    with pytest.raises(ValueError, match=r"cannot be aligned.*processor\.save_pretrained"):
        bare(**batch, **clip)
    with pytest.raises(ValueError, match="cannot be aligned"):
        bare(**batch, **_shifted(prompts, batch))
    longer = torch.cat([prompts["input_ids"], prompts["input_ids"][:, -3:]], 1)
    with pytest.raises(ValueError, match="cannot be aligned"):
        bare.generate(input_ids=longer, pixel_values=prompts["pixel_values"], **clip, max_new_tokens=2)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_moved_by_a_few_columns_is_noticed(model, bare, processor, pictures, side, columns):
    text = [PROMPTS[0], PROMPTS[0]]
    inputs = processor(images=[pictures[0]] * 2, text=text, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1] + columns
    options = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    other = {"left": "right", "right": "left"}[side]
    inputs = processor(images=[pictures[0]] * 2, text=text, padding_side=side, **options)
    moved = processor(images=[pictures[0]] * 2, text=text, padding_side=other, **options)
    expected = kept(model, moved)
    for name in ("clip_spans", "clip_input_ids"):
        moved[name] = inputs[name]
    for result, right in zip(kept(model, moved), expected, strict=True):
        assert torch.equal(result, right)
    with pytest.raises(ValueError, match="has words on padding or images, or padding on tokens"):
        kept(bare, moved)
    kept(bare, inputs)
    embedded = dict(moved)
    embedded["inputs_embeds"] = bare.get_input_embeddings()(embedded.pop("input_ids"))
    with pytest.raises(ValueError, match="cannot be aligned"):
        kept(bare, embedded)


def test_misplaced_spans_are_found_row_by_row():
    generator = torch.Generator().manual_seed(0)
    spans = torch.tensor([[0, 0], [1, 1], [-5, -3], [-3, -3]])[torch.randint(4, (64, 3), generator=generator)]
    images, valid = torch.rand(64, 3, generator=generator) < 0.2, torch.rand(64, 3, generator=generator) < 0.8
    for mask in (valid, None):
        found = misplaced_spans(spans, images, mask)
        assert 0 < found.sum() < 64
        for row in range(64):
            wrong = False
            for column, span in enumerate(spans[row].tolist()):
                here = mask is None or bool(mask[row, column])
                wrong |= span == [-5, -3] and (not here or bool(images[row, column]))
                wrong |= span == [1, 1] and here
            assert found[row] == wrong


def test_a_prompt_that_goes_on_where_the_processor_ended_is_read_anew(model, processor, pictures):
    inputs = processor(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
    begun = processor(images=pictures[0], text=PROMPTS[0] + " It is", return_tensors="pt")
    misplaced = begun | {name: inputs[name] for name in ("clip_input_ids", "clip_spans")}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**misplaced, **options), model.generate(**begun, **options))


def test_a_later_turn_is_read_from_its_own_tokens(model, processor, pictures):
    cache = DynamicCache(config=model.config.text_config)
    first = processor(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
    said = model.generate(**first, cache=cache, max_new_tokens=3, do_sample=False)
    text = " USER: <image>\nAnd on the left branch of the tree? ASSISTANT:"
    turn = processor(images=pictures[1], text=text, add_special_tokens=False, return_tensors="pt")
    turn["input_ids"] = torch.cat([said, turn["input_ids"]], 1)
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**turn, cache=copy.deepcopy(cache), **options)
    assert torch.equal(model.generate(**without_clip(turn), cache=cache, **options), expected)


@pytest.mark.slow
def test_saving_keeps_the_processor_beside_the_weights(model, bare, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "clip_tokenizer" / "tokenizer.json").is_file()
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert again.model.guide.processor(again) is not None
    bare.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "clip_tokenizer").exists()


@pytest.mark.parametrize("source", ["gone/from/here", "owner/name"])
def test_nothing_is_looked_for_on_the_hub_for_a_model_that_did_not_come_from_there(bare, source, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("looked for a processor")

    monkeypatch.setattr(IVTPLlavaProcessor, "from_pretrained", refuse)
    bare.config.name_or_path = source
    assert bare.model.guide.processor(bare) is None
    bare.save_pretrained(tmp_path)


@pytest.mark.slow
def test_reading_needs_a_clip_tokenizer(processor):
    stock = make_processor(size=56, clip=None)
    with pytest.raises(ValueError, match="needs clip_tokenizer"):
        stock.read_instruction(torch.tensor([[1, 2]]))


def _byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<image>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
