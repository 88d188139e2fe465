"""Calls that users of LLaVA make, and what they expect: what stock LLaVA does, or an error that says why."""

import warnings

import pytest
import torch
from transformers import AutoModel, BitsAndBytesConfig, LlavaForConditionalGeneration, QuantoConfig

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaModel
from modeling_ivtp.model.checkpoint_ivtp import sparing
from modeling_ivtp.model.compat import CACHE
from tests.support.tiny import IMAGE_TOKEN, prompt, tiny_model

ROWS = [[3, "image", 6], ["image", 9]]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def inputs():
    return prompt(ROWS)


def with_labels(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def test_auto_model_generates_and_explains(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is IVTPLlavaForConditionalGeneration
    inputs = prompt([[3, "image", 6]])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))
    assert loaded.explain(**inputs).final_tokens == (4,)


def test_a_folder_that_maps_auto_model_to_the_bare_class_is_mended_when_it_is_saved(model, tmp_path):
    model.config.auto_map["AutoModel"] = "modeling_ivtp.IVTPLlavaModel"  # as version 0.1.0 wrote it
    model.save_pretrained(tmp_path / "old")
    AutoModel.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    config = IVTPLlavaForConditionalGeneration.config_class.from_pretrained(tmp_path / "new")
    assert config.auto_map["AutoModel"] == "modeling_ivtp.IVTPLlavaForConditionalGeneration"


def test_the_bare_model_is_there_by_its_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert not hasattr(IVTPLlavaModel.from_pretrained(tmp_path), "lm_head")


def test_image_features_are_what_stock_llava_returns(model, inputs):
    pixels = inputs["pixel_values"]
    encoded = model.model.get_image_features(pixels, output_hidden_states=True)
    with model.pruning(enabled=False):
        stock = model.model.get_image_features(pixels, output_hidden_states=True)
    assert len(encoded.hidden_states) == len(stock.hidden_states) == 7
    assert [state.shape[1] - 1 for state in encoded.hidden_states] == [16, 16, 13, 13, 11, 11, 9]
    assert torch.equal(encoded.hidden_states[0], stock.hidden_states[0])
    assert torch.equal(encoded.last_hidden_state, encoded.hidden_states[-1])
    assert model.model.get_image_features(pixels).last_hidden_state.shape == (2, 10, 32)
    assert isinstance(model.model.get_image_features(pixels, return_dict=False), tuple)
    model.config.vision_config.output_hidden_states = True
    assert len(model.model.get_image_features(pixels).hidden_states) == 7
    assert model.model.get_image_features(pixels, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model.model.get_image_features(pixels), tuple)
    assert isinstance(model(**inputs), tuple)
    with pytest.raises(ValueError, match=r"output_attentions=True: under pruning .* model\.explain"):
        model.model.get_image_features(pixels, output_attentions=True)


def test_image_tokens_are_never_targets(model, inputs):
    labels = with_labels(inputs)
    assert (labels == IMAGE_TOKEN).any()
    masked = labels.masked_fill(labels == IMAGE_TOKEN, -100)
    for enabled in (True, False):
        with model.pruning(enabled=enabled):
            assert model(**inputs, labels=labels).loss == model(**inputs, labels=masked).loss


@pytest.mark.parametrize("enabled", [True, False])
def test_shifted_labels_give_the_loss_of_labels(model, inputs, enabled):
    labels = with_labels(inputs)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with model.pruning(enabled=enabled):
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("keep", [4, torch.arange(19, 25)])
def test_labels_of_the_kept_logits_alone_give_the_loss_of_the_others_ignored(model, inputs, enabled, keep):
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, columns] = inputs["input_ids"][:, columns]
    first = 25 - len(labels[0, columns])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    # The first label of a shorter list has no logit that predicts it.
    every, some = labels.clone(), {"labels": labels[:, columns], "shift_labels": shifted[:, columns]}
    every[:, first] = -100
    with model.pruning(enabled=enabled):
        expected = model(**inputs, labels=every).loss
        outputs = model(**inputs, labels=some["labels"], logits_to_keep=keep)
        torch.testing.assert_close(outputs.loss, expected)
        assert outputs.logits.shape[1] == some["labels"].shape[1]
        torch.testing.assert_close(model(**inputs, **some, logits_to_keep=keep).loss, expected)


def test_labels_without_a_prompt_are_refused_as_in_stock_llava(model, inputs):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(pixel_values=inputs["pixel_values"], labels=inputs["input_ids"])


def test_flex_attention_is_refused_before_the_vision_tower_runs(model, inputs, monkeypatch):
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *_, **__: pytest.fail("The vision tower ran."))
    with pytest.raises(ValueError, match=r"flex_attention.* is not supported under pruning"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"flex_attention.* is not supported under pruning"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("wanted", [[0, 5], [-1], 2])
def test_hidden_states_of_some_layers(model, inputs, wanted):
    every = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=wanted).hidden_states
    numbers = {number % len(every) for number in ([wanted] if isinstance(wanted, int) else wanted)}
    assert len(some) == len(every)
    for number, (one, all_of_them) in enumerate(zip(some, every, strict=True)):
        assert (one is not None) == (number in numbers)
        assert one is None or torch.equal(one, all_of_them)


