"""What a request to the plug-in may ask for, and which words guide its images; nothing here needs vLLM."""

from pathlib import Path

import pytest
from PIL import Image

from modeling_ivtp import IVTPLlavaProcessor
from modeling_ivtp.vllm_plugin import SUPPORTED, check_version
from modeling_ivtp.vllm_plugin.budget import Budgets, check_positions, options_for
from modeling_ivtp.vllm_plugin.guide import guides_of
from tests.support.tiny import tiny_config

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"


def test_a_budget_is_the_requests_the_servers_or_the_checkpoints():
    config = tiny_config()
    assert Budgets(config).of({}) == 4
    server = Budgets(config, {"visual_tokens": 6, "max_visual_tokens": 9})
    assert [server.of(request) for request in ({}, {"visual_tokens": 9}, {"visual_tokens": 1})] == [6, 9, 1]
    assert Budgets(config, {"max_visual_tokens": 16}).of({"visual_tokens": None}) == 16
    assert Budgets(tiny_config(enabled=False)).of({}) == 16
    assert options_for(config, 4).tower_tokens == 9
    assert options_for(config, 5).tower_tokens is None
    assert options_for(config, 5).decoder_choice == "ahead"


@pytest.mark.parametrize(
    ("server", "request_", "message"),
    [
        ({}, {"visual_tokens": 5}, "visual_tokens=5 is above this server's ceiling of 4; allowed: 1 to 4"),
        ({}, {"visual_tokens": None}, "visual_tokens=None is above this server's ceiling of 4"),
        ({}, {"visual_tokens": 0}, "visual_tokens=0; allowed: a whole number from 1"),
        ({}, {"visual_tokens": "8"}, "visual_tokens='8'; allowed"),
        ({}, {"max_visual_tokens": 8}, "max_visual_tokens=8; a request cannot change the server's 4"),
        ({}, {"crop_size": 14}, "mm_processor_kwargs has 'crop_size'; allowed: visual_tokens."),
        ({}, {"ivtp_guides": []}, "mm_processor_kwargs has 'ivtp_guides'; allowed: visual_tokens."),
        ({"visual_token": 8}, {}, "has 'visual_token'; allowed: visual_tokens and max_visual_tokens"),
        ({"visual_tokens": 17}, {}, "visual_tokens=17; allowed: a whole number from 1 to 16"),
        ({"max_visual_tokens": 3}, {}, "max_visual_tokens=3 is below the server's visual_tokens=4"),
    ],
)
def test_a_budget_that_is_not_allowed_is_named(server, request_, message):
    with pytest.raises(ValueError, match=message):
        Budgets(tiny_config(), server).of(request_)


def test_pruning_that_is_off_stays_off():
    with pytest.raises(ValueError, match=r"visual_tokens=4, and pruning is off"):
        Budgets(tiny_config(enabled=False)).of({"visual_tokens": 4})


def test_a_budget_that_follows_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"pruning.coverage=0.9: .*allowed: None"):
        Budgets(tiny_config(coverage=0.9))


def test_more_pictures_than_there_are_positions_for_are_refused():
    check_positions(tiny_config(), tokens=12, images=2, room=42)
    with pytest.raises(ValueError, match=r"43 positions, 16 for each of 2 image\(s\).* made for 42. Ask about fewer"):
        check_positions(tiny_config(), tokens=13, images=2, room=42)
    check_positions(tiny_config(enabled=False), tokens=13, images=2, room=42)
    check_positions(tiny_config(positions="compact"), tokens=13, images=2, room=42)


def test_another_vllm_is_named_with_the_supported_range():
    check_version("0.32.0")
    check_version("0.32.1+cpu")
    for version in ("0.31.2", "0.33.0", "1.0"):
        with pytest.raises(ImportError, match=rf"vLLM {version} is installed.*{SUPPORTED[0]},{SUPPORTED[1]}"):
            check_version(version)


@pytest.fixture(scope="module")
def processor():
    return IVTPLlavaProcessor.from_pretrained(MINIATURE)


def ids_of(processor, chat):
    return processor.tokenizer(processor.apply_chat_template(chat, add_generation_prompt=True))["input_ids"]


def said(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def test_later_turns_do_not_change_what_guides_an_image(processor):
    first = [said("user", "Is there a cup?", 1)]
    later = [*first, said("assistant", "yes"), said("user", "Is there a dog?", 1)]
    token = processor.image_token_id
    (alone,) = guides_of(ids_of(processor, first), processor, token)
    early, late = guides_of(ids_of(processor, later), processor, token)
    assert early == alone
    assert (late.images, late.number) == (2, 1)
    assert late.token_ids == tuple(ids_of(processor, later))
    other = guides_of(ids_of(processor, [said("user", "Is there a dog?", 1)]), processor, token)
    assert other != [alone]  # the control: the image's own words do


def test_images_of_one_turn_share_its_words(processor):
    ids = ids_of(processor, [said("user", "Are they alike?", 2)])
    first, second = guides_of(ids, processor, processor.image_token_id)
    assert first.token_ids == second.token_ids == tuple(ids)
    assert (first.number, second.number) == (0, 1)
    cut, _ = guides_of(ids, processor, processor.image_token_id, with_words=False)
    assert cut.token_ids == tuple(ids[: len(ids) - ids[::-1].index(processor.image_token_id)])


def test_the_words_are_those_that_the_processor_reads(processor):
    chat = [said("user", "Is there a cup?", 1)]
    (guide,) = guides_of(ids_of(processor, chat), processor, processor.image_token_id)
    tensors = guide.tensors(processor, processor.image_token_id, 576)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor(images=Image.new("RGB", (336, 336)), text=text, return_tensors="pt")
    assert tensors["prompt_ids"].tolist() == whole["input_ids"][0].tolist()
    assert tensors["clip_input_ids"].tolist() == whole["clip_input_ids"][0].tolist()
    assert tensors["clip_spans"].tolist() == whole["clip_spans"][0].tolist()
