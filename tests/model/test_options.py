"""Every option is checked in one place; changing them nests, and is undone when left by an exception."""

import json
import logging
from dataclasses import fields

import pytest
import torch

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPPruningConfig
from tests.support.tiny import prompt, tiny_config, tiny_model

BAD = [
    ({"visual_tokens": 0}, "visual_tokens=0"),
    ({"visual_tokens": -3}, "visual_tokens=-3"),
    ({"visual_tokens": 2.5}, "visual_tokens=2.5"),
    ({"visual_tokens": True}, "visual_tokens=True"),
    ({"visual_tokens": None}, "visual_tokens=None"),
    ({"tower_tokens": 3}, "tower_tokens=3 is below visual_tokens=4"),
    ({"layers_per_group": 0}, "layers_per_group=0"),
    ({"layers_per_group": 4}, "layers_per_group=4 does not divide tower_layers=6; allowed: .1, 2, 3, 6."),
    ({"tower_layers": 7}, "tower_layers=7, but the model has only 6"),
    ({"tower_layers": -1}, "tower_layers=-1"),
    ({"decoder_layers": 8}, "decoder_layers=8, but the model has only 6"),
    ({"tower_layers": 0}, "tower_tokens=9 contradicts tower_layers=0"),
    ({"tower_layers": 0, "decoder_layers": 0, "tower_tokens": None}, "cannot be reached"),
    ({"relevance_threshold": 1.5}, "relevance_threshold=1.5"),
    ({"relevance_threshold": "high"}, "relevance_threshold='high'"),
    ({"aggregation": "sum"}, "aggregation='sum'; allowed: rollout, mean, max, multiply, last"),
    ({"guidance": "text"}, "guidance='text'; allowed: clip, mean_text, text_similarity, visual_cls"),
    ({"pseudo_cls": "mean"}, "pseudo_cls='mean'; allowed: propagate, pool"),
    ({"positions": "new"}, "positions='new'; allowed: original, compact"),
    ({"decoder_choice": "before"}, "decoder_choice='before'; allowed: within, ahead"),
    (
        {"decoder_choice": "ahead", "pseudo_cls": "pool"},
        'decoder_choice="ahead" with pseudo_cls="pool".*allowed: pseudo_cls="propagate"',
    ),
    ({"importance": "sum"}, "importance='sum'; allowed: own, accumulated"),
    ({"choice": "random"}, "choice='random'; allowed: top, diverse"),
    ({"sharpness": 0.5}, r"sharpness=0.5 with choice='top'; allowed: None, or choice=\"diverse\""),
    *(
        ({"choice": "diverse", "sharpness": value}, rf"sharpness={value!r}; allowed: a number of at least 0, or None")
        for value in (-0.1, float("nan"), float("inf"), "0.25", True)
    ),
    *(
        (
            {"importance": "accumulated", "aggregation": how},
            f"aggregation='{how}' with importance=\"accumulated\".*allowed: rollout, mean, last",
        )
        for how in ("max", "multiply")
    ),
    ({"enabled": 1}, "enabled=1"),
    ({"strict": "yes"}, "strict='yes'"),
    ({"token_budget": 64}, "Unknown pruning option.* token_budget; allowed: enabled, visual_tokens"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_option_is_named_and_changes_nothing(model, options, message):
    before = model.pruning_config
    with pytest.raises(ValueError, match=message):
        model.set_pruning(**options)
    assert model.pruning_config is before
    with pytest.raises(ValueError, match=message), model.pruning(**options):
        pytest.fail("entered")
    assert model.pruning_config is before
    with pytest.raises(ValueError, match=message):
        IVTPLlavaForConditionalGeneration(tiny_config(**options))


def test_a_config_file_with_unknown_pruning_keys_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["pruning"]["keep_ratio"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="keep_ratio"):
        IVTPLlavaConfig.from_pretrained(tmp_path)


def test_options_survive_saving(tmp_path):
    config = tiny_config(guidance="mean_text", positions="compact", strict=True, relevance_threshold=0.25)
    config.pruning = config.pruning.changed(importance="accumulated", choice="diverse", sharpness=1)
    config.save_pretrained(tmp_path)
    assert IVTPLlavaConfig.from_pretrained(tmp_path).pruning == config.pruning


OTHERS = [
    {"enabled": False},
    {"visual_tokens": 9},
    {"coverage": 0.5},
    {"coverage": 0.5, "min_visual_tokens": 3},
    {"tower_tokens": 200},
    {"layers_per_group": None},
    {"tower_layers": 0},
    {"decoder_layers": 0},
    {"relevance_threshold": 0.0},
    {"aggregation": "mean"},
    {"importance": "accumulated"},
    {"choice": "diverse"},
    {"choice": "diverse", "sharpness": 0},
    {"guidance": "visual_cls"},
    {"pseudo_cls": "pool"},
    {"positions": "compact"},
    {"decoder_choice": "ahead"},
    {"strict": True},
]
"""Every option in turn with another value than its default, falsy ones among them."""


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_each_option_survives_saving(options, tmp_path):
    changed = IVTPPruningConfig(**options)
    assert changed != IVTPPruningConfig()
    IVTPLlavaConfig(pruning=changed).save_pretrained(tmp_path)
    again = IVTPLlavaConfig.from_pretrained(tmp_path).pruning
    assert again == changed
    assert {name: getattr(again, name) for name in options} == options


def test_no_option_is_left_out_of_what_is_saved():
    assert [field.name for field in fields(IVTPPruningConfig)] == list(dict.fromkeys(list(each)[-1] for each in OTHERS))


def test_a_config_file_without_the_newer_options_means_the_published_method(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("importance", "choice", "sharpness"):
        del saved["pruning"][name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    pruning = IVTPLlavaConfig.from_pretrained(tmp_path).pruning
    assert (pruning.importance, pruning.choice, pruning.sharpness) == ("own", "top", None)
    assert pruning == tiny_config().pruning


def test_a_budget_above_what_there_is_keeps_all(model):
    with model.pruning(visual_tokens=1000, tower_tokens=None):
        assert model.config.pruning_plan() is None


def test_changes_nest_and_are_undone(model):
    before = model.pruning_config
    with model.pruning(visual_tokens=2):
        with model.pruning(enabled=False):
            assert (model.pruning_config.visual_tokens, model.pruning_config.enabled) == (2, False)
        assert (model.pruning_config.visual_tokens, model.pruning_config.enabled) == (2, True)
    assert model.pruning_config is before


def test_changes_are_undone_when_left_by_an_exception(model):
    before = model.pruning_config
    with pytest.raises(KeyError), model.pruning(visual_tokens=2), model.pruning(positions="compact"):
        raise KeyError
    assert model.pruning_config is before


def test_set_pruning_inside_the_context_ends_with_it(model):
    before = model.pruning_config
    with model.pruning(visual_tokens=2):
        model.set_pruning(visual_tokens=3)
        assert model.pruning_config.visual_tokens == 3
    assert model.pruning_config is before


def test_set_pruning_stays_and_is_saved(tmp_path):
    model = tiny_model()
    model.set_pruning(visual_tokens=2, tower_tokens=5)
    model.save_pretrained(tmp_path)
    assert IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path).pruning_config.visual_tokens == 2


def test_some_options_given_when_loading_leave_the_others(tmp_path):
    tiny_config(visual_tokens=3, positions="compact").save_pretrained(tmp_path)
    pruning = IVTPLlavaConfig.from_pretrained(tmp_path, pruning={"strict": True}).pruning
    assert (pruning.visual_tokens, pruning.positions, pruning.strict) == (3, "compact", True)


def test_integers_of_numpy_are_integers():
    import numpy as np

    pruning = IVTPPruningConfig(visual_tokens=np.int64(16))
    assert json.loads(json.dumps(pruning.to_dict()))["visual_tokens"] == 16


def test_the_base_model_has_the_options_too():
    model = tiny_model().model
    with model.pruning(visual_tokens=2):
        assert model.pruning_config.visual_tokens == 2
    model.set_pruning(visual_tokens=3)
    assert model.config.pruning.visual_tokens == 3


@pytest.mark.parametrize("value", [[1, 2], "on", 64])
def test_pruning_that_is_no_mapping_is_refused(value):
    with pytest.raises(ValueError, match=r"pruning=.*allowed: a mapping of options"):
        IVTPLlavaConfig(pruning=value)


@pytest.mark.parametrize("kind", ["clip", "llava_next"])
def test_a_folder_of_another_kind_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for load in (IVTPLlavaConfig.from_pretrained, IVTPLlavaForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=f"is of model_type '{kind}'; allowed: 'llava'"):
            load(tmp_path)


def test_a_feature_layer_that_the_tower_lacks_is_refused():
    config = tiny_config().to_dict() | {"vision_feature_layer": -9}
    with pytest.raises(ValueError, match="vision_feature_layer=-9; allowed: -7 to 6"):
        IVTPLlavaForConditionalGeneration(IVTPLlavaConfig(**config))


def test_a_static_cache_that_is_too_short_is_told_in_tokens(model):
    from transformers import StaticCache

    cache = StaticCache(config=model.config.text_config, max_cache_len=20)
    with pytest.raises(ValueError, match="room for 20 tokens; the prompt needs 26"):
        model(**prompt([[3, "image", 7]]), past_key_values=cache)


def test_the_options_are_immutable():
    with pytest.raises(AttributeError):
        IVTPPruningConfig().visual_tokens = 3


def test_without_clip_inputs_it_warns_once_and_uses_the_images_own_cls(model):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("modeling_ivtp.model.prompt")
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        inputs = prompt([[3, "image", 7]], guided=False)
        with torch.no_grad():
            logits = model(**inputs).logits
            assert torch.equal(model(**inputs).logits, logits)
    finally:
        logger.removeHandler(handler)
    (message,) = messages
    assert 'guidance="clip" needs clip_spans and clip_input_ids' in message
    with torch.no_grad(), model.pruning(guidance="visual_cls"):
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("guidance", "drop", "named"),
    [
        ("clip", ("clip_input_ids", "clip_spans"), "clip_spans and clip_input_ids"),
        ("clip", ("clip_input_ids",), "clip_input_ids"),
        ("mean_text", ("clip_spans",), "clip_spans"),
        ("text_similarity", ("clip_spans",), "clip_spans"),
    ],
)
def test_strict_raises_where_guidance_is_missing(model, guidance, drop, named):
    inputs = {name: value for name, value in prompt([[3, "image", 7]]).items() if name not in drop}
    with model.pruning(guidance=guidance, strict=True), pytest.raises(ValueError, match=f'"{guidance}" needs {named}'):
        model(**inputs)


def test_strict_names_a_missing_text_tower():
    model = tiny_model(clip=False, strict=True)
    with pytest.raises(ValueError, match=r"text tower \(from_llava"):
        model(**prompt([[3, "image", 7]]))


def test_an_empty_instruction_falls_back_to_the_cls_without_complaint(model):
    inputs = prompt([[3, "image", 7]])
    inputs["clip_spans"] = torch.zeros_like(inputs["clip_spans"])
    with torch.no_grad(), model.pruning(strict=True):
        logits = model(**inputs).logits
        with model.pruning(guidance="visual_cls"):
            assert torch.equal(model(**inputs).logits, logits)


def test_placeholders_that_do_not_match_the_images_are_counted(model):
    inputs = prompt([[3, "image", 7]])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"2 image\(s\) need 32 image tokens, 16 each, .* \[16\]"):
        model(**inputs)
    inputs = prompt([[3, "image", 7]])
    inputs["input_ids"][0, 5] = 9
    with pytest.raises(ValueError, match=r"\[15\]"):
        model(**inputs)


def test_a_custom_4d_mask_is_refused_with_the_way_out(model):
    inputs = prompt([[3, "image", 7]])
    inputs["attention_mask"] = torch.ones(1, 1, 26, 26)
    with pytest.raises(ValueError, match="must be 2D"):
        model(**inputs)


def test_a_tower_without_cls_is_refused():
    config = tiny_config().to_dict()
    config["vision_config"] = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="'siglip_vision_model': pruning needs a vision tower with a CLS token"):
        IVTPLlavaForConditionalGeneration(IVTPLlavaConfig(**config))


