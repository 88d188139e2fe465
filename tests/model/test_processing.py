"""The processor: what it adds to LLaVA's, and that it changes nothing of it."""

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.pipelines.base import pad_collate_fn

from modeling_ivtp.model import processing_ivtp
from modeling_ivtp.model.processing_ivtp import IVTPLlavaProcessor
from tests.support import stranger, text_tokenizers
from tests.support.text_tokenizers import CHATML_TEMPLATE, LLAVA_TEMPLATE, MISTRAL_TEMPLATE, llama_tokenizer

QUESTION = "What is the colour of the bird?"
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
CHATML = ("<|im_start|>", "<|im_end|>")
CLIP = {"clip_input_ids", "clip_spans"}


@pytest.fixture(scope="module")
def processor() -> IVTPLlavaProcessor:
    return text_tokenizers.processor()


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def stock_of(processor: IVTPLlavaProcessor) -> LlavaProcessor:
    fields = ("patch_size", "vision_feature_select_strategy", "chat_template", "num_additional_image_tokens")
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        **{name: getattr(processor, name) for name in fields},
    )


def instruction(processor: IVTPLlavaProcessor, text: str, images: Any = None) -> str:
    """The characters of a prompt whose tokens have a span, a bar where other words stand between them."""
    outputs = processor(images=images, text=text, return_offsets_mapping=True)
    expanded = text.replace("<image>", "<image>" * 4)
    spans = zip(outputs["offset_mapping"][0], outputs["clip_spans"][0], strict=True)
    held = {place for (start, end), (first, last) in spans if first < last for place in range(start, end)}
    words = "".join(letter if place in held or letter.isspace() else "\0" for place, letter in enumerate(expanded))
    return "|".join(piece.strip() for piece in words.split("\0") if piece.strip())


def clip_text(processor: IVTPLlavaProcessor, outputs: Any, row: int = 0) -> str:
    ids = [int(token) for window in outputs["clip_input_ids"][row] for token in window if token != 0]
    return processor.clip_tokenizer.decode(ids, skip_special_tokens=True)


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(torch.as_tensor(np.asarray(one[name])), torch.as_tensor(np.asarray(other[name]))), name


# What comes out


def test_the_stock_outputs_stay_and_two_inputs_join_them(processor, image):
    outputs = processor(images=image, text=PROMPT, return_tensors="pt")
    stock = stock_of(processor)(images=image, text=PROMPT, return_tensors="pt")
    assert_same({name: outputs[name] for name in stock}, stock)
    assert set(outputs) - set(stock) == CLIP
    assert outputs["clip_input_ids"].shape == (1, 1, 77)
    assert outputs["clip_spans"].shape == (*outputs["input_ids"].shape, 2)
    assert outputs["clip_input_ids"].dtype == outputs["clip_spans"].dtype == torch.int64
    window = outputs["clip_input_ids"][0, 0].tolist()
    words = processor.clip_tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert window == [49406, *words, 49407] + [49407] * (75 - len(words))
    first, last = outputs["clip_spans"].unbind(-1)
    assert ((first < last) | (first == 0) & (last == 0)).all()
    assert (first >= -77).all()
    assert (last <= 0).all()
    assert processor.model_input_names == [*stock_of(processor).model_input_names, "clip_input_ids", "clip_spans"]


def test_every_word_finds_its_own_clip_token_behind_576_placeholders(image):
    processor = text_tokenizers.processor(size=336)
    outputs = processor(images=image, text=PROMPT)
    ids, spans = outputs["input_ids"][0], outputs["clip_spans"][0]
    assert ids.count(processor.image_token_id) == 576
    flat = [token for window in outputs["clip_input_ids"][0] for token in window]
    pairs = {}
    for token, (first, last) in zip(ids, spans, strict=True):
        if first < last:
            clip = processor.clip_tokenizer.convert_ids_to_tokens(flat[len(flat) + first : len(flat) + last])
            pairs[processor.tokenizer.convert_ids_to_tokens(token).strip("▁")] = [
                one.removesuffix("</w>") for one in clip
            ]
    assert pairs["colour"] == ["colour"]
    assert pairs["bird"] == ["bird"]
    assert pairs["?"] == ["?"]


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_the_new_inputs_have_the_type_of_the_others(processor, image, kind):
    outputs = processor(images=image, text=PROMPT, return_tensors=kind)
    reference = processor(images=image, text=PROMPT, return_tensors="pt")
    for name in CLIP:
        assert isinstance(outputs[name], {"pt": torch.Tensor, "np": np.ndarray, None: list}[kind])
        assert torch.equal(torch.as_tensor(np.asarray(outputs[name])), reference[name])