@pytest.mark.parametrize("pseudo_cls", ["propagate", "pool"])
def test_every_hidden_state_can_be_asked_for_its_gradient(inputs, pseudo_cls):
    model = tiny_model(pseudo_cls=pseudo_cls)
    outputs = model(**inputs, labels=with_labels(inputs), output_hidden_states=True)
    for state in outputs.hidden_states:
        state.retain_grad()
    outputs.loss.backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in outputs.hidden_states)
    expected = tiny_model(pseudo_cls=pseudo_cls)
    expected(**inputs, labels=with_labels(inputs)).loss.backward()
    found, gradients = (
        {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}
        for one in (model, expected)
    )
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)


def test_continuous_batching_refuses_pictures(model, inputs):
    with pytest.raises(ValueError, match="prompts without images, and pixel_values came: use generate"):
        model.generate_batch([[5, 6]], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="prompts without images, and image tokens came"):
        model.generate_batch(inputs["input_ids"].tolist())


@pytest.mark.skipif(CACHE != "cache", reason="this version of transformers still calls it past_key_values")
def test_the_old_name_of_the_cache_warns_as_in_stock_llava(model, inputs):
    cache = getattr(model(**inputs, use_cache=True), CACHE)
    token = {"input_ids": torch.tensor([[7], [8]])}
    with pytest.warns(FutureWarning, match="past_key_values"):
        model(**token, past_key_values=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model(**token, cache=cache)


def test_the_text_tower_that_chooses_is_frozen(model, tmp_path):
    model.save_pretrained(tmp_path)
    for one in (model, IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path)):
        choosing = {n: p for n, p in one.named_parameters() if "clip_text_model" in n or "visual_projection" in n}
        assert len(choosing) > 10
        assert not any(parameter.requires_grad for parameter in choosing.values())
        assert all(p.requires_grad for n, p in one.named_parameters() if n not in choosing)


@pytest.mark.parametrize("linear", [True, False], ids=["all-linear", "q_proj"])
def test_adapters_on_the_text_tower_stay_frozen(inputs, linear):
    peft = pytest.importorskip("peft")
    targets = "all-linear" if linear else ["q_proj"]
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=targets))
    adapted.train()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("language_model" in name for name in trained)
    assert not [name for name in trained if "clip_text_model" in name or "visual_projection" in name]
    adapted(**inputs, labels=with_labels(inputs)).loss.backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisers_leave_the_text_tower_as_it_is(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model(width=128).save_pretrained(tmp_path)
    own = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=own)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    quantised = {name for name, part in model.named_modules() if isinstance(part, kinds)}
    assert any("language_model" in name for name in quantised)
    assert any("vision_tower" in name for name in quantised)
    spared = ("clip_text_model", "visual_projection", "lm_head")
    assert not [name for name in quantised if any(part in name for part in spared)]
    assert own.llm_int8_skip_modules is None


def test_other_quantisation_configs_are_told_too():
    assert sparing({"quant_method": "quanto"}, ["a"]) == {
        "quant_method": "quanto",
        "modules_to_not_convert": ["lm_head", "a"],
    }
    assert sparing({"load_in_8bit": True}, ["a"])["llm_int8_skip_modules"] == ["lm_head", "a"]
    kept = QuantoConfig(weights="int8", modules_to_not_convert=["b"])
    assert sparing(kept, ["a"]).modules_to_not_convert == ["b", "a"]
    assert kept.modules_to_not_convert == ["b"]


def test_a_model_without_clip_weights_gets_finite_ones(model, tmp_path):
    """Weights that a checkpoint lacks are drawn, frozen layers' too, and are no uninitialised memory."""
    LlavaForConditionalGeneration(model.config).save_pretrained(tmp_path)
    loaded = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, config=model.config)
    for name, parameter in loaded.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 10, name


def test_pixel_values_without_a_value_are_none_at_all(model, inputs):
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**text, **options)
    assert torch.equal(model.generate(**text, pixel_values=None, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "DoLa"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_decoding_strategies_that_left_transformers_are_named(model, inputs, options, strategy):
    with pytest.raises(ValueError, match=f"{strategy} is no part of transformers 5. Allowed: greedy search"):
        model.generate(**inputs, max_new_tokens=3, **options)


def test_a_cache_of_tensors_is_refused(model, inputs):
    with pytest.raises(ValueError, match=r"is a tuple of tensors, as versions before 5 had it; allowed: a Cache"):
        model(**inputs, past_key_values=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.slow
def test_export_says_what_it_needs(model, inputs):
    with pytest.raises(Exception, match=r"torch\.export takes no cache as an output; export with use_cache=False"):
        torch.export.export(model, (), kwargs=dict(inputs))
    stock = pytest.raises(Exception, match=r"torch\.export takes no cache as an output")
    with model.pruning(enabled=False), stock:
        torch.export.export(model, (), kwargs=dict(inputs))
    exported = torch.export.export(model, (), kwargs=inputs | {"use_cache": False})
    logits = exported.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