def test_a_decoder_of_another_layout_is_refused():
    config = tiny_config().to_dict()
    config["text_config"] = {"model_type": "gpt2"}
    with pytest.raises(ValueError, match="'gpt2'; allowed: llama, mistral, qwen2"):
        IVTPLlavaForConditionalGeneration(IVTPLlavaConfig(**config))


def test_a_sequence_beyond_the_sliding_window_is_refused():
    model = tiny_model("mistral")
    model.model.language_model.config.sliding_window = 20
    with pytest.raises(ValueError, match="26 tokens and the decoder's sliding window 20"):
        model(**prompt([[3, "image", 7]]))


def test_spans_that_do_not_fit_the_prompt_are_refused(model):
    inputs = prompt([[3, "image", 7]])
    inputs["clip_spans"] = torch.zeros(1, 40, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="clip_spans covers 40 tokens of a prompt of 26"):
        model(**inputs)
    inputs["clip_spans"] = torch.zeros(2, 26, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="clip_spans has shape"):
        model(**inputs)


def test_no_options_change_none_of_a_checkpoints(tmp_path):
    tiny_model(visual_tokens=2, choice="diverse").save_pretrained(tmp_path)
    loaded = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=None)
    assert (loaded.config.pruning.visual_tokens, loaded.config.pruning.choice) == (2, "diverse")
    loaded.config.pruning = None
    assert loaded.config.pruning.choice == "diverse"