def test_offsets_are_returned_only_to_who_asks_for_them(processor, image):
    for wish in ({"return_offsets_mapping": True}, {"text_kwargs": {"return_offsets_mapping": True}}):
        outputs = processor(images=image, text=PROMPT, return_tensors="pt", **wish)
        assert set(outputs) == {"input_ids", "attention_mask", "pixel_values", "offset_mapping"} | CLIP
    outputs = processor(images=image, text=PROMPT, return_text_replacement_offsets=True)
    assert outputs["text_replacement_offsets"][0][0]["span"] == (6, 13)
    assert "offset_mapping" not in outputs


# Batches

BATCH = [
    f"USER: <image>\n{QUESTION} ASSISTANT:",
    "USER: Is there a dog? ASSISTANT:",
    f"USER: <image>\n<image>\n{'Which of the two pictures shows the brown horse on the beach? ' * 16} ASSISTANT:",
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(processor, image, side):
    outputs = processor(images=[image] * 3, text=BATCH, padding=True, padding_side=side, return_tensors="pt")
    rows, longest = outputs["input_ids"].shape
    assert (rows, outputs["clip_input_ids"].shape) == (3, (3, 3, 77))
    for row, (text, images) in enumerate(zip(BATCH, ([image], None, [image, image]), strict=True)):
        alone = processor(images=images, text=text, return_tensors="pt")
        length, windows = alone["input_ids"].shape[1], alone["clip_input_ids"].shape[1]
        kept = slice(longest - length, None) if side == "left" else slice(length)
        assert torch.equal(outputs["input_ids"][row, kept], alone["input_ids"][0])
        assert torch.equal(outputs["clip_spans"][row, kept], alone["clip_spans"][0])
        assert ((outputs["clip_spans"][row] == 1).all(-1) == ~outputs["attention_mask"][row].bool()).all()
        assert torch.equal(outputs["clip_input_ids"][row, 3 - windows :], alone["clip_input_ids"][0])
        assert not outputs["clip_input_ids"][row, : 3 - windows].any()


def test_a_pipeline_that_collates_single_prompts_gets_the_batch(processor, image):
    images = ([image], [image], [image, image])
    texts = [BATCH[0], "USER: <image>\nIs there a dog? ASSISTANT:", BATCH[2]]
    singles = [
        dict(processor(images=one, text=text, return_tensors="pt")) for one, text in zip(images, texts, strict=True)
    ]
    batch = processor(images=[image] * 4, text=texts, padding=True, return_tensors="pt")
    collated = pad_collate_fn(processor.tokenizer, processor.image_processor)(singles)
    # What it does not know it pads with 0, which stands for no CLIP token, as the processor's mark for padding does.
    batch["clip_spans"][~batch["attention_mask"].bool()] = 0
    assert_same(collated, batch)


def test_unequal_rows_stay_lists_without_padding(processor):
    outputs = processor(text=[BATCH[1], "USER: Describe the image in detail, please. ASSISTANT:"])
    lengths = [len(row) for row in outputs["input_ids"]]
    assert lengths[0] != lengths[1]
    assert [len(row) for row in outputs["clip_spans"]] == lengths


# Which words are the instruction

CONVERSATIONS = {
    "LLaVA-1.5": (
        (),
        f"A chat between a human and an assistant. USER: <image>\n{QUESTION} ASSISTANT:",
        QUESTION,
    ),
    "several turns": (
        (),
        "USER: <image>\nWhat is it? ASSISTANT: A small bird.</s>USER: Which colour? ASSISTANT: Red.</s>"
        "USER: Where? ASSISTANT:",
        "What is it?|Which colour?|Where?",
    ),
    "no generation prompt": ((), "USER: <image>\nWhat is it? ASSISTANT: A bird. USER: Where?", "What is it?|Where?"),
    "image after the words": (
        (),
        "USER: Look at <image> and say what it is. ASSISTANT:",
        "Look at|and say what it is.",
    ),
    "only the answer is marked": ((), "<image>\nWhat is it? ASSISTANT:", "What is it?"),
    "no roles": ((), "<image>\nDescribe the image in detail, please.", "Describe the image in detail, please."),
    "no roles, words first": ((), "Is there a dog? <image>", "Is there a dog?"),
    "a word that ends like a role": ((), "USER: Who is SUPERUSER: a cat? ASSISTANT:", "Who is SUPERUSER: a cat?"),
    "[INST]": ((), "<s>[INST] <image>\nWhat is it? [/INST] A bird.</s>[INST] Where? [/INST]", "What is it?|Where?"),
    "[INST] with a system prompt": (
        (),
        "[INST] <<SYS>>\nBe polite.\n<</SYS>>\n\n<image>What is it? [/INST]",
        "What is it?",
    ),
    "ChatML": (
        CHATML,
        "<|im_start|>system\nYou are helpful.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA bird.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        "What is it?|Where?",
    ),
    "ChatML on one line": (
        CHATML,
        "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant",
        "What is it?",
    ),
    "LLaMA 3": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "What is it?",
    ),
    "another word for the user in a question": (
        (),
        "Human: <image>\nWhat does User: mean? Assistant:",
        "What does User: mean?",
    ),
    "a later turn's word in a question": (
        (),
        "USER: <image>\nWhat is it? ASSISTANT: A sign USER: Is User: on it? ASSISTANT:",
        "What is it?|Is User: on it?",
    ),
    "a marker in the last answer": (
        (),
        "USER: <image>\nWhat is written? ASSISTANT: It says USER: wet floor.</s>",
        "What is written?",
    ),
    "a marker in an answer": (
        (),
        "USER: <image>\nWhat is written? ASSISTANT: It says USER: wet floor.</s>USER: Where? ASSISTANT:",
        "What is written?|Where?",
    ),
    "answers without a full stop": (
        (),
        "USER: <image>\nWhat colour? ASSISTANT: Red USER: Where? ASSISTANT: Left USER: Why? ASSISTANT:",
        "What colour?|Where?|Why?",
    ),
    "ViP-LLaVA": ((), "A chat.###Human: <image>\nWhat is it?###Assistant:", "What is it?"),
}


