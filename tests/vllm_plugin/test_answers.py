"""A vLLM server answers as the transformers engine does with `decoder_choice="ahead"`, and keeps the same patches.

It needs vLLM, in an environment of its own: `make vllm-env`, then `make vllm-test`.
"""

import gc
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.quality.world import sample_questions
from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.vllm_plugin import register

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm-env, then make vllm-test")

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
TYPES = ("existence", "colour", "corner", "left_of", "above", "larger")
QUESTIONS, NEW_TOKENS = 60, 4
TOWER = {"decoder_layers": 0, "tower_tokens": None}


class Transformers:
    """The other engine, which says what is right."""

    def __init__(self):
        pruning = {"decoder_choice": "ahead"}
        self.model = IVTPLlavaForConditionalGeneration.from_pretrained(
            MINIATURE, dtype=torch.float32, pruning=pruning
        ).eval()
        self.processor = IVTPLlavaProcessor.from_pretrained(MINIATURE)

    def answer(self, text, images, generation=None, **options):
        inputs = self.processor(images=images or None, text=text, return_tensors="pt")
        generation = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | (generation or {})
        with torch.no_grad(), self.model.pruning(**options):
            tokens = self.model.generate(**inputs, **generation)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    def patches(self, text, images, **options):
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        with self.model.pruning(**options):
            return [image.groups[-1].kept.tolist() for image in self.model.explain(**inputs).images]


@pytest.fixture(scope="module")
def right():
    return Transformers()


@pytest.fixture(scope="module")
def asked():
    sampled = islice(sample_questions("validation", QUESTIONS, TYPES), QUESTIONS)
    return [(question.prompt, [Image.fromarray(scene.pixels)]) for scene, question in sampled]


class Server:
    """vLLM on the miniature, and the patches that it kept."""

    def __init__(self, **options):
        register()
        usual = {"max_model_len": 2048, "max_num_seqs": 16, "block_size": 32, "limit_mm_per_prompt": {"image": 4}}
        options = usual | options
        self.llm = vllm.LLM(str(MINIATURE), dtype="float32", enforce_eager=True, **options)
        self.images = self.llm.apply_model(lambda model: model.images)[0]
        self.kept, features_of = [], self.images.features_of

        def noted(items):
            found = features_of(items)
            self.kept.extend(patches.tolist() for _, patches in found)
            return found

        self.images.features_of = noted

    def outputs(self, requests, sampling=None):
        sampling = sampling or vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        prompts = []
        for text, images, *options in requests:
            prompt = {"prompt": text}
            if images:
                prompt |= {"multi_modal_data": {"image": images}}
            if options:
                prompt |= {"mm_processor_kwargs": options[0]}
            prompts.append(prompt)
        return self.llm.generate(prompts, sampling, use_tqdm=False)

    def answers(self, requests, sampling=None):
        return [list(output.outputs[0].token_ids) for output in self.outputs(requests, sampling)]


def started(**options):
    server = Server(**options)
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
        counted = {metric.name: getattr(metric, "value", 0) for metric in server.llm.get_metrics()}
        assert counted["vllm:num_preemptions"] > 0


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
