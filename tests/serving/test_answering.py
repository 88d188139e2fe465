"""A question becomes the prompt that the model was trained on, however a person writes it down."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import ivtp_cli
from modeling_ivtp.serving.answering import as_prompt, set_budget
from tests.support import text_tokenizers
from tests.support.tiny import PATCHES, tiny_model

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "examples" / "miniature"
SCENE = ROOT / "hub_cards" / "ivtp-llava-miniature" / "images" / "scene.png"
QUESTION = "The tree is on a tile of which colour?"
CHATML_START = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"
CHATML_END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def images_first() -> Any:
    return text_tokenizers.processor(chat_template=text_tokenizers.LLAVA_TEMPLATE)


@pytest.fixture(scope="module")
def images_in_place() -> Any:
    return text_tokenizers.processor("<|im_start|>", "<|im_end|>", chat_template=text_tokenizers.CHATML_TEMPLATE)


@pytest.mark.parametrize(
    ("text", "images", "first", "in_place"),
    [
        ("What is it?", 1, "<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("<image>\nWhat is it?", 1, "<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("<image> What is it?", 1, "<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("What is it?\n<image>", 1, "<image>\nWhat is it?", "What is it?<image>\n"),
        ("A <image> or\n<image>?", 2, "<image>\n<image>\nA   or ?", "A <image>\n or<image>\n?"),
        ("What is it?", 0, "What is it?", "What is it?"),
    ],
)
def test_text_without_role_markers_goes_through_the_template(
    images_first: Any, images_in_place: Any, text: str, images: int, first: str, in_place: str
) -> None:
    assert as_prompt(images_first, text, images) == f"USER: {first} ASSISTANT:"
    assert as_prompt(images_in_place, text, images) == f"{CHATML_START}{in_place}{CHATML_END}"


def test_without_a_template_images_stay_where_they_are() -> None:
    processor = text_tokenizers.processor(chat_template=None)
    assert as_prompt(processor, "What is it?\n<image>", 1) == "USER: What is it?\n<image> ASSISTANT:"
    assert as_prompt(processor, "What is it?", 2) == "USER: <image>\n<image>\nWhat is it? ASSISTANT:"


WHOLE = [
    "USER: <image>\nWhat is it? ASSISTANT:",
    "A chat between a user and an assistant. USER: <image>\nWhat is it? ASSISTANT: A bird",
    "You are helpful USER: <image>\nWhat is it ASSISTANT:",
    "User: <image>\nWhat is it?\nAssistant:",
    "Human: <image>\nWhat is it? Assistant:",
    "A chat.###Human: <image>\nWhat is it?###Assistant:",
    "GPT4 Correct User: <image>\nWhat is it?<|end_of_turn|>GPT4 Correct Assistant:",
    "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
    "[INST] <image>\nWhat is it? [/INST]",
    "<image>\nWhat is it? ASSISTANT:",
    "USER: <image>\nWhat is it?",
]


@pytest.mark.parametrize("text", WHOLE)
def test_text_with_role_markers_is_a_whole_prompt(images_first: Any, images_in_place: Any, text: str) -> None:
    for processor in (images_first, images_in_place):
        assert as_prompt(processor, text, 1) == text
        words = [text[slice(*span)] for span in processor.instruction_ranges(text)]
        assert [word.rstrip("?") for word in words] == ["What is it"]


@pytest.mark.parametrize(
    "question",
    [
        "What does USER: on the sign mean?",
        "Which name is written after User: here?",
        "What stands after ASSISTANT: in the picture?",
        'What do "User:" and "Assistant:" mean?',
        "Who wrote this? User: admin",
        "Is it the Human: or the dog?",
        'Read the text after "[INST]" to me.',
        "Human: who says that?",
    ],
)
def test_a_marker_word_inside_a_question_does_not_cut_it(
    images_first: Any, images_in_place: Any, question: str
) -> None:
    for processor in (images_first, images_in_place):
        prompt = as_prompt(processor, question, 1)
        assert prompt == as_prompt(processor, f"<image> {question}", 1)
        assert question in prompt
        assert prompt != question
        assert [prompt[slice(*span)] for span in processor.instruction_ranges(prompt)] == [question]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> and <image>?", 1, "the prompt has 2 <image>, but came with 1 image(s)"),
        ("USER: What is it? ASSISTANT:", 1, "the prompt has 0 <image>, but came with 1 image(s)"),
        (" \n", 0, "the prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_are_refused(images_first: Any, text: str, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        as_prompt(images_first, text, images)


def test_a_budget_prunes_where_the_checkpoint_has_pruning_off() -> None:
    model = tiny_model(enabled=False)
    set_budget(model, PATCHES)
    assert model.config.pruning_plan() is None
    set_budget(model, 3)
    plan = model.config.pruning_plan()
    assert plan is not None
    assert plan.final_tokens == 3


def test_a_budget_of_all_patches_leaves_a_connector_alone() -> None:
    model = tiny_model(connector={"name": "c_abstractor", "tokens": 4})
    set_budget(model, PATCHES)
    assert not model.pruning_config.enabled


@pytest.mark.slow
def test_llavas_own_form_is_answered_by_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    traces = []
    for text in (QUESTION, f"<image>\n{QUESTION}"):
        asked = ["-m", str(MINIATURE), "-i", str(SCENE), "-p", text]
        capsys.readouterr()
        assert ivtp_cli.main(["generate", *asked, "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out == "yellow\n"
        assert ivtp_cli.main(["explain", *asked, "--json", str(tmp_path / "trace.json")]) == 0
        traces.append(json.loads((tmp_path / "trace.json").read_text()))
    assert traces[0] == traces[1]
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": str(SCENE), "question": f"<image>\n{QUESTION}"}) + "\n")
    answers = ["--out", str(tmp_path / "answers"), "--max-new-tokens", "4", "--no-progress"]
    assert ivtp_cli.main(["batch", "-m", str(MINIATURE), "--data", str(rows), *answers]) == 0
    (file,) = (tmp_path / "answers").glob("*.parquet")
    assert parquet.read_table(file)["answer"].to_pylist() == ["yellow"]