@pytest.mark.parametrize(("special", "prompt", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [None, LLAVA_TEMPLATE], ids=["no template", "template"])
def test_the_instruction_is_what_the_person_wrote(image, special, prompt, expected, template):
    processor = text_tokenizers.processor(*special, chat_template=template)
    images = image if "<image>" in prompt else None
    assert instruction(processor, prompt, images) == expected
    read = clip_text(processor, processor(images=images, text=prompt))
    assert read.replace(" ", "") == expected.replace("|", "").replace(" ", "").lower()


UNHEARD_OF = (
    "{% for message in messages %}{{ '=== ' + {'user': 'Frage', 'assistant': 'Antwort'}[message['role']] + ' ===\n' }}"
    "{{ message['content'] if message['content'] is string else message['content'][-1]['text'] }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=== Antwort ===\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("special", "template"),
    [((), LLAVA_TEMPLATE), ((), MISTRAL_TEMPLATE), (CHATML, CHATML_TEMPLATE), ((), UNHEARD_OF)],
    ids=["LLaVA", "Mistral", "ChatML", "unheard of"],
)
def test_a_chat_template_tells_its_own_role_markers(special, template):
    processor = text_tokenizers.processor(*special, chat_template=template)
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A small bird."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert instruction(processor, prompt) == "What is it?|Which colour?"
    assert instruction(processor, processor.apply_chat_template(chat[:1])) == "What is it?"
    outputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert clip_text(processor, outputs) == "what is it ? which colour ?"


def test_a_special_token_closes_a_turn_whoever_speaks_next():
    processor = text_tokenizers.processor(*CHATML, chat_template=CHATML_TEMPLATE)
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "What is it?"), ("system", "Be brief."), ("user", "Where?"))
    ]
    assert instruction(processor, processor.apply_chat_template(chat)) == "What is it?|Where?"


