"""A vLLM server answers as the transformers engine does with `decoder_choice="ahead"`, and keeps the same patches.

It needs vLLM, in an environment of its own: `make vllm-env`, then `make vllm-test`.
"""

import gc
import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.serving.engines import MINIATURE, TOWER, Engine, Transformers, held_out

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-env, then make vllm-test")

QUESTIONS = 60
TEXT_HALF = ("model.clip_text_model.", "model.visual_projection.")


@pytest.fixture(scope="module")
def right():
    return Transformers()


@pytest.fixture(scope="module")
def asked():
    return [(text, images) for text, images, _ in held_out(QUESTIONS)]


def started(**options):
    server = Engine(**options)
    yield server
    del server
    gc.collect()


@pytest.fixture(scope="module")
def guided():
    """Both stages, 64 tokens, and up to 192 for who asks."""
    yield from started(mm_processor_kwargs={"max_visual_tokens": 192})


def test_answers_and_patches_are_those_of_the_transformers_engine(guided, right, asked):
    outputs = guided.outputs(asked)
    assert len(outputs) == QUESTIONS
    agree = sum(
        list(output.outputs[0].token_ids) == right.answer(*question)
        for output, question in zip(outputs, asked, strict=True)
    )
    assert agree == QUESTIONS
    length = len(right.processor(images=asked[0][1], text=asked[0][0])["input_ids"][0])
    assert len(outputs[0].prompt_token_ids) == length - 576 + 64


def test_kept_patches_are_those_that_explain_shows(guided, right, asked):
    few = [(text.replace("ASSISTANT", " ASSISTANT"), images) for text, images in asked[:4]]  # not asked before
    guided.kept.clear()
    guided.answers(few)
    expected = [right.patches(*question)[0] for question in few]
    assert sorted(guided.kept) == sorted(expected)
    # The control: the picture alone keeps others.
    assert guided.kept != [right.patches(*question, guidance="visual_cls")[0] for question in few]


def test_budgets_pictures_and_texts_mix_in_a_batch(guided, right, asked):
    (text, one), (_, other) = asked[:2]
    two = "USER: <image>\n<image>\nIs there a cup in the picture? ASSISTANT:"
    requests = [
        (text, one),
        (text, one, {"visual_tokens": 192}),
        ("USER: Is there a cup in the picture? ASSISTANT:", []),
        (text, one, {"visual_tokens": 16}),
        (two, [*one, *other]),
        (two, [*other, *one], {"visual_tokens": 32}),
    ]
    budgets = [request[2]["visual_tokens"] if len(request) > 2 else 64 for request in requests]
    expected = [
        right.answer(*request[:2], visual_tokens=budget) for request, budget in zip(requests, budgets, strict=True)
    ]
    assert guided.answers(requests) == expected


def test_two_questions_about_a_picture_encode_it_once(guided, right):
    picture = [Image.new("RGB", (336, 336), (20, 160, 90))]
    before = guided.images.encoded
    requests = [
        (f"USER: <image>\nIs there a {thing} in the picture? ASSISTANT:", picture) for thing in ("cup", "dog", "fish")
    ]
    assert guided.answers(requests) == [right.answer(*request) for request in requests]
    assert guided.images.encoded == before + 1


def test_a_second_turn_reads_the_first_ones_picture_from_the_cache(guided, asked):
    text, images = asked[2]
    (first,) = guided.outputs([(text, images)])
    chosen, encoded = guided.images.chosen, guided.images.encoded
    later = f"{text}{first.outputs[0].text}</s>USER: Is there a dog in the picture? ASSISTANT:"
    (second,) = guided.outputs([(later, images)])
    assert (guided.images.chosen, guided.images.encoded) == (chosen, encoded)
    assert second.num_cached_tokens >= 64
    # The control: another question in the first turn keeps other patches, and they are chosen.
    guided.outputs([(later.replace("picture", "image", 1).replace("<image>\n", "<image>\nPlease. ", 1), images)])
    assert guided.images.chosen == chosen + 1


