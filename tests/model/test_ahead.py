"""Stage 2 chosen ahead of the decoder: the same patches as within it, and a decoder that runs as stock layers do."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.llama.modeling_llama import LlamaModel

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from modeling_ivtp.flops.executed import count
from modeling_ivtp.speed.models import stock_twin
from tests.model.test_graphs import BakedGraphs, StandinGraphs, answer
from tests.support.launches import Launched
from tests.support.tiny import IMAGE_TOKEN, prompt, randomize, rows_alone, tiny_config, tiny_model

ROWS = {
    "single": [[3, "image", 7]],
    "image last": [[3, "image"]],
    "padded": [[3, "image", 7], [2, "image", 5]],
    "several": [[3, "image", 7], [5], [2, "image", 4, "image", 3], [1, "image", "image", 2]],
}
OPTIONS = [
    {},
    {"positions": "compact"},
    {"guidance": "mean_text"},
    {"choice": "diverse", "importance": "accumulated"},
    {"layers_per_group": 3, "decoder_layers": 6, "aggregation": "max"},
    {"coverage": 0.5, "min_visual_tokens": 1},
]
TOLERANCE = 1e-5


def pair(**options):
    return tiny_model(**options), tiny_model(**options, decoder_choice="ahead")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_choice_is_that_of_the_decoder(rows, options):
    within, ahead = pair(**options)
    for seed in range(2):
        inputs = prompt(ROWS[rows], seed=seed)
        ours, theirs = ahead.explain(**inputs), within.explain(**inputs)
        for image, other in zip(ours.images, theirs.images, strict=True):
            for group, expected in zip(image.groups, other.groups, strict=True):
                assert torch.equal(group.candidates, expected.candidates)
                assert torch.equal(group.kept, expected.kept)
                torch.testing.assert_close(group.importance, expected.importance, atol=TOLERANCE, rtol=1e-4)


def test_the_question_decides_also_ahead():
    """The control of the test above: another pseudo CLS makes another choice."""
    _, ahead = pair()
    scored, chosen = set(), set()
    for seed in range(6):
        inputs = prompt(ROWS["single"], seed=0)
        inputs["clip_input_ids"] = prompt(ROWS["single"], seed=seed)["clip_input_ids"]
        last = ahead.explain(**inputs).images[0].groups[-1]
        scored.add(tuple(last.importance.tolist()))
        chosen.add(tuple(last.kept.tolist()))
    assert len(scored) > 1  # CLIP's words alone changed
    with ahead.pruning(guidance="visual_cls"):
        chosen.add(tuple(ahead.explain(**prompt(ROWS["single"], seed=0)).images[0].groups[-1].kept.tolist()))
    assert len(chosen) > 1


def stock_copy(model):
    stock = LlamaModel(model.config.text_config).eval()
    stock.load_state_dict(model.model.language_model.state_dict())
    return stock


def stock_logits(model, inputs, patches, positions=None, language=None):
    """Logits of a prompt of one image from plain layers, which get only the patches that were chosen."""
    inner, ids = model.model, inputs["input_ids"][0]
    stock = stock_copy(model) if language is None else language
    encoded = inner.get_image_features(inputs["pixel_values"])
    of_patch = dict(zip(encoded.kept_patches[0].tolist(), encoded.pooler_output[0], strict=True))
    embeds, places, first = [], [], ids.tolist().index(IMAGE_TOKEN)
    for column, token in enumerate(ids.tolist()):
        patch = column - first
        if token == IMAGE_TOKEN and patch not in patches:
            continue
        embeds.append(of_patch[patch] if token == IMAGE_TOKEN else inner.get_input_embeddings().weight[token])
        places.append(column)
    places = torch.tensor([places if positions is None else list(positions(places))])
    hidden, rotary = torch.stack(embeds)[None], stock.rotary_emb(embeds[0], position_ids=places)
    mask = torch.full((len(embeds),) * 2, float("-inf")).triu(1)[None, None]
    for layer in stock.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(stock.norm(hidden))[0, -1]


def test_logits_are_those_of_stock_layers_on_the_chosen_tokens():
    within, ahead = pair()
    for seed in range(3):
        inputs = prompt(ROWS["single"], seed=seed)
        patches = within.explain(**inputs).images[0].groups[-1].kept.tolist()
        with torch.no_grad():
            found = ahead(**inputs).logits[0, -1]
            assert (found - stock_logits(ahead, inputs, patches)).abs().max() <= TOLERANCE
            # The controls: one other patch, and other positions.
            other = [*patches[:-1], next(p for p in ahead_candidates(within, inputs) if p not in patches)]
            assert (found - stock_logits(ahead, inputs, other)).abs().max() > 100 * TOLERANCE
            moved = stock_logits(ahead, inputs, patches, lambda places: range(len(places)))
            assert (found - moved).abs().max() > 100 * TOLERANCE


def ahead_candidates(model, inputs):
    return model.explain(**inputs).images[0].groups[-1].candidates.tolist()


def test_every_layer_caches_the_final_tokens():
    _, ahead = pair()
    inputs = prompt(ROWS["single"])
    layers = ahead(**inputs, use_cache=True).past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == [3 + 4 + 7] * 6
    assert len({id(layer.cache_index) for layer in layers}) == 1
    trace = ahead.explain(**inputs)
    assert trace.decoder_layer_tokens == (4,) * 6
    assert trace.summary().startswith("1 image: 16 → 9 in the tower, → 4 ahead of the decoder (4.0 layer-averaged)")


@pytest.mark.parametrize("pruning", [{}, {"coverage": 0.5, "min_visual_tokens": 1}], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_gives_what_its_rows_give_alone(options, pruning):
    _, ahead = pair(**pruning)
    rows = ROWS["several"]
    inputs = prompt(rows)
    length = inputs["input_ids"].shape[1]
    together = answer(ahead, inputs, **options)[:, length:]
    for row, alone in enumerate(rows_alone(inputs, rows)):
        alone.pop("pixel_values", None) if rows[row] == [5] else None
        single = answer(ahead, alone, **options)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row], single)


def test_gradients_are_those_of_stock_layers_and_none_comes_through_the_choice():
    within, ahead = pair()
    inputs = prompt(ROWS["single"])
    patches = within.explain(**inputs).images[0].groups[-1].kept.tolist()
    stock_logits(ahead, inputs, patches, language=ahead.model.language_model).sum().backward()
    expected = {name: p.grad.clone() for name, p in ahead.named_parameters() if p.grad is not None}
    # A bias of keys changes no softmax: its gradient is rounding alone, by the size of all others.
    rounding = 1e-8 * max(gradient.norm() for gradient in expected.values())
    for checkpointing in (False, True):
        ahead.zero_grad()
        ahead.train()
        if checkpointing:
            ahead.gradient_checkpointing_enable({"use_reentrant": False})
        ahead(**inputs, use_cache=False).logits[0, -1].sum().backward()
        found = {name: p.grad for name, p in ahead.named_parameters() if p.grad is not None}
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + rounding, name


@pytest.mark.parametrize("rows", [ROWS["single"], [[3, "image", 7], [4, "image", 6]], [[2, "image", 4, "image", 3]]])
@pytest.mark.parametrize("options", [{}, {"positions": "compact"}], ids=str)
@pytest.mark.parametrize("graphs", [StandinGraphs, pytest.param(BakedGraphs, marks=pytest.mark.slow)])
def test_one_replayed_choice_serves_questions_of_any_length(graphs, options, rows):
    plain = tiny_model(**options, decoder_choice="ahead")
    model = tiny_model(**options, decoder_choice="ahead")
    model.model.prompt_graphs.graphs = graphs(8)
    for seed in range(4):
        # The question grows, and what stands before the end of the images does not.
        longer = [[*row[:-1], row[-1] + 9 * seed] for row in rows]
        inputs = prompt(longer, seed=seed)
        assert torch.equal(answer(model, inputs), answer(plain, inputs))
    captured = model.model.prompt_graphs.graphs._captured
    assert {key[0][0]: graph.runs for key, graph in captured.items()} == {"images": 2, "choice": 2}


class OneLaunch(StandinGraphs.capture):
    """Counts as the copies around a graph do: what runs inside one is a single launch."""

    def run(self, inputs):
        self.runs += 1
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        with _disable_current_modes():
            self.packing.pack(self.function(**self.inputs), self.outputs)
        next(iter(self.outputs.values())).add_(0)
        return self.packing.unpack({dtype: room.clone() for dtype, room in self.outputs.items()})


class CountedGraphs(StandinGraphs):
    capture = OneLaunch


@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_whose_choice_is_replayed_launches_no_more_than_stock():
    """On a model as deep as LLaVA-1.5 with CLIP ViT-L, and for a question of a length that never came before."""
    config = tiny_config(decoder_choice="ahead", layers_per_group=3, decoder_layers=12).to_dict()
    config["vision_config"]["num_hidden_layers"] = 24
    config["text_config"]["num_hidden_layers"] = 32
    config["clip_text_config"]["num_hidden_layers"] = 12
    model = randomize(IVTPLlavaForConditionalGeneration(IVTPLlavaConfig(**config))).eval()
    stock = stock_twin(model)

    def launches(model, inputs):
        with Launched() as counted:
            model(**inputs, use_cache=True)
        return counted.names.total()

    plain = launches(model, prompt(ROWS["single"]))
    model.model.prompt_graphs.graphs = CountedGraphs(8)
    for seed, words in enumerate((7, 16, 25)):
        inputs = prompt([[3, "image", words]], seed=seed)
        ours = launches(model, inputs)
        guide = {"clip_input_ids", "clip_spans"}
        theirs = launches(stock, {name: value for name, value in inputs.items() if name not in guide})
    assert ours <= theirs < plain
    # The control: within the decoder, a prompt of a new length launches more than stock.
    model.set_pruning(decoder_choice="within")
    assert launches(model, prompt([[3, "image", 34]])) > theirs


def test_the_option_is_saved_and_its_cost_counted(tmp_path):
    config = tiny_config(decoder_choice="ahead")
    config.save_pretrained(tmp_path)
    assert IVTPLlavaConfig.from_pretrained(tmp_path).pruning.decoder_choice == "ahead"
    ahead, within = count(config, text_tokens=8), count(tiny_config(), text_tokens=8)
    assert ahead.layer_tokens == (4,) * 6
    assert ahead.parts == pytest.approx(ahead.formula)
    others = {name for name, flops in ahead.parts.items() if flops != within.parts[name]}
    assert others == {"decoder"}
