"""`generate()` prunes without its user noticing: every decoding strategy, batches, turns, caches, compiled or not."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache, TextIteratorStreamer

from modeling_ivtp.model.pruned_cache import layer_segments
from tests.support.tiny import IMAGE_TOKEN, image_features, prompt, rows_alone, tiny_model

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3], [1, "image", "image", 2]]
NEW = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


STRATEGIES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "beam search with several returns": {"num_beams": 4, "num_return_sequences": 3},
    "beam search with a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_gives_what_its_rows_give_alone(model, strategy):
    inputs = prompt(ROWS)
    together = generate(model, inputs, **STRATEGIES[strategy])
    alone = torch.cat([generate(model, row, **STRATEGIES[strategy]) for row in rows_alone(inputs, ROWS)])
    assert torch.equal(together, alone)


def test_sampling_sees_the_same_logits_in_a_batch_and_alone(model):
    inputs = prompt(ROWS)
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=True, return_dict_in_generate=True, output_logits=True
    )
    new = sampled.sequences[:, inputs["input_ids"].shape[1] :]
    for index, row in enumerate(rows_alone(inputs, ROWS)):
        steps = Replay(new[index])
        alone = model.generate(
            **row, max_new_tokens=NEW, do_sample=True, logits_processor=[steps], return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        for mine, theirs in zip(alone.logits, sampled.logits, strict=True):
            torch.testing.assert_close(mine[0], theirs[index], atol=1e-5, rtol=0)


class Replay:
    """Makes sampling take given tokens."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[self.step]] = 0
        self.step += 1
        return forced


def test_prompt_lookup_gives_the_greedy_answer(model):
    (row,) = rows_alone(prompt(ROWS[2:3]), ROWS[2:3])
    assert torch.equal(
        generate(model, row, prompt_lookup_num_tokens=3, max_new_tokens=20), generate(model, row, max_new_tokens=20)
    )


