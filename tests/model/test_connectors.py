"""Connectors: each against plain loops, and a model with one in batches, generation, training and on disk."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, methods
from modeling_ivtp.model.connector_options import ConnectorConfig
from modeling_ivtp.model.connectors import Question, join_connector, pooled, resized_positions, sine_positions
from modeling_ivtp.model.processing_ivtp import IVTPLlavaProcessor
from modeling_ivtp.model.prompt import PromptInputs
from tests.model.test_stock import stock_twin
from tests.support import checkpoints, stranger
from tests.support.text_tokenizers import clip_tokenizer
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import IMAGE_TOKEN, model_for, prompt, rows_alone, tiny_config, tiny_model

CONNECTORS = {
    "c_abstractor": {"name": "c_abstractor", "tokens": 4, "depth": 2},
    "context_attention": {"name": "context_attention", "tokens": 5},
    "resampler": {"name": "resampler", "tokens": 4, "heads": 2},
}
ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]


@pytest.fixture(scope="module", params=CONNECTORS)
def model(request):
    return tiny_model(connector=CONNECTORS[request.param])


def places(model):
    return model.config.connector.tokens


def features(images=2, seed=3):
    return torch.randn(images, 16, 32, generator=torch.Generator().manual_seed(seed))


def arrays(module):
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


# The oracles: loops over images, tokens and channels.


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def mean_of_cells(x, rows, columns):
    """Average a grid (r, c, D) over cells of a smaller one."""
    out = np.zeros((rows, columns, x.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * x.shape[0] // rows, -(-(i + 1) * x.shape[0] // rows)
            left, right = j * x.shape[1] // columns, -(-(j + 1) * x.shape[1] // columns)
            out[i, j] = x[top:bottom, left:right].mean((0, 1))
    return out


def bottleneck(x, weights, name):
    w = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    hidden = silu(norm(x @ w["reduce.weight"].T, w, "reduce_norm"))
    spread = np.zeros_like(hidden)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < x.shape[0] and 0 <= j + b - 1 < x.shape[1]:
                        spread[i, j] += hidden[i + a - 1, j + b - 1] * w["spatial.weight"][:, 0, a, b]
    hidden = silu(norm(spread, w, "spatial_norm"))
    squeezed = silu(w["squeeze.weight"] @ hidden.mean((0, 1)) + w["squeeze.bias"])
    gate = 1 / (1 + np.exp(-(w["excite.weight"] @ squeezed + w["excite.bias"])))
    return silu(norm((hidden * gate) @ w["expand.weight"].T, w, "expand_norm") + x)


def c_abstractor(connector, image):
    weights = arrays(connector)
    x = (image + weights["positions"][0]).reshape(4, 4, -1)
    for block in range(2):
        x = bottleneck(x, weights, f"before.{block}")
    x = mean_of_cells(x, 2, 2)
    for block in range(2):
        x = bottleneck(x, weights, f"after.{block}")
    return x.reshape(4, -1)


def test_the_c_abstractor_is_what_loops_compute():
    connector, images = tiny_model(connector=CONNECTORS["c_abstractor"]).model.connector, features()
    ready, tokens = connector(images)
    assert ready is None
    for image, made in zip(images.double().numpy(), tokens, strict=True):
        expected = c_abstractor(connector, image)
        np.testing.assert_allclose(made.detach().numpy(), expected, atol=2e-5)
    wrong = c_abstractor(connector, images[0].double().numpy()[::-1])  # the image upside down is another one
    assert np.abs(tokens[0].detach().numpy() - wrong).max() > 1e-2


@pytest.mark.parametrize("activation", ["silu", "identity"])
@torch.no_grad()
def test_a_c_abstractor_whose_last_convolutions_are_zero_is_spatial_pooling(activation):
    """Only its activation after the sum is left; without that, and without positions, it is pooling exactly."""
    options = CONNECTORS["c_abstractor"] | {"positions": False}
    connector, images = tiny_model(connector=options).model.connector, features()
    blocks = [*connector.before, *connector.after]
    before = connector(images)[1]
    for block in blocks:
        block.expand.weight.zero_()
        block.expand_norm.bias.zero_()
        if activation == "identity":
            block.act = torch.nn.Identity()
    act = torch.nn.SiLU() if activation == "silu" else torch.nn.Identity()
    grid = act(act(images)).unflatten(1, (4, 4))
    means = grid.reshape(2, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(connector(images)[1], act(act(means)), atol=1e-6, rtol=0)
    assert (before - act(act(means))).abs().max() > 0.1


@torch.no_grad()
def test_without_blocks_a_c_abstractor_is_the_method_spatial_pooling():
    options = {"name": "c_abstractor", "tokens": 4, "depth": 0, "positions": False}
    connected, pruned = tiny_model(connector=options), tiny_model()
    pixels = prompt([[3, "image", 7]])["pixel_values"]
    with methods.SpatialPooling(4)(pruned):
        expected = pruned.model.get_image_features(pixels).pooler_output
    made = connected.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(made[0], expected[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_context_attention_is_what_loops_compute():
    model = tiny_model(connector=CONNECTORS["context_attention"])
    connector, images, w = model.model.connector, features(), arrays(model.model.connector)
    generator = torch.Generator().manual_seed(5)
    words = torch.randn(2, 6, 16, generator=generator)
    present = torch.tensor([[False, True, True, True, False, False], [False, True, False, False, False, False]])
    ready, content = connector(images, Question(words, present))
    for image in range(2):
        x, total = images[image].double().numpy(), np.zeros(32)
        keys = x @ w["key.weight"].T + w["key.bias"]
        for word in np.flatnonzero(present[image]):
            query = w["query.weight"] @ words[image, word].double().numpy() + w["query.bias"]
            scores = np.exp(keys @ query / np.sqrt(32))
            total += (scores / scores.sum()) @ x
        expected = w["project_context.weight"] @ (total / present[image].sum().item()) + w["project_context.bias"]
        np.testing.assert_allclose(ready[image, 0].numpy(), expected, atol=1e-5)
        expected = mean_of_cells(x.reshape(4, 4, -1), 2, 2).reshape(4, -1)
        np.testing.assert_allclose(content[image].numpy(), expected, atol=1e-6)
    other = connector(images, Question(words, present.roll(1, 1)))[0]
    assert (other - ready).abs().max() > 1e-3


@torch.no_grad()
def test_without_words_every_patch_has_the_same_weight():
    connector = tiny_model(connector=CONNECTORS["context_attention"]).model.connector
    question = Question(torch.randn(2, 3, 16), torch.tensor([[False] * 3, [True] * 3]))
    weights = connector.weights(features(), question)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1))
    torch.testing.assert_close(weights[0], torch.full((1, 16), 1 / 16))
    assert weights[1].std() > 1e-3
    torch.testing.assert_close(connector.weights(features(), None), torch.full((2, 1, 16), 1 / 16))


def sines(grid, width):
    """The table of 2D positions, number by number: half of the width for the column, half for the row."""
    table = np.zeros((*grid, width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(width // 4):
                rate = 10000 ** (-i / (width / 4))
                table[row, column, i] = np.sin(column * rate)
                table[row, column, width // 4 + i] = np.cos(column * rate)
                table[row, column, width // 2 + i] = np.sin(row * rate)
                table[row, column, 3 * width // 4 + i] = np.cos(row * rate)
    return table.reshape(-1, width)


def bicubic(line, size):
    """Resize along the first axis by cubic convolution (a = -0.75), pixel centres aligned, edges repeated."""
    out = np.zeros((size, *line.shape[1:]))
    for i in range(size):
        at = (i + 0.5) * len(line) / size - 0.5
        first = int(np.floor(at)) - 1
        for k in range(first, first + 4):
            d = abs(at - k)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i] += (near if d <= 1 else far) * line[min(max(k, 0), len(line) - 1)]
    return out


def test_positions_are_sines_and_are_resized_by_cubic_convolution():
    np.testing.assert_allclose(sine_positions((3, 2), 8).numpy(), sines((3, 2), 8), atol=1e-6)
    table = sines((2, 2), 16).reshape(2, 2, 16)
    table = bicubic(bicubic(table, 4).transpose(1, 0, 2), 4).transpose(1, 0, 2)
    np.testing.assert_allclose(resized_positions((2, 2), (4, 4), 16).numpy(), table.reshape(16, 16), atol=1e-5)
    assert torch.equal(resized_positions((3, 2), (3, 2), 8), sine_positions((3, 2), 8))


@torch.no_grad()
def test_the_resampler_is_pytorchs_attention_between_norms():
    connector, images = tiny_model(connector=CONNECTORS["resampler"]).model.connector, features()
    attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    parts = (connector.q_proj, connector.k_proj, connector.v_proj)
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(connector.out_proj.state_dict())
    patches = connector.patch_norm(images)
    here, there = (torch.tensor(sines((2, 2), 32)).float(), resized_positions((2, 2), (4, 4), 32))
    queries = (connector.query_norm(connector.queries) + here).expand(2, -1, -1)
    attended, _ = attention(queries, patches + there, patches)
    expected = connector.output_norm(attended) @ connector.output.weight.T
    tokens = connector(images)[1]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    with_positions_in_values, _ = attention(queries, patches + there, patches + there)
    wrong = connector.output_norm(with_positions_in_values) @ connector.output.weight.T
    assert (tokens - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_a_model_with_a_connector_is_llava_on_the_connectors_tokens(model):
    """The prompt with the connector's tokens in the places of the image tokens, through the decoder by itself."""
    inputs, inner = prompt(ROWS, places=places(model)), model.model
    tower = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    question = None
    if model.config.connector.reads_question:
        rows = [0, 2, 2]  # the rows that the images stand in
        ids = inputs["clip_input_ids"][rows].flatten(0, 1)
        words = inner.clip_text_model.text_model(input_ids=ids).last_hidden_state
        words = inner.clip_text_model.text_projection(words).unflatten(0, (3, -1)).flatten(1, 2)
        # 98 begins a text and 99 ends it; windows of zeros are padding.
        present = ((ids != 98) & ids.any(-1, keepdim=True)).unflatten(0, (3, -1)).flatten(1, 2)
        question = Question(words, present)
    ready, tokens = inner.connector(tower, question)
    tokens = inner.multi_modal_projector(tokens)
    tokens = tokens if ready is None else torch.cat([ready, tokens], 1)
    embeds = inner.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE_TOKEN] = tokens.flatten(0, 1)
    hidden = inner.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(model(**inputs).logits, model.lm_head(hidden), atol=1e-5, rtol=0)
    others = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert (model(**others).logits - model.lm_head(hidden)).abs().max() > 1e-3