def test_chats_are_laid_out_as_the_processor_does(guided, right, asked):
    picture = {"type": "image_pil", "image_pil": asked[0][1][0]}
    first = [{"role": "user", "content": [picture, said("Is there a cup?")]}]
    later = [*first, {"role": "assistant", "content": "no"}, {"role": "user", "content": [said("Is there a dog?")]}]
    for chat in (first, later):
        (output,) = guided.llm.chat(chat, guided.sampling, use_tqdm=False)
        plain = [
            {**turn, "content": [{"type": "image"} if part == picture else part for part in parts_of(turn)]}
            for turn in chat
        ]
        text = right.processor.apply_chat_template(plain, add_generation_prompt=True)
        image = right.processor.image_token_id
        assert output.prompt_token_ids.count(image) == 64
        words = [token for token in right.processor.tokenizer(text)["input_ids"] if token != image]
        assert [token for token in output.prompt_token_ids if token != image] == words
        # In a later turn the picture keeps what its own turn kept; transformers would choose anew for a whole prompt.
        if chat is first:
            assert list(output.outputs[0].token_ids) == right.answer(text, asked[0][1])


def said(text):
    return {"type": "text", "text": text}


def parts_of(turn):
    return [said(turn["content"])] if isinstance(turn["content"], str) else turn["content"]


def test_a_budget_above_the_ceiling_is_refused(guided, asked):
    text, images = asked[0]
    with pytest.raises(ValueError, match="visual_tokens=193 is above this server's ceiling of 192; allowed: 1 to 192"):
        guided.outputs([(text, images, {"visual_tokens": 193})])
    assert len(guided.answers([(text, images)])) == 1


def test_prompts_in_chunks_and_under_preemption_answer_the_same(right, asked):
    """Chunks of 48 tokens cut images in two; so few blocks make requests wait for each other, and begin anew."""
    few = asked[:8]
    small = {"num_gpu_blocks_override": 11, "max_model_len": 256, "enable_prefix_caching": False}
    # Answers that go on after their end outgrow the blocks.
    sampling = vllm.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    generation = {"max_new_tokens": 24, "eos_token_id": -1}
    for server in started(max_num_batched_tokens=48, disable_log_stats=False, **small):
        expected = [right.answer(*question, generation) for question in few]
        assert server.answers(few, sampling) == expected
        assert server.metrics()["vllm:num_preemptions"] > 0


@pytest.mark.parametrize(
    ("options", "tokens"), [(TOWER, 64), ({"enabled": False}, 576), ({"positions": "compact"}, 64)], ids=str
)
def test_options_of_a_checkpoint_hold_on_the_server(right, asked, options, tokens):
    few = asked[:16]
    for server in started(hf_overrides={"pruning": options}):
        outputs = server.outputs(few)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [
            right.answer(*question, **options) for question in few
        ]
        assert all(output.prompt_token_ids.count(right.processor.image_token_id) == tokens for output in outputs)


@pytest.fixture(scope="module")
def without_clip(tmp_path_factory):
    """The miniature without CLIP's text half."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("clip_tokenizer", "*.safetensors"))
    weights = load_file(MINIATURE / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(TEXT_HALF)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"clip_text_config": None}))
    return folder


def test_without_a_text_tower_the_pictures_cls_guides_which_is_said_once(without_clip, asked, caplog):
    few, right = asked[:8], Transformers(without_clip)
    for server in started(model=without_clip):
        assert server.answers(few) == [right.answer(*question) for question in few]
    said = [record for record in caplog.records if "no CLIP text tower" in record.getMessage()]
    assert len(said) == 1


def test_strict_refuses_to_serve_without_a_text_tower(without_clip):
    with pytest.raises(ValueError, match=r"pruning.strict=True, and this checkpoint has no CLIP text tower"):
        Engine(without_clip, hf_overrides={"pruning": {"strict": True}})