def test_a_template_is_probed_once_and_a_broken_one_is_passed_over(processor, monkeypatch):
    rendered = []
    original = IVTPLlavaProcessor.apply_chat_template
    monkeypatch.setattr(
        IVTPLlavaProcessor, "apply_chat_template", lambda *a, **k: rendered.append(1) or original(*a, **k)
    )
    fresh = text_tokenizers.processor()
    for _ in range(3):
        fresh(text=BATCH[1])
    assert len(rendered) == 2
    broken = text_tokenizers.processor(chat_template="{{ raise_exception('no') }}")
    assert instruction(broken, BATCH[1]) == "Is there a dog?"
    markless = text_tokenizers.processor(chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert instruction(markless, BATCH[1]) == "Is there a dog?"
    unprompted = text_tokenizers.processor(
        chat_template="{% for m in messages %}* {{ m['role'] }} says: {{ m['content'][0]['text'] + '\n' }}{% endfor %}"
    )
    assert instruction(unprompted, "* user says: A dog?\n* assistant says: A bird.\n") == "A dog?"
    several = text_tokenizers.processor(chat_template={"default": LLAVA_TEMPLATE, "other": UNHEARD_OF})
    assert instruction(several, "=== Frage ===\nA dog?\n=== Antwort ===\n") == "A dog?"


def test_a_pattern_overrides_the_role_markers(image, tmp_path):
    processor = text_tokenizers.processor(instruction_pattern=r"Q(\d)?(?:: )(?P<words>.*?) A:")
    assert instruction(processor, "Q: What is it? A: A bird.") == ""
    processor = text_tokenizers.processor(instruction_pattern=r"Q: (.*?) A:")
    prompt = "x USER: Q: <image>\nWhat\nis it? A: A bird. Q: Where? A:"
    assert instruction(processor, prompt, image) == "What\nis it?|Where?"
    processor.save_pretrained(tmp_path)
    assert IVTPLlavaProcessor.from_pretrained(tmp_path).instruction_pattern == r"Q: (.*?) A:"


@pytest.mark.parametrize("words", ["", "   ", "\n\t\u3000"])
def test_an_empty_instruction_has_no_spans(processor, image, words):
    outputs = processor(images=image, text=f"USER: <image>\n{words}ASSISTANT:", return_tensors="pt")
    assert not outputs["clip_spans"].any()
    assert outputs["clip_input_ids"].shape == (1, 1, 77)
    assert not outputs["clip_input_ids"].any()


def test_clip_reads_a_literal_end_token_as_text(processor):
    prompt = "USER: Read <|endoftext|> out, please. ASSISTANT:"
    assert processor(text=prompt)["clip_input_ids"][0][0].index(49407) > 10
    assert instruction(processor, prompt) == "Read <|endoftext|> out, please."


def test_a_prompt_without_any_token_gives_empty_spans(processor):
    outputs = processor(text="", add_special_tokens=False, return_tensors="pt")
    assert outputs["clip_spans"].shape == (*outputs["input_ids"].shape, 2) == (1, 0, 2)


# Long prompts


def test_a_long_instruction_goes_in_windows_that_cut_no_word(processor):
    words = ["photograph", "kitchen's", "bird", "extraordinarily", "x", "Ångström"] * 60
    outputs = processor(text=f"USER: {' '.join(words)} ASSISTANT:")
    windows = outputs["clip_input_ids"][0]
    assert len(windows) > 5
    texts = []
    for window in windows:
        assert len(window) == 77
        assert window[0] == 49406
        end = window.index(49407)
        assert set(window[end:]) == {49407}
        texts.append(processor.clip_tokenizer.convert_ids_to_tokens(window[1:end]))
    assert all(tokens[-1].endswith("</w>") for tokens in texts)
    whole = processor.clip_tokenizer.tokenize(" ".join(words))
    assert [token for tokens in texts for token in tokens] == whole


def test_a_word_longer_than_a_window_is_cut_and_its_spans_stay_in_one_window(processor):
    text = "字" * 200
    outputs = processor(text=f"USER: {text} ASSISTANT:", return_tensors="pt")
    windows = outputs["clip_input_ids"].shape[1]
    assert windows == -(-len(processor.clip_tokenizer.tokenize(text)) // 75)
    first, last = outputs["clip_spans"][0].unbind(-1)
    held = first < last
    assert held.sum() >= 3 * 200  # three bytes each
    assert torch.equal(first[held] // 77, (last[held] - 1) // 77)


@pytest.mark.parametrize("side", ["left", "right"])
def test_after_truncation_spans_follow_the_kept_tokens(processor, side):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.truncation_side = side
    processor = text_tokenizers.processor(tokenizer=tokenizer)
    prompt = f"USER: {QUESTION} And what does the sign above the door say? ASSISTANT:"
    whole = processor(text=prompt, add_special_tokens=False)
    cut = processor(text=prompt, add_special_tokens=False, truncation=True, max_length=12)
    kept = slice(12) if side == "right" else slice(-12, None)
    assert cut["input_ids"][0] == whole["input_ids"][0][kept]
    assert cut["clip_spans"][0] == whole["clip_spans"][0][kept]
    assert cut["clip_input_ids"] == whole["clip_input_ids"]


# Chat


def test_a_chat_goes_through_the_template_in_one_step(processor, image, tmp_path):
    image.save(tmp_path / "image.png")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "url": str(tmp_path / "image.png")}, {"type": "text", "text": QUESTION}],
        }
    ]
    outputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert_same(outputs, processor(images=image, text=PROMPT, return_tensors="pt"))
    batch = processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert batch["clip_spans"][0] == batch["clip_spans"][1] == outputs["clip_spans"][0].tolist()