@pytest.mark.parametrize("assistant", ["pruned", "language model"])
def test_assisted_decoding_gives_the_greedy_answer(model, assistant):
    from transformers import LlamaForCausalLM

    helper = tiny_model(seed=1)
    if assistant == "language model":
        helper = LlamaForCausalLM(model.config.text_config).eval()
        helper.generation_config.eos_token_id = None
    (row,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    assert torch.equal(
        generate(model, row, assistant_model=helper, max_new_tokens=12), generate(model, row, max_new_tokens=12)
    )


@pytest.mark.parametrize("helper", ["fewer tokens", "unpruned", "stock", "another width"])
def test_an_assistant_that_sees_drafts_from_its_own_features(model, helper):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    assistant = tiny_model(seed=1)
    if helper == "fewer tokens":
        assistant.set_pruning(visual_tokens=2, tower_tokens=4)
    elif helper == "unpruned":
        assistant.set_pruning(enabled=False)
    elif helper == "stock":
        config = LlavaConfig.from_dict(model.config.to_dict() | {"model_type": "llava"})
        assistant = LlavaForConditionalGeneration(config).eval()
        assistant.generation_config.eos_token_id = None
    else:
        assistant = tiny_model(seed=1, width=48)
    (row,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    assert torch.equal(
        generate(model, row, assistant_model=assistant, max_new_tokens=12), generate(model, row, max_new_tokens=12)
    )


def test_an_assistant_like_the_model_has_all_its_drafts_accepted(model, monkeypatch):
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    accepted = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def watched(self, input_ids, scores, matches):
        accepted.append((int(matches), scores.shape[1] - 1))
        return update(self, input_ids, scores, matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", watched)
    (row,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    with model.pruning(enabled=False):
        expected = generate(model, row, max_new_tokens=12)
    unpruned = tiny_model(enabled=False)
    # The pruned model drafts for the same weights unpruned: what it drafts must be its own answer.
    assert torch.equal(generate(unpruned, row, assistant_model=model, max_new_tokens=12), expected)
    own = generate(model, row, max_new_tokens=12)
    accepted.clear()
    assert torch.equal(generate(model, row, assistant_model=tiny_model(), max_new_tokens=12), own)
    assert accepted
    assert all(matches == drafted for matches, drafted in accepted)


def test_streaming_yields_the_answer_token_by_token(model):
    class Numbers:
        def decode(self, tokens, **kwargs):
            return "".join(f"{int(token)} " for token in tokens)

    (row,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)
    answer = generate(model, row, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in answer[0].tolist()]


def test_embeddings_instead_of_token_numbers_give_the_same_answer(model):
    inputs = prompt(ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    answer = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(answer, generate(model, inputs))


def test_a_text_only_batch_is_untouched(model):
    inputs = prompt([[5], [9]])
    with model.pruning(enabled=False):
        expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("second", [[6], [4, "image", 6]], ids=["text", "new image"])
def test_a_second_turn_goes_on_with_the_first_turns_cache(model, cache, second):
    rows = [[3, "image", 7]]
    first = prompt(rows)
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=100)
    answered = model.generate(**first, past_key_values=past, max_new_tokens=4, do_sample=False)
    turn = prompt([second], seed=7)
    ids = torch.cat([answered, turn["input_ids"]], 1)
    spans = torch.nn.functional.pad(turn["clip_spans"], (0, 0, answered.shape[1], 0))
    turns = turn | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "clip_spans": spans}
    answer = model.generate(**turns, past_key_values=past, max_new_tokens=NEW, do_sample=False)[:, ids.shape[1] :]

    # The same by hand, one forward pass a token.
    past = DynamicCache()
    logits = model(**first, past_key_values=past).logits
    for token in answered[0, first["input_ids"].shape[1] :]:
        assert logits[0, -1].argmax() == token
        last = logits = model(input_ids=token[None, None], past_key_values=past).logits
    # generate() never feeds its last token, so it belongs to the second turn.
    past.crop(-1)
    lead = answered[:, -1:]
    new = torch.cat([lead, turn["input_ids"]], 1)
    spans = torch.nn.functional.pad(turn["clip_spans"], (0, 0, 1, 0))
    extra = {"pixel_values": turn["pixel_values"]} if "pixel_values" in turn else {}
    logits = model(
        input_ids=new, clip_input_ids=turn["clip_input_ids"], clip_spans=spans, past_key_values=past, **extra
    ).logits
    assert last is not None
    for token in answer[0]:
        assert logits[0, -1].argmax() == token
        logits = model(input_ids=token[None, None], past_key_values=past).logits


def test_a_first_turn_without_image_is_followed_by_one_with(model):
    first, turn = prompt([[6]]), prompt([[2, "image", 6]], seed=7)
    past = DynamicCache(config=model.config.text_config)
    answered = model.generate(**first, past_key_values=past, max_new_tokens=4, do_sample=False)
    ids = torch.cat([answered, turn["input_ids"]], 1)
    spans = torch.nn.functional.pad(turn["clip_spans"], (0, 0, answered.shape[1], 0))
    turns = turn | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "clip_spans": spans}
    answer = model.generate(**turns, past_key_values=past, max_new_tokens=NEW, do_sample=False)
    whole = model.generate(**turns, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(answer, whole)
    assert past.layers[-1].keys.shape[2] == answer.shape[1] - 1 - 12


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_a_static_cache_compiles_to_one_graph(attention, monkeypatch):
    """What `generate` does by itself on a GPU; the backend runs the captured graph as it is."""
    model = tiny_model(attention=attention)
    inputs = prompt(ROWS[:1] + ROWS[3:])
    options = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True, backend="eager")}
    expected = generate(model, inputs, cache_implementation="static")
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args, **kwargs: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(model, inputs, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_cache_holds_what_each_layer_saw(model):
    (row,) = rows_alone(prompt(ROWS[:1]), ROWS[:1])
    out = model.generate(**row, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    text = 3 + 7 + 2
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [text + n for n in (9, 9, 6, 6, 4, 4)]
    assert out.past_key_values.get_seq_length() == text + 16


def test_a_quantized_cache_is_refused_with_the_way_out(model):
    from transformers.cache_utils import Cache, QuantizedLayer

    class Quantized(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    cache = Cache(layers=[Quantized() for _ in range(6)])
    with pytest.raises(ValueError, match=r"Quantized cannot. Use a DynamicCache or StaticCache"):
        model(**prompt(ROWS[:1]), past_key_values=cache)


def test_chunked_prefill_is_refused_with_the_way_out(model):
    with pytest.raises(ValueError, match=r"prefill_chunk_size=4.*Use prefill_chunk_size=None"):
        generate(model, prompt(ROWS[:1]), prefill_chunk_size=4)
    with model.pruning(enabled=False):
        text = prompt([[9]])
        assert torch.equal(generate(model, text, prefill_chunk_size=4), generate(model, text))


def test_no_cache_gives_the_answer_of_the_cache(model):
    inputs = prompt(ROWS)
    assert torch.equal(generate(model, inputs, use_cache=False), generate(model, inputs))


@pytest.mark.slow
def test_ten_thousand_words_are_an_instruction(model):
    inputs = prompt([[3, "image", 10_000]])
    outputs = model(**inputs, logits_to_keep=1)
    assert outputs.past_key_values.get_seq_length() == 10_019
    assert outputs.past_key_values.layers[-1].keys.shape[2] == 10_003 + 4


def test_tensor_parallel_heads_are_refused_with_the_way_out():
    model = tiny_model()
    attention = model.model.language_model.layers[0].self_attn
    for name, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        setattr(attention, name, torch.nn.Linear(32, 8 * heads))
    with pytest.raises(ValueError, match=r"2 of 4 heads.*Use device_map"):
        model(**prompt(ROWS[:1]))


def test_cropping_into_the_picture_is_refused(model):
    past = DynamicCache()
    model(**prompt(ROWS[:1]), past_key_values=past)
    with pytest.raises(ValueError, match="at most 7"):
        past.crop(-8)
    past.crop(-7)
    assert past.get_seq_length() == 19


@torch.no_grad()
def test_a_cropped_static_cache_goes_on_as_if_the_tokens_had_never_come(model):
    inputs = prompt(ROWS[:1])
    length = inputs["input_ids"].shape[1]

    def step(past, tokens, columns):
        mask = torch.ones(1, columns, dtype=torch.long)
        return model(input_ids=torch.tensor([tokens]), attention_mask=mask, past_key_values=past).logits

    expected, cropped = (StaticCache(config=model.config.text_config, max_cache_len=length + 4) for _ in range(2))
    for past in (expected, cropped):
        model(**inputs, past_key_values=past)
    step(cropped, [7, 8, 9], length + 3)
    for layer in cropped.layers:
        layer.crop(-3)
    assert int(cropped.get_seq_length()) == length
    assert torch.equal(step(cropped, [5, 6], length + 2), step(expected, [5, 6], length + 2))
    with pytest.raises(ValueError, match="at most 7"):
        cropped.layers[-1].crop(-10)
    with pytest.raises(ValueError, match="negated"):
        cropped.layers[-1].crop(1)


@torch.no_grad()
def test_a_cache_is_taken_under_either_of_its_names(model):
    inputs = prompt(ROWS[:1])
    later = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1)}
    logits = []
    for name in ("cache", "past_key_values"):
        past = DynamicCache()
        model(**inputs, **{name: past})
        logits.append(model(**later, **{name: past}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([3, 2, 1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: cache.crop(-2),
    ],
    ids=["reorder", "repeat", "select", "crop"],
)
def test_layers_that_share_a_mask_go_on_sharing_it(model, change):
    past = DynamicCache()
    model(**prompt(ROWS), past_key_values=past)
    before = layer_segments(past)
    assert before == [(0, 1), (2, 3), (4, 5)]
    change(past)
    assert layer_segments(past) == before
    for layer in past.layers:
        assert layer.cache_index.key_mask.shape == (layer.keys.shape[0], layer.keys.shape[2])


def test_a_reset_cache_serves_padded_prompts_without_pruning(model):
    """What an earlier prompt said of its rows is not true of these."""
    whole, padded = prompt([[3, "image", 7], [4, "image", 6]]), prompt([[3, "image", 9], [2, "image", 4]], seed=3)
    outputs = []
    for used in (True, False):
        cache = DynamicCache(config=model.config.text_config)
        if used:
            model.generate(**whole, past_key_values=cache, max_new_tokens=3, do_sample=False)
            cache.reset()
        with model.pruning(enabled=False):
            options = {"return_dict_in_generate": True, "output_logits": True}
            outputs.append(
                model.generate(**padded, past_key_values=cache, max_new_tokens=6, do_sample=False, **options)
            )
    for ours, right in zip(outputs[0].logits, outputs[1].logits, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=0)


def test_a_reset_static_cache_serves_a_prompt_that_drops_less(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    inputs = prompt(ROWS[:1])
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    cache.reset()
    text = prompt([[30]])
    expected = generate(model, text)
    assert torch.equal(
        model.generate(**text, past_key_values=cache, max_new_tokens=NEW, do_sample=False)[:, 30:], expected
    )
    cache.reset()
    assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False), first)


def test_outputs_keep_the_shapes_users_know(model):
    inputs = prompt(ROWS)
    outputs = model(**inputs, output_hidden_states=True)
    batch, length = inputs["input_ids"].shape
    assert outputs.logits.shape == (batch, length, 128)
    assert len(outputs.hidden_states) == 7
    assert all(state.shape == (batch, length, 32) for state in outputs.hidden_states)
    assert model(**inputs, logits_to_keep=1).logits.shape == (batch, 1, 128)
    images = int((inputs["input_ids"] == IMAGE_TOKEN).sum()) // 16
    assert image_features(outputs).shape == (images * 9, 32)
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_output_attentions_is_refused_with_the_way_out(model):
    with pytest.raises(ValueError, match=r"output_attentions=True.*model\.explain"):
        model(**prompt(ROWS[:1]), output_attentions=True)
