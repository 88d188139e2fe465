"""Which tokens are learned: answers and what ends them, under the turns of any chat template."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_ivtp.training.batches import IGNORED, Collator
from modeling_ivtp.training.conversation import write
from modeling_ivtp.training.data import Conversation, read_conversation
from modeling_ivtp.training.plan import count_tokens
from tests.support.conversations import ROWS, TEXT_ROW
from tests.support.text_tokenizers import CHATML_TEMPLATE, LLAVA_TEMPLATE, MISTRAL_TEMPLATE
from tests.support.text_tokenizers import processor as make_processor

TEMPLATES = {
    "llava": ({"chat_template": LLAVA_TEMPLATE}, (), ["brown</s>", "Is there? No, there is no dog.</s>"]),
    "none": ({"chat_template": None}, (), ["brown</s>", "Is there? No, there is no dog.</s>"]),
    "mistral": ({"chat_template": MISTRAL_TEMPLATE}, (), ["brown</s>", "Is there? No, there is no dog.</s>"]),
    "chatml": (
        {"chat_template": CHATML_TEMPLATE},
        ("<|im_start|>", "<|im_end|>"),
        ["brown<|im_end|>", "Is there? No, there is no dog.<|im_end|>"],
    ),
}
PICTURE = Image.new("RGB", (60, 60), "red")


def conversation(row, image=PICTURE):
    return read_conversation({**row, **({"image": image} if "image" in row else {})}, 0, Path())


def processor_of(name, **options):
    template, special, answers = TEMPLATES[name]
    return make_processor(*special, size=56, **template, **options), answers


def learned(processor, ids, labels):
    """The runs of learned tokens as text."""
    runs, current = [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return [processor.tokenizer.decode(run).strip() for run in [*runs, *([current] if current else [])]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learned_and_nothing_else(name):
    processor, answers = processor_of(name)
    rows = [conversation(ROWS[0]), conversation(TEXT_ROW), conversation(ROWS[2])]
    batch = Collator(processor, 256)(rows)
    assert learned(processor, batch["input_ids"][0], batch["labels"][0]) == answers
    end = answers[0].removeprefix("brown")
    assert learned(processor, batch["input_ids"][1], batch["labels"][1]) == [f"Because.{end}"]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert batch["pixel_values"].shape[0] == 2
    alone = Collator(processor, 256)(rows[1:2])
    length = alone["input_ids"].shape[1]
    assert torch.equal(alone["labels"][0], batch["labels"][1, :length])
    assert "pixel_values" not in alone


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_special_token_in_an_answer_s_own_words_does_not_end_it(name):
    processor, answers = processor_of(name)
    end = answers[0].removeprefix("brown")
    rows = [{"conversations": [TEXT_ROW["conversations"][0], {"from": "gpt", "value": f"It is {end}"}]}]
    batch = Collator(processor, 256)([conversation(row) for row in rows])
    (run,) = learned(processor, batch["input_ids"][0], batch["labels"][0])
    assert run.replace(" ", "") == f"Itis{end}{end}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("words", ["s", "/", ">", "d", "im", "end"])
def test_an_answer_that_is_part_of_the_end_token_is_ended_once(name, words):
    processor, answers = processor_of(name)
    end = answers[0].removeprefix("brown")
    rows = [{"conversations": [TEXT_ROW["conversations"][0], {"from": "gpt", "value": words}]}]
    batch = Collator(processor, 256)([conversation(row) for row in rows])
    assert learned(processor, batch["input_ids"][0], batch["labels"][0]) == [f"{words}{end}"]


@pytest.mark.parametrize("name", ["llava", "mistral", "chatml"])
def test_a_first_answer_follows_the_very_tokens_that_are_asked_with(name):
    processor, _ = processor_of(name)
    row = conversation(ROWS[0])
    question = [{"type": "image"}, {"type": "text", "text": "What is the colour of the bird?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    asked = processor(images=PICTURE, text=prompt, return_tensors="pt")["input_ids"][0]
    batch = Collator(processor, 256)([row])
    assert torch.equal(batch["input_ids"][0, : len(asked)], asked)
    first = (batch["labels"][0] != IGNORED).nonzero()[0].item()
    assert first >= len(asked)
    between = processor.tokenizer.decode(batch["input_ids"][0, len(asked) : first])
    assert not between.strip()


def test_pictures_in_the_middle_of_a_question_stand_before_it():
    row = Conversation("row", (PICTURE,), (("user", "Look at <image> this."), ("assistant", "So.")))
    processor, _ = processor_of("llava")
    assert write(processor, row).text == "USER: <image>\nLook at  this. ASSISTANT: So.</s>"


def test_a_template_that_changes_earlier_turns_is_refused():
    changing = "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{{ m['content'][-1]['text'] }}{% endfor %}"
    processor = make_processor(size=56, chat_template=changing)
    with pytest.raises(ValueError, match="changes earlier turns"):
        write(processor, conversation(ROWS[0]))


def test_what_is_too_long_is_cut_and_what_then_has_no_answer_refused():
    processor, _ = processor_of("llava")
    whole = Collator(processor, 256)([conversation(ROWS[0])])
    first = (whole["labels"][0] != IGNORED).nonzero()[0].item()
    cut = Collator(processor, first + 1)([conversation(ROWS[0])])
    for name in ("input_ids", "labels", "attention_mask", "clip_spans"):
        assert torch.equal(cut[name], whole[name][:, : first + 1])
    with pytest.raises(ValueError, match=r"row 0 \(id picture-0\): no answer is left in max_length="):
        Collator(processor, first)([conversation(ROWS[0])])
    with pytest.raises(ValueError, match="its pictures do not fit into max_length=10"):
        Collator(processor, 10)([conversation(ROWS[0])])


def test_tokens_are_counted_without_pictures_as_batches_have_them():
    processor, _ = processor_of("llava")
    rows = [conversation(row) for row in (*ROWS[:3], TEXT_ROW)]
    counted = count_tokens(processor, rows, 16, 256, False)
    batches = [Collator(processor, 256)([row]) for row in rows]
    image = [int((batch["input_ids"] == processor.image_token_id).sum()) for batch in batches]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert counted.image == sum(image) == 48
    assert counted.text == sum(lengths) - 48
    assert counted.learned == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    assert (counted.longest, counted.cut) == (max(lengths), 0)
    assert count_tokens(processor, rows[:3], 16, max(lengths) - 1, False).cut >= 1