STRATEGIES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_gives_what_its_rows_give_alone(model, strategy):
    inputs = prompt(ROWS, places=places(model))
    options = {"max_new_tokens": 5, "do_sample": False} | STRATEGIES[strategy]

    def new(inputs):
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    together = new(inputs)
    assert torch.equal(together, torch.cat([new(row) for row in rows_alone(inputs, ROWS)]))
    if strategy in ("static cache", "no cache"):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(together, expected[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def test_the_question_moves_the_token_of_context_alone():
    model = tiny_model(connector=CONNECTORS["context_attention"])
    inputs = prompt([[3, "image", 7]], places=5)

    def encoded(ids):
        asked = model.model.read_question(PromptInputs(inputs["input_ids"], clip_input_ids=ids), 1)
        return model.model.get_image_features(inputs["pixel_values"], question=asked).pooler_output[0]

    other = inputs["clip_input_ids"].clone()
    other[:, -1, 1] = (other[:, -1, 1] + 5) % 97 + 1
    one, two = encoded(inputs["clip_input_ids"]), encoded(other)
    assert torch.equal(one[1:], two[1:])
    assert (one[0] - two[0]).abs().max() > 1e-5


def test_a_missing_question_is_refused_under_strict():
    inputs = {k: v for k, v in prompt([[3, "image", 7]], places=5).items() if not k.startswith("clip")}
    strict = tiny_model(connector=CONNECTORS["context_attention"] | {"strict": True})
    for call in (strict, strict.generate):
        with pytest.raises(ValueError, match="clip_input_ids or CLIP's text tower is missing"):
            call(**inputs)
    model = tiny_model(connector=CONNECTORS["context_attention"])
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (1, 17)


@pytest.mark.parametrize("remote", [False, True])
@torch.no_grad()
def test_a_folder_keeps_the_connector(model, remote, tmp_path):
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["connector"] == model.config.connector.to_dict()
    again, info = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if remote:
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = prompt(ROWS, places=places(model))
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    names = {name for name in load_file(tmp_path / "model.safetensors") if "connector" in name}
    assert names == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}


def test_a_model_without_a_connector_says_nothing_of_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert "connector" not in json.loads((tmp_path / "config.json").read_text())
    assert not model.model.has_connector
    stock_twin(model)


STRANGER = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, copy, image = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(image), text="USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(copy)
processor.save_pretrained(copy)
for path in (folder, copy):
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
    print(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist())
"""


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_stranger_without_the_package_answers_with_a_connector(tmp_path):
    processor = make_processor(size=56, connector_tokens=5)
    model = model_for(processor, connector=CONNECTORS["context_attention"])
    folder, image = tmp_path / "model", tmp_path / "image.png"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.effect_mandelbrot((80, 60), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(image)
    inputs = processor(images=Image.open(image), text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    here = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    printed = stranger.run(STRANGER, folder, tmp_path / "copy", image, home=tmp_path)
    assert printed.splitlines()[-2:] == [str(here)] * 2


def test_the_processor_writes_a_placeholder_for_each_token_and_remembers_it(tmp_path):
    processor = make_processor(size=56, connector_tokens=5)
    pictures = [Image.new("RGB", (80, 60)), Image.new("RGB", (20, 70))]
    inputs = processor(images=pictures, text="USER: <image> and <image> what? ASSISTANT:")
    assert inputs["input_ids"][0].count(processor.image_token_id) == 10
    assert processor._get_num_multimodal_tokens(image_sizes=[(80, 60)])["num_image_tokens"] == [5]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.connector_tokens == 5
    assert again(images=pictures, text="<image><image>")["input_ids"][0].count(processor.image_token_id) == 10
    assert make_processor(size=56)(images=pictures[0], text="<image>")["input_ids"][0].count(
        processor.image_token_id
    ) == 16  # fmt: skip


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    llava = checkpoints.llava_folder(folder / "llava")
    checkpoints.clip_folder(folder / "clip", llava)
    clip_tokenizer().save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_joins_an_official_llava(official, name, tmp_path):
    torch.manual_seed(0)
    model = IVTPLlavaForConditionalGeneration.from_llava(
        official / "llava", official / "clip", connector=CONNECTORS[name]
    )
    assert not model.pruning_config.enabled
    values = {key: value.std().item() for key, value in model.model.connector.named_parameters() if value.dim() > 1}
    assert all(0.01 < std < 0.04 for std in values.values()), values
    with pytest.raises(ValueError, match="this model has"):
        join_connector(model, {"name": "c_abstractor", "tokens": 1})
    model.save_pretrained(tmp_path)
    processor = IVTPLlavaProcessor.from_llava(
        official / "llava", official / "clip", connector_tokens=model.config.connector.tokens
    )
    processor.save_pretrained(tmp_path)
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = processor(images=Image.new("RGB", (56, 56)), text="USER: <image>\nWhy? ASSISTANT:", return_tensors="pt")
    saved = again.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    # Some CPUs round a product by where its factors lie in memory.
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6, rtol=0)


BAD = [
    ({"tokens": 4}, "names: c_abstractor"),
    ({"name": "q_former"}, r"connector\.name='q_former'; allowed: c_abstractor, context_attention, resampler"),
    ({"name": "resampler", "tokens": 5}, r"connector\.tokens=5 with name='resampler'; allowed: squares"),
    ({"name": "resampler", "depth": 3}, r"connector\.depth=3 is no option of 'resampler'; allowed: tokens, heads"),
    ({"name": "resampler", "layers": 3}, r"Unknown connector option\(s\) layers; allowed: name, tokens"),
    ({"name": "resampler", "tokens": 4, "heads": 3}, r"connector\.heads=3; allowed: divisors of .* 32"),
    ({"name": "resampler", "tokens": True}, r"connector\.tokens=True; allowed: an integer of at least 1"),
    ({"name": "c_abstractor", "tokens": 25}, r"connector\.tokens=25 are 5 x 5 places; allowed: at most 4 x 4"),
    ({"name": "c_abstractor", "tokens": 4, "positions": 1}, r"connector\.positions=1; allowed: True, False"),
    ({"name": "c_abstractor", "tokens": 4, "depth": -1}, r"connector\.depth=-1; allowed: an integer of at least 0"),
    ({"name": "context_attention", "tokens": 1}, r"connector\.tokens=1 .*; allowed: at least 2"),
    ({"name": "context_attention", "tokens": 6}, r"connector\.tokens=6 are 1 x 5 places; allowed: at most 4 x 4"),
    (7, "connector=7"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_a_bad_connector_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IVTPLlavaForConditionalGeneration(tiny_config(connector=options))


def test_options_have_their_defaults_and_grids():
    assert ConnectorConfig("c_abstractor").to_dict() == {
        "name": "c_abstractor", "tokens": 64, "depth": 3, "positions": True,
    }  # fmt: skip
    assert ConnectorConfig.create("context_attention").grid == (8, 8)
    assert ConnectorConfig("context_attention", tokens=64).grid == (7, 9)
    assert ConnectorConfig("resampler").to_dict() == {"name": "resampler", "tokens": 64, "heads": None}
    assert IVTPLlavaConfig(connector="resampler").pruning.enabled is False
    assert IVTPLlavaConfig().connector is None


def test_pruning_and_connectors_exclude_each_other(model, official):
    refused = r"pruning chooses among patches|Pruning chooses among patches"
    with pytest.raises(ValueError, match=refused):
        IVTPLlavaForConditionalGeneration(tiny_config(connector=CONNECTORS["resampler"], enabled=True))
    with pytest.raises(ValueError, match=refused):
        IVTPLlavaForConditionalGeneration.from_llava(
            official / "llava", connector="resampler", pruning={"visual_tokens": 4}
        )
    inputs = prompt([[3, "image", 7]], places=places(model))
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=refused):
        model.set_pruning(enabled=True)
    with pytest.raises(ValueError, match="fastv chooses among patches"), methods.FastV(4)(model):
        pass
    with pytest.raises(ValueError, match="Nothing to explain"):
        model.explain(**inputs)
    assert torch.equal(model(**inputs).logits, expected)


def test_context_attention_needs_clips_text_tower():
    with pytest.raises(ValueError, match="reads the question with CLIP's text tower"):
        tiny_model(clip=False, connector=CONNECTORS["context_attention"])


def test_a_prompt_with_a_placeholder_for_every_patch_is_refused(model):
    with pytest.raises(ValueError, match=f"connector_tokens={places(model)}"):
        model(**prompt([[3, "image", 7]]))


STAGES = {
    "first": ("model.connector", "model.multi_modal_projector"),
    "second": ("model.connector", "model.multi_modal_projector", "model.language_model", "lm_head"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_connector_trains_in_llavas_two_stages(model, stage):
    model = tiny_model(connector=model.config.connector.to_dict()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(STAGES[stage]))
    model.train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    inputs = prompt([[3, "image", 7], [2, "image", 9]], places=places(model))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith(STAGES[stage]) for name in reached)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in moved if "connector" in name}
    assert not {name for name in moved if "vision_tower" in name or "clip" in name}


def test_pooling_averages_unequal_cells_as_loops_do():
    grid = torch.randn(1, 5, 4, 3)
    expected = mean_of_cells(grid[0].double().numpy(), 3, 2)
    np.testing.assert_allclose(pooled(grid, (3, 2))[0].numpy(), expected, atol=1e-6)
