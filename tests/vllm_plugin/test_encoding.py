"""Both stages as the vLLM plug-in runs them, on a stand-in for vLLM's decoder: they choose as transformers' engine."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_ivtp.vllm_plugin.encoding import ImageEncoder, Item
from tests.support.tiny import IMAGE_TOKEN, prompt, rows_alone, tiny_model

ROWS = [[3, "image", 7], [2, "image", 4, "image", 3], [3, "image", 12], [5, "image"]]


class StandinLayer:
    """A layer of transformers with the parts that vLLM's layers have: one projection for queries, keys and values."""

    def __init__(self, layer, rotary):
        attention = layer.self_attn
        heads = attention.config.num_attention_heads * attention.head_dim
        keys = attention.config.num_key_value_heads * attention.head_dim
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.mlp = layer.mlp

        def turned(positions, query, key):
            cos, sin = rotary(query[None], position_ids=positions[None])
            split = [part.view(1, len(positions), -1, attention.head_dim).transpose(1, 2) for part in (query, key)]
            return [part.transpose(1, 2).flatten(2)[0] for part in apply_rotary_pos_emb(*split, cos, sin)]

        self.self_attn = SimpleNamespace(
            q_size=heads,
            kv_size=keys,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            qkv_proj=lambda hidden: (torch.cat([part(hidden) for part in parts], -1), None),
            o_proj=lambda hidden: (attention.o_proj(hidden), None),
            rotary_emb=turned,
        )


def encoder_of(model):
    language = model.model.language_model
    decoder = SimpleNamespace(
        embed_input_ids=language.embed_tokens,
        layers=[StandinLayer(layer, language.rotary_emb) for layer in language.layers],
    )
    encoder = ImageEncoder(model.config, decoder).eval()
    missing, unexpected = encoder.load_state_dict(
        {name: value for name, value in model.model.state_dict().items() if not name.startswith("language_model")},
        strict=False,
    )
    assert not missing
    assert not unexpected
    return encoder


def items_of(inputs, rows, budget=4):
    items = []
    for at, row in enumerate(rows_alone(inputs, rows)):
        for number in range(rows[at].count("image")):
            keys = tuple((at, image) for image in range(len(row["pixel_values"])))
            words = {name: row[name][0] for name in ("clip_input_ids", "clip_spans")}
            items.append(Item(row["pixel_values"], keys, number, budget, row["input_ids"][0], **words))
    return items


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
