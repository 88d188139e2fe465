"""Prompts, caches and options at the edges of what people do."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_ivtp.model.pruned_cache import layer_segments
from tests.support.reference import decoder_reference
from tests.support.tiny import prompt, tiny_model

BATCH = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("rows", [[[4, "image"]], [["image"]], [[4, "image"], [3, "image", "image"], [6]]])
@torch.no_grad()
def test_a_prompt_that_ends_on_an_image_is_answered_by_the_last_token_left(rows):
    model = tiny_model()
    inputs = prompt(rows)
    outputs = model(**inputs, position_ids=positions(inputs["attention_mask"]), use_cache=True)
    expected = decoder_reference(model, **inputs)
    last = torch.from_numpy(expected.alive).long().mul(torch.arange(inputs["input_ids"].shape[1])).argmax(1)
    assert (last < inputs["input_ids"].shape[1] - 1).any()
    for row, column in enumerate(last):
        torch.testing.assert_close(outputs.logits[row, -1], expected.logits[row, column], atol=1e-5, rtol=0)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
    assert torch.equal(answer[:, 0], outputs.logits[:, -1].argmax(-1))
    assert torch.equal(answer, model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)[:, -3:])


@torch.no_grad()
def test_a_mask_longer_than_the_prompt_changes_nothing():
    model = tiny_model()
    inputs = prompt(BATCH)
    places = positions(inputs["attention_mask"])
    expected = model(**inputs, position_ids=places).logits[:, -3:]
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=70)
    logits = model(**inputs, position_ids=places, past_key_values=cache).logits[:, -3:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_go_on_when_a_later_turn_is_numbered_otherwise():
    model = tiny_model(positions="compact", layers_per_group=None, decoder_layers=0, tower_tokens=4)
    first, second, token = prompt([[3, "image", 7]]), prompt([[2, "image", 5]], seed=2), torch.tensor([[9]])
    seen = []
    rotary = model.model.language_model.rotary_emb
    rotary.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    past = DynamicCache()
    model(**first, past_key_values=past)
    second["attention_mask"] = torch.ones(1, 49, dtype=torch.long)
    with model.pruning(positions="original"):
        model(**second, past_key_values=past)
    model(input_ids=token, past_key_values=past)
    assert seen[0] == list(range(14))
    assert seen[1][:2] == [14, 15]
    assert seen[1][-5:] == [32, 33, 34, 35, 36]
    assert seen[2] == [37]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_window_that_decoding_outgrows_is_told_for_every_cache(cache):
    model = tiny_model("mistral")
    model.model.language_model.config.sliding_window = 30
    with pytest.raises(ValueError, match="31 tokens and the decoder's sliding window 30"):
        model.generate(**prompt(BATCH[:1]), max_new_tokens=20, do_sample=False, cache_implementation=cache)


def test_layers_with_a_window_and_layers_without_share_a_static_cache():
    model = tiny_model("qwen2")
    config = model.model.language_model.config
    expected = model.generate(**prompt(BATCH), max_new_tokens=8, do_sample=False)
    config.sliding_window, config.layer_types = 60, ["full_attention", "sliding_attention"] * 3
    answer = model.generate(**prompt(BATCH), max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(answer, expected)


@torch.no_grad()
def test_a_reset_cache_is_as_new():
    model = tiny_model()
    inputs = prompt(BATCH)
    past = DynamicCache(config=model.config.text_config)
    expected = model(**inputs, past_key_values=past).logits
    segments = layer_segments(past)
    past.reset()
    assert past.get_seq_length() == 0
    assert torch.equal(model(**inputs, past_key_values=past).logits, expected)
    assert layer_segments(past) == segments
    past.reset()
    with model.pruning(enabled=False):
        assert model(**inputs, past_key_values=past, output_attentions=False).logits.shape == expected.shape


def test_infinite_values_that_a_reset_static_cache_held_do_not_count():
    """Its tensors are used again, and what lies beyond the entries is masked: zero times infinity is no number."""
    model, inputs = tiny_model(), prompt(BATCH[:1])
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    options = {"past_key_values": cache, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    held = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys.fill_(float("inf"))
        layer.values.fill_(float("inf"))
    cache.reset()
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == held


@torch.no_grad()
def test_a_feature_layer_that_is_not_there_is_named():
    model = tiny_model()
    for layer in (-8, 7):
        with pytest.raises(ValueError, match=rf"vision_feature_layer={layer}; the tower has hidden states -7 to 6"):
            model(**prompt(BATCH), vision_feature_layer=layer)


@torch.no_grad()
def test_several_feature_layers_stand_side_by_side():
    model = tiny_model(clip=False)
    images = prompt(BATCH[:1])["pixel_values"]
    tower, options = model.model.vision_tower, {"pruner": model.model.pruner, "plan": model.model.plan()}
    several = tower(images, **options, feature_layers=[-2, 1, 0])
    for place, layer in enumerate([-2, 1, 0]):
        alone = tower(images, **options, feature_layers=[layer])
        assert torch.equal(several.features[..., 32 * place : 32 * place + 32], alone.features)
        assert torch.equal(several.patches, alone.patches)


@torch.no_grad()
def test_scores_are_made_in_full_precision_under_autocast(monkeypatch):
    from modeling_ivtp.model import rollout as rollout

    seen = []
    original = rollout.weighted_attention
    monkeypatch.setattr(
        rollout,
        "weighted_attention",
        lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), original(*args))[1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model()(**prompt(BATCH))
    assert seen
    assert not any(seen)


def test_half_precision_products_do_not_overflow():
    from modeling_ivtp.model.rollout import weighted_attention

    query = torch.full((1, 1, 1, 4, 128), 30.0, dtype=torch.float16)
    row = weighted_attention(torch.ones(1, 1, 4), query, query[:, :, 0], 128**-0.5)
    torch.testing.assert_close(row, torch.ones(1, 1, 4))


def test_explaining_in_the_middle_of_training_works_and_leaves_it_training():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    model.model.vision_tower.eval()
    assert model.explain(**prompt(BATCH)).final_tokens == (4, 4, 4)
    assert model.training
    assert not model.model.vision_tower.training


def test_a_cached_turn_under_checkpointing_is_refused_with_the_way_out():
    model = tiny_model()
    past = DynamicCache()
    model(**prompt(BATCH[:1]), past_key_values=past)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(input_ids=torch.tensor([[5]]), past_key_values=past)


def test_features_encoded_under_another_budget_are_refused():
    model = tiny_model()
    inputs = prompt(BATCH[:1])
    with model.pruning(tower_tokens=12):
        encoded = model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(ValueError, match="holds 12 patches of an image, the options in force 9"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_encoded_features_survive_being_used_twice():
    model = tiny_model()
    inputs = prompt([[3, "image", 7], [2, "image", "image", 3]])
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    first = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options)
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options), first)


def test_what_only_chooses_gets_no_gradient():
    model = tiny_model()
    inputs = prompt(BATCH)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 127, -100)).loss.backward()
    untouched = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {"clip_text_model", "visual_projection", "vision_tower"}
    late = {n for n, p in model.named_parameters() if p.grad is None and "vision_tower" in n}
    assert all("encoder.layers.5" in name or "post_layernorm" in name for name in late)


def test_tied_embeddings_stay_tied(tmp_path):
    from modeling_ivtp import IVTPLlavaForConditionalGeneration
    from tests.support.tiny import tiny_config

    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = IVTPLlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    inputs = prompt(BATCH)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_static_cache_takes_the_decoders_type():
    """The towers may be kept in more bits than the decoder."""
    model, inputs = tiny_model(), prompt([[3, "image", 7], [4, "image", 6]])
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    options = {"max_new_tokens": 4, "do_sample": False}
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, **options))


def test_double_precision():
    single, model, inputs = tiny_model(), tiny_model().double(), prompt([[3, "image", 7], [4, "image", 6]])
    expected = single.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logits = single(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].double()
        found = model(**inputs).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, logits.double(), atol=1e-5, rtol=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_a_prompt_that_failed_leaves_a_static_cache_as_it_was():
    model, inputs = tiny_model(), prompt([[3, "image", 7], [4, "image", 6]])
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    options = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="clip_spans"):
        model.generate(**inputs | {"clip_spans": torch.zeros(3, 26, 2, dtype=torch.long)}, **options)
    with model.pruning(enabled=False):
        given = {name: value for name, value in inputs.items() if not name.startswith("clip")}
        told = model.generate(**given, **options)
        assert torch.equal(told, model.generate(**given, max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_layers_of_a_reset_cache_share_what_they_hold():
    model = tiny_model()
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    options = {"past_key_values": cache, "max_new_tokens": 2, "do_sample": False}
    model.generate(**prompt([[3, "image", 7]]), **options)
    cache.reset()
    model.generate(**prompt([[5]]), **options)
    assert len(layer_segments(cache)) == 1