def test_assistant_masks_are_those_of_the_stock_processor(processor):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A small bird."}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    outputs, stock = (one.apply_chat_template(chat, **options) for one in (processor, stock_of(processor)))
    assert_same({name: outputs[name] for name in stock}, stock)
    assert clip_text(processor, outputs) == "what is it ?"


# Without CLIP


def test_without_a_clip_tokenizer_it_is_the_stock_processor(image, tmp_path):
    processor = text_tokenizers.processor(clip=None)
    stock = stock_of(processor)
    assert_same(
        processor(images=[image] * 3, text=BATCH, padding=True, return_tensors="pt"),
        stock(images=[image] * 3, text=BATCH, padding=True, return_tensors="pt"),
    )
    assert processor.model_input_names == stock.model_input_names
    assert "clip_tokenizer" not in repr(processor)
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "clip_tokenizer").exists()
    again = IVTPLlavaProcessor.from_pretrained(tmp_path)
    assert again.clip_tokenizer is None
    assert_same(again(images=image, text=PROMPT), stock(images=image, text=PROMPT))


def test_images_alone_and_words_alone_are_processed(processor, image):
    assert set(processor(images=image, return_tensors="pt")) == {"pixel_values"}
    assert set(processor(text="Is there a dog?", return_tensors="pt")) == {"input_ids", "attention_mask"} | CLIP


# Saving and loading


@pytest.mark.slow
def test_a_saved_processor_comes_back_the_same(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "clip_tokenizer" / "tokenizer.json").is_file()
    assert (tmp_path / "processing_ivtp.py").is_file()
    assert (tmp_path / "text_relevance.py").is_file()
    again = IVTPLlavaProcessor.from_pretrained(tmp_path)
    expected = processor(images=image, text=PROMPT, return_tensors="pt")
    assert_same(again(images=image, text=PROMPT, return_tensors="pt"), expected)
    assert again.chat_template == processor.chat_template
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert_same(other(images=image, text=PROMPT, return_tensors="pt"), expected)
    stock = LlavaProcessor.from_pretrained(tmp_path)
    assert_same(stock(images=image, text=PROMPT), stock_of(processor)(images=image, text=PROMPT))


@pytest.mark.slow
def test_remote_code_loads_it_where_the_package_is_not_installed(processor, tmp_path):
    folder = tmp_path / "checkpoint"
    processor.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "ivtp_llava"}')
    script = f"""
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor.save_pretrained({str(tmp_path / "again")!r})
processor = AutoProcessor.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
print(type(processor).__module__, processor(text={BATCH[1]!r})["clip_spans"])
"""
    printed = stranger.run(script, home=tmp_path)
    module, spans = printed.splitlines()[-1].split(" ", 1)
    assert module.startswith("transformers_modules.")
    assert spans == str(processor(text=BATCH[1])["clip_spans"])


@pytest.mark.slow
def test_from_llava_joins_a_llava_folder_with_a_clip_tokenizer(processor, image, tmp_path):
    stock_of(processor).save_pretrained(tmp_path / "llava")
    processor.clip_tokenizer.save_pretrained(tmp_path / "clip")
    expected = processor(images=image, text=PROMPT, return_tensors="pt")
    for clip in (processor.clip_tokenizer, tmp_path / "clip", str(tmp_path / "clip")):
        joined = IVTPLlavaProcessor.from_llava(tmp_path / "llava", clip, instruction_pattern=None)
        assert_same(joined(images=image, text=PROMPT, return_tensors="pt"), expected)
    joined = IVTPLlavaProcessor.from_llava(tmp_path / "llava", clip, r"bird", patch_size=28)
    assert (joined.instruction_pattern, joined.patch_size) == ("bird", 28)
    assert IVTPLlavaProcessor.from_llava(tmp_path / "llava").clip_tokenizer is None


