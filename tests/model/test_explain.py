"""`explain` shows what was kept and why, from the pass that `generate` makes."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_ivtp import methods
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for, prompt, tiny_model


def test_the_trace_follows_each_image_from_the_grid_to_the_end():
    model = tiny_model()
    inputs = prompt([[3, "image", 7], [5], [2, "image", 4, "image", 3]])
    trace = model.explain(**inputs)
    assert [image.row for image in trace.images] == [0, 2, 2]
    for image in trace.images:
        before = np.arange(16)
        for group in image.groups:
            np.testing.assert_array_equal(group.candidates, before)
            assert set(group.kept.tolist()) <= set(before.tolist())
            assert group.kept.tolist() == sorted(group.kept.tolist())
            torch.testing.assert_close(group.importance.sum(), torch.tensor(1.0))
            best = group.candidates[group.importance.argsort(descending=True)[: len(group.kept)]]
            assert set(best.tolist()) == set(group.kept.tolist())
            before = group.kept
        assert len(before) == 4
    assert trace.final_tokens == (4, 4, 4)
    assert trace.decoder_layer_tokens == (9, 9, 6, 6, 4, 4)
    assert trace.layer_averaged_tokens == pytest.approx(38 / 6)


def test_a_cache_with_gradients_is_explained_as_one_without_and_labels_change_nothing():
    model, first, second = tiny_model(), prompt([[3, "image", 10]]), prompt([["image", 4]], seed=4)
    second["attention_mask"] = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    learned = model(**first, use_cache=True).past_key_values
    with torch.no_grad():
        plain = model(**first, use_cache=True).past_key_values
    assert learned.layers[0].keys.requires_grad
    expected = model.explain(**second, past_key_values=plain)
    groups = [one.images[0].groups for one in (model.explain(**second, past_key_values=learned), expected)]
    for ours, theirs in zip(*groups, strict=True):
        np.testing.assert_array_equal(ours.kept, theirs.kept)
        torch.testing.assert_close(ours.importance, theirs.importance)  # other kernels, with a history
    assert learned.get_seq_length() == plain.get_seq_length() == first["input_ids"].shape[1]
    labelled = model.explain(**first, labels=first["input_ids"])
    assert labelled.to_dict() == model.explain(**first).to_dict()


def test_kv_bytes_are_those_of_the_cache():
    model = tiny_model()
    inputs = prompt([[3, "image", 7]])
    trace = model.explain(**inputs)
    entry = 2 * 2 * 8 * 4
    assert trace.kv_bytes == entry * sum(10 + tokens for tokens in (9, 9, 6, 6, 4, 4))
    assert trace.kv_bytes_unpruned == entry * 6 * 26
    with model.pruning(enabled=False), torch.no_grad():
        layers = model(**inputs, use_cache=True).past_key_values.layers
    assert trace.kv_bytes_unpruned == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.fixture(scope="module")
def asked():
    processor = make_processor(size=56)
    model = model_for(processor, relevance_threshold=0.0)
    picture = Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    question = "USER: <image>\nWhat colour is the cat on the table? ASSISTANT:"
    return model, processor, picture, processor(images=picture, text=question, return_tensors="pt")


def test_the_questions_words_have_their_relevance(asked):
    model, processor, _, inputs = asked
    image = model.explain(processor=processor, **inputs).images[0]
    text = "".join(token.text for token in image.tokens).replace("▁", " ")
    assert "What colour is the cat on the table?" in text
    assert "USER" not in text
    assert "ASSISTANT" not in text
    assert all(token.is_key == (token.relevance >= 0) for token in image.tokens)
    assert 0 < sum(token.is_key for token in image.tokens) < len(image.tokens)
    assert image.reference == "pseudo_cls"
    for token in image.tokens:
        assert inputs["input_ids"][0, token.position] == token.token_id


def test_the_saved_tokenizer_is_found_without_being_passed(asked, tmp_path):
    from modeling_ivtp import IVTPLlavaForConditionalGeneration

    model, processor, _, inputs = asked
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.explain(**inputs).to_dict() == model.explain(processor=processor, **inputs).to_dict()


def test_the_trace_becomes_json_and_a_picture(asked, tmp_path):
    model, processor, picture, inputs = asked
    trace = model.explain(processor=processor, **inputs)
    record = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert len(record["images"][0]["groups"]) == 5
    trace.plot(picture).savefig(tmp_path / "trace.png")
    assert Image.open(tmp_path / "trace.png").width > 500


def test_the_extended_methods_trace_has_what_was_ranked(asked, tmp_path):
    """Accumulated importance grows from group to group of the tower; in the decoder it is Eq. 4 again."""
    model, processor, picture, inputs = asked
    with model.pruning(importance="accumulated", choice="diverse"):
        trace = model.explain(processor=processor, **inputs)
    assert trace.method == "ivtp-extended"
    tower, decoder = trace.images[0].groups[:3], trace.images[0].groups[3:]
    for before, after in pairwise(tower):
        assert torch.equal(after.candidates, before.kept)
        earlier = dict(zip(before.candidates.tolist(), before.importance.tolist(), strict=True))
        scores = zip(after.candidates.tolist(), after.importance.tolist(), strict=True)
        assert all(score > earlier[patch] for patch, score in scores)
    assert all(abs(float(group.importance.sum()) - 1) < 1e-5 for group in decoder)
    best = [group.importance.argsort(descending=True)[: len(group.kept)] for group in trace.images[0].groups]
    kept = [group.kept.tolist() for group in trace.images[0].groups]
    ranked = [sorted(g.candidates[order].tolist()) for g, order in zip(trace.images[0].groups, best, strict=True)]
    assert kept != ranked
    trace.plot(picture).savefig(tmp_path / "trace.png")


def test_explaining_leaves_answers_as_they_were(asked):
    model, processor, _, inputs = asked
    before = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    model.explain(processor=processor, **inputs)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), before)


def test_inputs_may_be_given_as_the_processor_returns_them(asked):
    model, processor, _, inputs = asked
    assert model.explain(inputs).final_tokens == model.explain(processor, **inputs).final_tokens == (4,)
    assert model.explain(processor, **inputs, return_dict=False).final_tokens == (4,)


def test_there_is_nothing_to_explain_without_pruning_or_image():
    model = tiny_model()
    with pytest.raises(ValueError, match="no image"):
        model.explain(**prompt([[5]]))
    with model.pruning(enabled=False), pytest.raises(ValueError, match="pruning is off"):
        model.explain(**prompt([[3, "image", 7]]))


def test_the_trace_names_the_methods_that_pruned():
    model, inputs = tiny_model(), prompt([[3, "image", 7]])
    assert model.explain(**inputs).method == "ivtp"
    with methods.TopK(6)(model):
        trace = model.explain(**inputs)
        with methods.FastV(4)(model):
            assert model.explain(**inputs).method == "topk + fastv"
    assert trace.method == trace.to_dict()["method"] == "topk"
    assert trace.summary().startswith("topk: 1 image: 16 → 6 in the tower")
    assert repr(trace).startswith("PruningTrace(topk: 1 image")


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_trace_of_any_method_says_what_happened_and_no_more(name):
    """Of key words only where they could guide, and each stage under a name that a reader knows."""
    model = tiny_model()
    with methods.make(name, 6)(model):
        trace = model.explain(**prompt([[3, "image", 7]]))
    image = trace.images[0]
    guided = name in ("ivtp", "ivtp-extended", "topk+")  # by the pseudo-CLS token, or by the visual CLS in its place
    assert ("key words" in trace.summary()) == guided
    assert (image.reference is not None) == guided
    assert ("key words" in repr(image)) == guided
    for stage in ("features", "prompt"):
        assert f" {stage}" not in trace.summary()
    whole, *panels = image.panels()
    assert int(panels[-1].mask.sum()) == trace.final_tokens[0]
    for panel in (*panels, *image.panels("all")[1:]):
        assert panel.label in ("after the vision tower", "before the decoder") or panel.label.endswith(
            ("decoder layer", "decoder layers", "vision layer", "vision layers")
        )
        assert " 0 " not in panel.label
    assert whole.mask.all()


@pytest.mark.slow
def test_methods_are_drawn_side_by_side(asked):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    model, processor, picture, inputs = asked
    ivtp = model.explain(processor, **inputs)
    with methods.TopK(ivtp.final_tokens[0])(model):
        topk = model.explain(processor, **inputs)
    assert len(topk.plot(picture, beside=[ivtp]).axes) == 3
