"""From a benchmark's chat to a prompt, its generation arguments, and the arm that answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor

from modeling_ivtp import trained
from modeling_ivtp.evaluation.answerer import DEFAULT_NEW_TOKENS, Generation
from modeling_ivtp.evaluation.arm import Arm, arms_of
from modeling_ivtp.evaluation.prompts import VICUNA, as_square, prompt_of
from modeling_ivtp.evaluation.tables import costs
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import SIDE, prompt, tiny_model
from tests.support.trained import ROWS, ready

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() }}: {% endif %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    made = make_processor(size=SIDE)
    made.chat_template = TEMPLATE
    return made


def picture(width: int = 8, height: int = 8) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def image(url: Any) -> dict[str, Any]:
    return {"type": "image", "url": url}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_a_question_becomes_the_template_s_prompt(processor: Any) -> None:
    found = prompt_of([user(image(picture()), image(picture()), text("Same?\nAnswer yes or no."))], processor)
    assert found.text == "USER: <image>\n<image>\nSame?\nAnswer yes or no. ASSISTANT:"
    assert [shown.size for shown in found.images] == [(8, 8), (8, 8)]
    assert prompt_of([{"role": "user", "content": "Why?"}], processor).text == "USER: Why? ASSISTANT:"


def test_the_published_system_prompt_stands_before_the_question(processor: Any) -> None:
    chat = [user(image(picture()), text("Why?"))]
    assert prompt_of(chat, processor, system_prompt=VICUNA).text == f"{VICUNA} USER: <image>\nWhy? ASSISTANT:"
    own = [{"role": "system", "content": "Be brief."}, *chat]
    assert prompt_of(own, processor, system_prompt=VICUNA).text == "Be brief. USER: <image>\nWhy? ASSISTANT:"


def test_a_chat_of_several_messages_is_rendered(processor: Any) -> None:
    chat = [user(image(picture()), text("Who?")), {"role": "assistant", "content": "A cat."}, user(text("Where?"))]
    assert prompt_of(chat, processor).text == "USER: <image>\nWho? ASSISTANT: A cat. USER: Where? ASSISTANT:"
    bare = make_processor(size=SIDE, chat_template=None)
    with pytest.raises(ValueError, match="no chat template, so it can be asked single questions only"):
        prompt_of(chat, bare)
    assert prompt_of(chat[:1], bare).text == "USER: <image>\nWho? ASSISTANT:"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (user({"type": "video", "url": "a.mp4"}), "comes with video; LLaVA reads text and pictures only"),
        (user({"type": "audio", "url": "a.wav"}), "comes with audio"),
        (user({"type": "depth", "url": "a"}), "type='depth' of a part; allowed: text, image"),
        ({"role": "tool", "content": "a"}, "role='tool'; allowed: system, user, assistant"),
        (user(image(picture()), text("<image> <image> Same?")), "the prompt has 2 <image>, but came with 1 image"),
        (user(image(picture()), text("")), "the prompt is empty"),
    ],
)
def test_other_content_is_refused(processor: Any, message: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        prompt_of([message], processor)


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (6, 5), (7, 7)])
def test_pictures_are_padded_as_llava_s_own_processor_pads(processor: Any, size: tuple[int, int]) -> None:
    mean = processor.image_processor.image_mean
    shown = picture(*size)
    padded = np.asarray(as_square(shown, mean))
    theirs = LlavaImageProcessor().pad_to_square(
        torch.from_numpy(np.array(shown)).permute(2, 0, 1), tuple(int(value * 255) for value in mean)
    )
    assert (padded == theirs.permute(1, 2, 0).numpy()).all()
    found = prompt_of([user(image(shown), text("?"))], processor, pad=True)
    assert found.images[0].size == (max(size), max(size))


def test_generation_arguments_are_greedy_unless_there_is_a_temperature() -> None:
    assert Generation.of({}).arguments == {"max_new_tokens": DEFAULT_NEW_TOKENS, "num_beams": 1, "do_sample": False}
    greedy = Generation.of({"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16, "until": ["\n\n", ""]})
    assert greedy.arguments == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert greedy.until == ("\n\n",)
    sampled = Generation.of({"temperature": 0.2, "top_p": 0.9, "num_beams": 2, "until": "x"}).arguments
    assert sampled == {
        "max_new_tokens": DEFAULT_NEW_TOKENS,
        "num_beams": 2,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    with pytest.raises(ValueError, match="generation argument heat, size; allowed: until, max_new_tokens"):
        Generation.of({"heat": 1, "size": 2})
    with pytest.raises(ValueError, match=r"until=\[1\]; allowed: a text, or a list of texts"):
        Generation.of({"until": [1]})


def test_an_answer_ends_before_its_first_stop() -> None:
    generation = Generation.of({"until": ["END", "\n\n"]})
    assert generation.cut(" one\ntwo\n\nthree END ") == "one\ntwo"
    assert generation.cut("one END two") == "one"
    assert generation.cut(" one ") == "one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magic",), "method='magic'; allowed: unpruned, random, topk"),
        (("ivtp", 0), "visual_tokens=0; allowed: a whole number from 1"),
        (("ivtp", True), "visual_tokens=True; allowed"),
        (("unpruned", 4), "visual_tokens=4 with method='unpruned'"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arm(*arguments)


def test_a_budget_below_the_least_of_a_checkpoint_is_what_its_costs_say() -> None:
    model = tiny_model(visual_tokens=8, tower_tokens=None, coverage=0.9, min_visual_tokens=6)
    arm = Arm("ivtp", 4)
    with arm.applied(model):
        assert model.model.plan().final_tokens == 4 == costs(model.config, arm)["final_tokens"]
        assert model.pruning_config.coverage == 0.9
    assert model.pruning_config.min_visual_tokens == 6


def test_the_method_unpruned_is_the_unpruned_arm_alone() -> None:
    assert arms_of(["unpruned"], []) == [Arm("unpruned")]
    assert arms_of(["unpruned", "fastv"], [16]) == [Arm("unpruned"), Arm("fastv", 16)]
    assert arms_of([], []) == [Arm("unpruned"), Arm("ivtp", 64)]


@pytest.mark.filterwarnings("error")
def test_the_old_name_of_no_pruning_warns_and_is_the_unpruned_arm() -> None:
    with pytest.warns(FutureWarning, match="'none' is now 'unpruned'") as warned:
        arm = Arm("none")
    assert warned[0].filename == __file__
    assert (arm, arm.name) == (Arm("unpruned"), "unpruned")
    with pytest.warns(FutureWarning, match="'none' is now 'unpruned'"):
        assert arms_of(["none", "fastv"], [4]) == [Arm("unpruned"), Arm("fastv", 4)]


def test_an_arm_prunes_as_it_says_and_leaves_no_trace() -> None:
    model = tiny_model()
    own = model.pruning_config

    def final(arm: Arm) -> int:
        with arm.applied(model):
            plan = model.model.plan()
            return model.config.num_patches if plan is None else plan.final_tokens

    assert [final(arm) for arm in (Arm("unpruned"), Arm(), Arm("ivtp", 2), Arm("ivtp", 12), Arm("fastv", 3))] == [
        16,
        4,
        2,
        12,
        3,
    ]
    assert model.pruning_config == own
    described = [
        Arm(*arm).described(model) for arm in (("unpruned",), ("ivtp",), ("ivtp", 4), ("ivtp", 2), ("fastv", 2))
    ]
    assert described[1] == described[2]
    assert len({str(each) for each in described}) == 4
    assert described[4]["keep"] == 2


def test_a_trained_pruner_s_folder_is_an_arm(tmp_path: Path) -> None:
    model = tiny_model()
    method = ready(trained.LVPruning(ratio=0.6), model)
    method.save(tmp_path / "mine")
    arms = arms_of([str(tmp_path / "mine"), "fastv"], [3])
    assert [arm.name for arm in arms] == ["unpruned", "mine@3", "fastv@3"]
    with method.changed(keep=3)(model):
        wanted = model(**prompt(ROWS)).logits
    with arms[1].applied(model):
        assert model.model.plan().final_tokens == 3
        assert torch.equal(model(**prompt(ROWS)).logits, wanted)
    with Arm(str(tmp_path / "mine")).applied(model):
        own = model.model.plan()
    with method(model):
        assert model.model.plan() == own
    before = arms[1].described(model)
    assert before != Arm(str(tmp_path / "mine"), 4).described(model)
    ready(trained.LVPruning(ratio=0.6), model, seed=4).save(tmp_path / "mine", overwrite=True)
    assert arms[1].described(model) != before
    (tmp_path / "other").mkdir()
    method.save(tmp_path / "other" / "mine")
    with pytest.raises(ValueError, match="2 methods have the name mine@3; give each folder another one"):
        arms_of([str(tmp_path / "mine"), str(tmp_path / "other" / "mine")], [3])
    with pytest.raises(ValueError, match="or the folder of a trained pruner"):
        Arm(str(tmp_path / "other"))


def test_the_cost_of_a_trained_pruner_is_counted(tmp_path: Path) -> None:
    model = tiny_model()
    ready(trained.LVPruning(ratio=0.6), model).save(tmp_path / "mine")
    mine, unpruned = (costs(model.config, arm) for arm in (Arm(str(tmp_path / "mine"), 3), Arm("unpruned")))
    assert mine["final_tokens"] == 3
    assert unpruned["final_tokens"] == 16
    assert mine["tflops"] != unpruned["tflops"]
    own, same = costs(model.config, Arm()), costs(model.config, Arm("ivtp", model.config.pruning.visual_tokens))
    assert own == same