def test_from_llava_keeps_the_clip_tokenizer_of_a_folder_of_ours(processor, image, tmp_path):
    processor.save_pretrained(tmp_path / "above" / "ours")
    expected = processor(images=image, text=PROMPT, return_tensors="pt")
    kept = IVTPLlavaProcessor.from_llava(tmp_path / "above" / "ours", patch_size=14)
    assert_same(kept(images=image, text=PROMPT, return_tensors="pt"), expected)
    other = copy.deepcopy(processor.clip_tokenizer)
    other.model_max_length = 20
    replaced = IVTPLlavaProcessor.from_llava(tmp_path / "above" / "ours", other)
    assert replaced.clip_tokenizer.model_max_length == 20


def test_a_folder_without_clips_tokenizer_is_one_plain_warning(processor, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(processing_ivtp.logger, "warning_once", warnings.append)
    stock_of(processor).save_pretrained(tmp_path)
    IVTPLlavaProcessor.from_llava(tmp_path)
    assert warnings == []
    assert IVTPLlavaProcessor.from_pretrained(tmp_path).clip_tokenizer is None
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path} has no clip_tokenizer/, so the image alone guides the pruning")
    assert "IVTPLlavaProcessor.from_llava(" in warning
    assert "`ivtp convert LLAVA --clip CLIP --out FOLDER`" in warning


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction_pattern": "(USER"}, r"instruction_pattern must be a regular expression, got '\(USER'"),
        ({"instruction_pattern": 3}, "instruction_pattern must be a regular expression, got 3"),
        ({"clip": "openai/clip"}, "clip_tokenizer must be a fast tokenizer .* got str: 'openai/clip'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_tokenizers.processor(**arguments)


def test_tokenizers_that_cannot_be_aligned_are_refused(processor):
    class Slow(type(processor.clip_tokenizer)):
        is_fast = False

    slow = copy.copy(processor.clip_tokenizer)
    slow.__class__ = Slow
    with pytest.raises(ValueError, match="clip_tokenizer must be a fast tokenizer"):
        text_tokenizers.processor(clip=slow)
    with pytest.raises(ValueError, match="clip_tokenizer must have a start and an end token"):
        text_tokenizers.processor(clip=llama_tokenizer(bos_token=None))
    short = copy.deepcopy(processor.clip_tokenizer)
    short.model_max_length = 2
    with pytest.raises(ValueError, match="clip_tokenizer must take 3 tokens or more, got 2"):
        text_tokenizers.processor(clip=short)


def test_a_clip_tokenizer_is_not_joined_by_from_pretrained(processor, tmp_path):
    stock_of(processor).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_llava joins a CLIP tokenizer, got clip_tokenizer=CLIPTokenizer"):
        IVTPLlavaProcessor.from_pretrained(tmp_path, clip_tokenizer=processor.clip_tokenizer)


@pytest.mark.parametrize("option", ["is_split_into_words", "return_overflowing_tokens"])
def test_options_that_leave_tokens_without_a_place_are_refused(processor, option):
    with pytest.raises(ValueError, match=f"{option} is not possible together with a CLIP tokenizer, got True"):
        processor(text=BATCH[1], text_kwargs={option: True})


@pytest.mark.parametrize("count", [0, 2])
def test_placeholders_that_do_not_match_the_images_meet_the_stock_processors_answer(processor, image, count):
    arguments = {"images": [image] * count or None, "text": PROMPT}
    try:
        stock = stock_of(processor)(**arguments)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            processor(**arguments)
    else:  # older versions leave it to the model
        outputs = processor(**arguments)
        assert_same({name: outputs[name] for name in stock}, stock)
        assert len(outputs["clip_spans"][0]) == len(outputs["input_ids"][0])


@pytest.mark.slow
def test_sanitized_control_tokens_cost_the_clip_inputs_and_it_is_said(image, monkeypatch):
    processor = text_tokenizers.processor(*CHATML, chat_template=CHATML_TEMPLATE)
    if not hasattr(processor.tokenizer, "_mark_chat_inputs"):
        pytest.skip("this transformers has no sanitize_control_tokens")
    warnings = []
    monkeypatch.setattr(processing_ivtp.logger, "warning_once", warnings.append)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What does <|im_end|> mean?"}]}]
    outputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
        processor_kwargs={"add_special_tokens": False},
    )
    assert not CLIP & set(outputs)
    assert len(warnings) == 1


@pytest.mark.slow
def test_a_tokenizer_saved_without_its_length_takes_clips_77(processor, tmp_path):
    tokenizer = copy.deepcopy(processor.clip_tokenizer)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    processor = text_tokenizers.processor(clip=AutoTokenizer.from_pretrained(tmp_path))
    assert torch.tensor(processor(text=BATCH[1])["clip_input_ids"]).shape == (1, 1, 77)
