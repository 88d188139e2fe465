"""Both stages as the vLLM plug-in runs them, on a stand-in for vLLM's decoder: they choose as transformers' engine."""

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from modeling_ivtp.vllm_plugin.encoding import Item
from tests.support.tiny import IMAGE_TOKEN, prompt, tiny_model
from tests.support.vllm_layers import encoder_of, items_of

ROWS = [[3, "image", 7], [2, "image", 4, "image", 3], [3, "image", 12], [5, "image"]]


def final_patches(model, inputs):
    return [image.groups[-1].kept.tolist() for image in model.explain(**inputs).images]


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": "mean_text"}, {"guidance": "visual_cls"}, {"positions": "compact"}, {"choice": "diverse"}],
    ids=str,
)
def test_the_choice_is_that_of_the_transformers_engine(options):
    model = tiny_model(**options)
    inputs = prompt(ROWS)
    encoder, items = encoder_of(model), items_of(inputs, ROWS)
    found = encoder.features_of(items)
    assert [patches.tolist() for _, patches in found] == final_patches(model, inputs)
    features = model.model.get_image_features(inputs["pixel_values"])
    for (kept, patches), kept_patches, whole in zip(found, features.kept_patches, features.pooler_output, strict=True):
        expected = whole[[kept_patches.tolist().index(patch) for patch in patches.tolist()]]
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-4)
    # Rows 0 and 2 are alike up to their image and run as a batch; two images of one prompt are chosen together.
    assert encoder.chosen == 3


def test_another_question_makes_another_choice_and_encodes_nothing_again():
    """The control of the test above, and what the memory of the tower's outputs is for."""
    model = tiny_model()
    encoder, chosen = encoder_of(model), set()
    inputs = prompt([[3, "image", 7]])
    for seed in range(6):
        asked = inputs | {"clip_input_ids": prompt([[3, "image", 7]], seed=seed)["clip_input_ids"]}
        ((_, patches),) = encoder.features_of(items_of(asked, [[3, "image", 7]]))
        assert [patches.tolist()] == final_patches(model, asked)
        chosen.add(tuple(patches.tolist()))
    assert len(chosen) > 1
    assert encoder.encoded == 1


def test_questions_are_read_together(monkeypatch):
    encoder, rows = encoder_of(tiny_model()), [[3, "image", 7], [2, "image", 4], [3, "image", 12], [5, "image"]]
    inputs, batches = prompt(rows), []
    embed = CLIPTextEmbeddings.forward

    def counted(self, input_ids, *args, **kwargs):
        batches.append(len(input_ids))
        return embed(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(CLIPTextEmbeddings, "forward", counted)  # a hook would switch the cache off
    encoder.features_of(items_of(inputs, rows))
    windows = inputs["clip_input_ids"].flatten(0, 1)
    assert batches == [len(windows.unique(dim=0))]


def test_budgets_of_one_batch_differ():
    model = tiny_model()
    inputs = prompt([[3, "image", 7]])
    budgets = (16, 2, 4, 20, 6)
    found = encoder_of(model).features_of([items_of(inputs, [[3, "image", 7]], budget)[0] for budget in budgets])
    for budget, (features, patches) in zip(budgets, found, strict=True):
        assert len(features) == len(patches) == min(budget, 16)
        if budget >= 16:
            assert patches.tolist() == list(range(16))
            continue
        changes = {} if budget == 4 else {"visual_tokens": budget, "tower_tokens": None}
        with model.pruning(**changes):
            assert [patches.tolist()] == final_patches(model, inputs)


@pytest.mark.parametrize("options", [{"decoder_layers": 0, "tower_tokens": 4}, {"enabled": False}], ids=str)
def test_without_a_second_stage_nothing_guides(options):
    model = tiny_model(**options)
    inputs = prompt([[3, "image", 7]])
    encoder = encoder_of(model)
    budget = 4 if model.pruning_config.enabled else 16
    ((features, patches),) = encoder.features_of([Item(inputs["pixel_values"], (0,), 0, budget)])
    with torch.no_grad():
        whole = model.model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(features, whole.pooler_output[0], atol=1e-5, rtol=1e-4)
    expected = whole.kept_patches[0].tolist() if model.pruning_config.enabled else list(range(16))
    assert patches.tolist() == expected
    assert encoder.chosen == 0
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 16
