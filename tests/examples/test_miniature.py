"""The miniature that ships: small, quick to load, and it sees."""

import json
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.quality.assemble import leave_out_code
from benchmarks.quality.checkpoint import check_world
from benchmarks.quality.world import sample_questions
from examples.demo import MINIATURE
from modeling_ivtp.serving.answering import load_model

TYPES = ("existence", "colour", "corner", "left_of", "above", "larger")


@pytest.fixture(scope="module")
def loaded():
    start = time.perf_counter()
    model, processor = load_model(MINIATURE, device="cpu", dtype="float32")
    # Two seconds on a machine that does nothing else; tests share theirs.
    assert time.perf_counter() - start < 20
    return model, processor


@pytest.mark.slow
def test_it_is_small_and_of_this_world(loaded):
    assert sum(file.stat().st_size for file in MINIATURE.rglob("*") if file.is_file()) < 40e6
    assert not list(MINIATURE.rglob("*.py"))
    check_world(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "least"), [({"enabled": False}, 0.9), ({"visual_tokens": 64}, 0.75)])
@torch.no_grad()
def test_it_answers_questions_about_scenes_it_has_never_seen(loaded, options, least):
    model, processor = loaded
    asked, right = sample_questions("validation", 48, TYPES), []
    while batch := list(islice(asked, 12)):
        images = [Image.fromarray(scene.pixels) for scene, _ in batch]
        inputs = processor(images=images, text=[one.prompt for _, one in batch], padding=True, return_tensors="pt")
        with model.pruning(**options):
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [one.strip() == question.answer for one, (_, question) in zip(said, batch, strict=True)]
    assert len(right) == 48
    assert sum(right) / len(right) >= least


def test_its_template_takes_plain_text_and_marks_the_answer(loaded):
    """As `assistant_only_loss` needs it: what a trainer masks is what the miniature was taught to say."""
    _, processor = loaded
    question, answer = "Is there a cup?", "yes"
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    chats = [
        [{"role": "user", "content": parts}, {"role": "assistant", "content": content}]
        for content in (answer, [{"type": "text", "text": answer}])
    ]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    assert texts == [f"USER: <image>\n{question} ASSISTANT: {answer}</s>"] * 2
    assert processor.apply_chat_template(chats[0][:1], add_generation_prompt=True) == texts[0].removesuffix(" yes</s>")
    plain = processor.tokenizer.apply_chat_template(
        chats[0], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    taught = [token for token, kept in zip(plain["input_ids"], plain["assistant_masks"], strict=True) if kept]
    assert processor.tokenizer.convert_ids_to_tokens(taught) == ["▁yes", "</s>"]


@pytest.mark.slow
def test_a_checkpoint_without_code_names_none(tmp_path: Path):
    (tmp_path / "modeling.py").write_text("")
    (tmp_path / "inner").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"a": "b"}, "kept": {"auto_map": 1, "c": [1]}}))
    (tmp_path / "inner" / "other.json").write_text('{"d": 1}')
    leave_out_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert json.loads((tmp_path / "config.json").read_text()) == {"kept": {"c": [1]}}
    assert (tmp_path / "inner" / "other.json").read_text() == '{"d": 1}'
