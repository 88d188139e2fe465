"""The oracle itself: against stock transformers, against runs where dropped tokens are really absent, and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from tests.support import reference

IMAGE, PATCHES, VOCAB = 99, 16, 100
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


class Pruning(SimpleNamespace):
    """The fields of the pruning config that the oracle reads; 16 to 8 patches in the tower, 8 to 3 in the decoder."""

    def __init__(self, **changes):
        defaults = {
            "enabled": True,
            "visual_tokens": 3,
            "tower_tokens": 8,
            "layers_per_group": 2,
            "tower_layers": None,
            "decoder_layers": 4,
            "relevance_threshold": -0.18,  # parts the random words: some images have key tokens, some words are none
            "aggregation": "rollout",
            "importance": "own",
            "choice": "top",
            "sharpness": None,
            "guidance": "clip",
            "pseudo_cls": "propagate",
            "positions": "original",
            "decoder_choice": "within",
        }
        assert set(changes) <= set(defaults)
        super().__init__(**defaults | changes)


def randomise(module: nn.Module) -> None:
    """Weights wide enough that attention is far from uniform."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


def build(
    family: str = "llama", feature_layer: int | list[int] = -2, dtype: torch.dtype = torch.float64
) -> SimpleNamespace:
    """A stock LLaVA, and the same modules with CLIP's text side under the names of the IVTP model.

    Double precision leaves no rounding to hide after; norms, softmax and RoPE of transformers stay in single.
    """
    torch.manual_seed(0)
    text = TEXT_CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=feature_layer
    )
    config._attn_implementation = "eager"
    stock = LlavaForConditionalGeneration(config).eval()
    clip_text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=60,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            projection_dim=20,
            eos_token_id=59,
            bos_token_id=58,
            pad_token_id=59,
        )
    ).eval()
    visual_projection = nn.Linear(32, 20, bias=False)
    for module in (stock, clip_text, visual_projection):
        randomise(module)
        module.to(dtype)
    parts = {name: getattr(stock.model, name) for name in ("vision_tower", "multi_modal_projector", "language_model")}
    core = SimpleNamespace(**parts, clip_text_model=clip_text, visual_projection=visual_projection)
    settings = SimpleNamespace(
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        pruning=Pruning(),
    )
    return SimpleNamespace(model=core, lm_head=stock.lm_head, config=settings, stock=stock)


@pytest.fixture(scope="module")
def model() -> SimpleNamespace:
    return build()


def make_inputs(*rows: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch; a row is a string of "t" (text), "q" (instruction token) and "I" (image).

    Instruction token number j of a row overlaps the CLIP tokens j + 1 and j + 2 of its two windows of eight tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(PATCHES if c == "I" else 1 for c in row) for row in rows]
    size = max(lengths)
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    spans = torch.zeros(len(rows), size, 2, dtype=torch.long)
    for b, row in enumerate(rows):
        column, queries = size - lengths[b], 0
        for c in row:
            width = PATCHES if c == "I" else 1
            text = int(torch.randint(1, VOCAB - 1, (1,), generator=generator))
            ids[b, column : column + width] = IMAGE if c == "I" else text
            if c == "q":
                spans[b, column] = torch.tensor([queries - 15, queries - 13])
                queries += 1
            column += width
    mask = (torch.arange(size)[None] >= size - torch.tensor(lengths)[:, None]).long()
    images = sum(row.count("I") for row in rows)
    clip = torch.randint(1, 58, (len(rows), 2, 8), generator=generator)
    clip[..., 0], clip[..., -1] = 58, 59
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(images, 3, 56, 56, generator=generator).double() if images else None,
        "clip_input_ids": clip,
        "clip_spans": spans,
    }


def run_stock(model: SimpleNamespace, inputs: dict, **kwargs):
    """LLaVA of transformers; with SDPA, because its eager attention turns padding into nan in double precision."""
    model.stock.set_attn_implementation("sdpa")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    output = model.stock(**kept, position_ids=positions, **kwargs)
    model.stock.set_attn_implementation("eager")
    return output


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_schedule_of_the_paper() -> None:
    assert reference.geometric_schedule(576, 120, 8) == [473, 389, 320, 263, 216, 178, 146, 120]
    assert reference.geometric_schedule(120, 64, 4) == [103, 88, 75, 64]
    assert reference.geometric_schedule(16, 40, 2) == [16, 16]
    assert reference.geometric_schedule(16, 4, 0) == []


def test_groups_cover_the_first_layers() -> None:
    assert reference.stage_groups(Pruning(layers_per_group=3), None, 24)[-1] == (21, 23)
    assert reference.stage_groups(Pruning(layers_per_group=3), 12, 32) == [(0, 2), (3, 5), (6, 8), (9, 11)]
    assert reference.stage_groups(Pruning(layers_per_group=4), 6, 32) == [(0, 3), (4, 5)]
    assert reference.stage_groups(Pruning(layers_per_group=None), 12, 6) == [(0, 5)]
    assert reference.stage_groups(Pruning(), 0, 6) == []
    assert reference.stage_groups(Pruning(enabled=False), None, 6) == []


def test_rollout_by_hand() -> None:
    first, second = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[0.2, 0.8], [1.0, 0.0]])
    # (second + I) / 2 = [[0.6, 0.4], [0.5, 0.5]], times first
    expected = np.array([[0.4, 0.6], [0.375, 0.625]])
    np.testing.assert_allclose(reference.rollout([first, second]), expected, atol=1e-12)
    np.testing.assert_allclose(reference.rollout([first]), first)
    for how, row in {"rollout": [0.4, 0.6], "mean": [0.35, 0.65], "max": [0.5, 0.8], "multiply": [0.1, 0.4]}.items():
        np.testing.assert_allclose(reference.aggregate([first, second], 0, how), row, atol=1e-12)
    np.testing.assert_allclose(reference.aggregate([first, second], 0, "last"), [0.2, 0.8])


def test_importance_and_choice_by_hand() -> None:
    scores = reference.importance_scores(np.array([0.1, 0.2, 0.3]), np.array([6.0, 2.0, 2.0]))
    np.testing.assert_allclose(scores, [0.375, 0.25, 0.375])
    candidates = np.array([3, 5, 9])
    assert reference.keep_most_important(candidates, scores, 2).tolist() == [3, 9]
    assert reference.keep_most_important(candidates, scores, 1).tolist() == [3]  # of equals the lower index
    assert reference.keep_most_important(candidates, scores, 8).tolist() == [3, 5, 9]
    many_equals = np.tile([0.1, 0.3, 0.2], 200)
    assert reference.keep_most_important(np.arange(600), many_equals, 100).tolist() == list(range(1, 300, 3))


def test_cosine_by_hand() -> None:
    np.testing.assert_allclose(reference.cosine(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([1.0, 0.0])), [0.6, 0.0])


def test_positions_by_hand() -> None:
    valid = np.array([0, 1, 1, 1, 1, 1], dtype=bool)
    exists = np.array([0, 1, 0, 1, 1, 1], dtype=bool)
    logical = np.array([0, 0, 1, 2, 3, 4])
    original = reference.rope_positions("original", exists, valid, logical, [4, 6])
    assert original.tolist() == [0, 0, 1, 2, 3, 4, 3, 5]
    compact = reference.rope_positions("compact", exists, valid, logical, [4, 6])
    assert compact[[1, 3, 4, 5]].tolist() == [0, 1, 2, 3]
    assert compact[6:].tolist() == [2, 4]


@pytest.mark.parametrize("family", TEXT_CONFIGS)
@pytest.mark.parametrize("pruning", [Pruning(enabled=False), Pruning(visual_tokens=40, tower_tokens=None)])
def test_without_dropping_it_is_stock_llava(family: str, pruning: Pruning) -> None:
    model = build(family)
    inputs = make_inputs("ttItqqt", "tIqtIqqtt", "tttqt")
    with torch.no_grad():
        expected = run_stock(model, inputs).logits
        result = reference.decoder_reference(model, **inputs, pruning=pruning)
    assert (result.alive == inputs["attention_mask"].bool().numpy()).all()
    assert_close(result.logits[result.alive], expected[result.alive])


@pytest.mark.parametrize("feature_layer", [-2, 3, [-2, 2]])
def test_vision_without_dropping_is_stock_clip(feature_layer: int | list[int]) -> None:
    model = build(feature_layer=feature_layer)
    pixels = make_inputs("I", "I")["pixel_values"]
    with torch.no_grad():
        stock = model.stock.get_image_features(pixels)
        tower = model.model.vision_tower(pixels)
        result = reference.vision_reference(model, pixels, pruning=Pruning(enabled=False))
    assert_close(result.projected, torch.stack(list(stock.pooler_output)))
    assert_close(result.image_embeds, model.model.visual_projection(tower.pooler_output))


def test_tower_importance_is_that_of_stock_attention_maps(model: SimpleNamespace) -> None:
    """Every group, on tensors that hold the standing patches only."""
    pixels = make_inputs("I", "I")["pixel_values"]
    tower = model.model.vision_tower
    with torch.no_grad():
        result = reference.vision_reference(model, pixels)
        for i in range(2):
            x, here, maps = tower.pre_layrnorm(tower.embeddings(pixels[i : i + 1])), np.arange(PATCHES), []
            groups = iter(result.groups[i])
            for index, layer in enumerate(tower.encoder.layers):
                normed = layer.layer_norm1(x)
                maps.append(layer.self_attn(normed)[1][0].double().mean(0))
                x = layer(x, None)
                if index % 2:
                    group = next(groups)
                    values = layer.self_attn.v_proj(normed)[0, 1:]
                    weighted = ((maps[1] + torch.eye(len(maps[1]))) / 2 @ maps[0])[0, 1:] * values.norm(dim=-1)
                    assert group.layers == (index - 1, index)
                    assert group.candidates.tolist() == here.tolist()
                    np.testing.assert_allclose(group.importance, weighted / weighted.sum(), rtol=1e-4)
                    best = weighted.topk(len(group.kept)).indices.sort().values
                    assert group.kept.tolist() == here[best].tolist()
                    x, here, maps = x[:, torch.cat([torch.tensor([0]), 1 + best])], group.kept, []
        assert [kept.tolist() for kept in result.kept] == [groups[-1].kept.tolist() for groups in result.groups]


def run_physically(model: SimpleNamespace, inputs: dict, selection: list[reference.Selection], pruning: Pruning):
    """One row through the layers of transformers, where a dropped token leaves the tensors.

    Returns the projected CLS of each image, the columns and hidden states (1, n, d) that enter each decoder layer and
    leave the last one, and the logits of the latter.
    """
    tower, language = model.model.vision_tower, model.model.language_model
    ids = inputs["input_ids"][0]
    embeds, columns = language.embed_tokens(ids), (ids == IMAGE).nonzero()[:, 0].view(-1, PATCHES)
    kept = ids != IMAGE
    cls = []
    ends = {last: g for g, (_, last) in enumerate(reference.stage_groups(pruning, pruning.tower_layers, 6))}
    for i, choice in enumerate(selection):
        x = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"][i : i + 1]))
        here, states = torch.arange(PATCHES), []
        for index, layer in enumerate(tower.encoder.layers):
            x = layer(x, None)
            states.append((here, x))
            if index in ends:
                stay = torch.as_tensor(choice.tower[ends[index]])
                x = x[:, torch.cat([torch.tensor([0]), 1 + torch.searchsorted(here, stay)])]
                here = stay
        standing, features = states[model.config.vision_feature_layer]
        projected = model.model.multi_modal_projector(features)[0]
        cls.append(projected[0])
        embeds[columns[i, here]] = projected[1 + torch.searchsorted(standing, here)]
        kept[columns[i, here]] = True
    now = kept.nonzero()[:, 0]
    x, entering = embeds[now][None], []
    ends = {last: g for g, (_, last) in enumerate(reference.stage_groups(pruning, pruning.decoder_layers, 6))}
    for index, layer in enumerate(language.layers):
        entering.append((now, x))
        x = layer(x, **attention_inputs(language, x, now if pruning.positions == "original" else None))
        if index in ends:
            for i, choice in enumerate(selection):
                kept[columns[i]] = False
                kept[columns[i, choice.decoder[ends[index]]]] = True
            x, now = x[:, kept[now]], now[kept[now]]
    return cls, [*entering, (now, x)], model.lm_head(language.norm(x))[0]


def attention_inputs(language: nn.Module, x: torch.Tensor, positions: torch.Tensor | None) -> dict:
    """A plain causal mask, and RoPE at ``positions`` or, where None, without gaps."""
    size = x.shape[1]
    positions = torch.arange(size) if positions is None else positions
    causal = torch.full((size, size), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    return {"attention_mask": causal, "position_embeddings": language.rotary_emb(x, position_ids=positions[None])}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layers_per_group", [2, 3, None])
@pytest.mark.parametrize("how", ["chosen", "given"])
@pytest.mark.parametrize("row", ["ttItqqt", "tIqIItqq"])
def test_masks_equal_physical_absence(
    model: SimpleNamespace, positions: str, layers_per_group: int | None, how: str, row: str
) -> None:
    pruning = Pruning(positions=positions, layers_per_group=layers_per_group)
    inputs = make_inputs(row)
    groups = {2: (3, 2), 3: (2, 2), None: (1, 1)}[layers_per_group]
    prescribed = [
        reference.Selection(
            [np.arange(g, PATCHES - g) for g in range(groups[0])],
            [np.arange(4 + g + i, 9 - g) for g in range(groups[1])],
        )
        for i in range(row.count("I"))
    ]
    with torch.no_grad():
        result = reference.decoder_reference(
            model, **inputs, pruning=pruning, selection=prescribed if how == "given" else None
        )
        selection = prescribed if how == "given" else result.selection
        cls, entering, logits = run_physically(model, inputs, selection, pruning)
    assert_close(result.vision.projected_cls, torch.stack(cls))
    for (columns, _), alive in zip(entering, [*result.layer_alive, result.alive], strict=True):
        assert np.flatnonzero(alive[0]).tolist() == columns.tolist()
    assert_close(result.logits[0, result.alive[0]], logits)
    for image, choice in zip(result.images, selection, strict=True):
        for group, kept in zip(image.tower + image.decoder, choice.tower + choice.decoder, strict=True):
            assert group.kept.tolist() == kept.tolist()


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("pseudo_cls", ["propagate", "pool"])
@pytest.mark.parametrize("guidance", ["clip", "mean_text", "visual_cls"])
def test_the_pseudo_cls_is_the_last_token_of_a_prompt_that_ends_with_its_image(
    model: SimpleNamespace, positions: str, pseudo_cls: str, guidance: str
) -> None:
    """Importance of every decoder group, with the attention maps of transformers for that shorter prompt."""
    pruning = Pruning(positions=positions, pseudo_cls=pseudo_cls, guidance=guidance)
    inputs = make_inputs("tqItqIItq", seed=5)
    language = model.model.language_model
    with torch.no_grad():
        result = reference.decoder_reference(model, **inputs, pruning=pruning)
        _, entering, _ = run_physically(model, inputs, result.selection, pruning)
        for image in result.images:
            end, token, maps, groups = image.columns[-1] + 1, image.pseudo_cls, [], iter(image.decoder)
            for index, layer in enumerate(language.layers[:4]):
                columns, x = entering[index]
                if pseudo_cls == "pool" and image.key_columns:
                    token = x[0, torch.isin(columns, torch.tensor(image.key_columns))].mean(0)
                before = columns[columns < end]
                prompt = torch.cat([x[0, : len(before)], token[None]])[None]
                where = torch.cat([before, torch.tensor([end])]) if positions == "original" else None
                options = attention_inputs(language, prompt, where)
                normed = layer.input_layernorm(prompt)
                maps.append(layer.self_attn(normed, **options)[1][0].double().mean(0))
                token = layer(prompt, **options)[0, -1]
                if index % 2:
                    group = next(groups)
                    at = torch.searchsorted(before, torch.as_tensor(image.columns[group.candidates]))
                    norms = layer.self_attn.v_proj(normed)[0, at].double().norm(dim=-1)
                    weighted = ((maps[1] + torch.eye(len(maps[1]))) / 2 @ maps[0])[-1, at] * norms
                    np.testing.assert_allclose(group.importance, weighted / weighted.sum(), rtol=1e-4)
                    best = group.candidates[weighted.topk(len(group.kept)).indices.sort().values]
                    assert group.kept.tolist() == best.tolist()
                    maps = []


def test_pool_and_propagate_part_at_the_second_layer(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt")
    first, second = (
        [
            reference.decoder_reference(model, **inputs, pruning=Pruning(pseudo_cls=p, layers_per_group=n))
            for n in (1, 2)
        ]
        for p in ("propagate", "pool")
    )
    np.testing.assert_allclose(first[0].images[0].decoder[0].importance, second[0].images[0].decoder[0].importance)
    assert not np.allclose(first[1].images[0].decoder[0].importance, second[1].images[0].decoder[0].importance)


def test_pseudo_cls_tokens_change_no_real_token(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt", "tIqtIqqtt")
    with torch.no_grad():
        chosen = reference.decoder_reference(model, **inputs)
        for change in ({"guidance": "visual_cls"}, {"guidance": "mean_text", "pseudo_cls": "pool"}):
            other = reference.decoder_reference(model, **inputs, selection=chosen.selection, pruning=Pruning(**change))
            pairs = list(zip(chosen.images, other.images, strict=True))
            assert any(not torch.equal(one.pseudo_cls, two.pseudo_cls) for one, two in pairs)
            assert any(not np.allclose(one.decoder[1].importance, two.decoder[1].importance) for one, two in pairs)
            assert torch.equal(other.logits[other.alive], chosen.logits[chosen.alive])


@pytest.mark.parametrize("aggregation", ["rollout", "mean", "max", "multiply", "last"])
@pytest.mark.parametrize("guidance", ["clip", "mean_text", "text_similarity", "visual_cls"])
def test_budgets_hold_with_every_option(model: SimpleNamespace, aggregation: str, guidance: str) -> None:
    pruning = Pruning(aggregation=aggregation, guidance=guidance, pseudo_cls="pool", positions="compact")
    inputs = make_inputs("tItqt", "tIqtIqqtt", "tqt")
    with torch.no_grad():
        result = reference.decoder_reference(model, **inputs, pruning=pruning)
    assert [image.row for image in result.images] == [0, 1, 1]
    for image in result.images:
        assert [len(group.kept) for group in image.tower] == [13, 10, 8]
        assert [len(group.kept) for group in image.decoder] == [5, 3]
        before = np.arange(PATCHES)
        for group in image.tower + image.decoder:
            assert group.candidates.tolist() == before.tolist()
            assert set(group.kept) <= set(before)
            assert group.kept.tolist() == sorted(group.kept)
            assert group.importance.sum() == pytest.approx(1)
            before = group.kept
        assert result.alive[image.row, image.columns].nonzero()[0].tolist() == before.tolist()
    sizes = [[int(layer[row].sum()) for layer in result.layer_alive] for row in range(3)]
    text = [4, 7, 3]
    images = [1, 2, 0]
    assert sizes == [[t + n * k for k in (8, 8, 5, 5, 3, 3)] for t, n in zip(text, images, strict=True)]


def test_stages_can_be_left_out(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt")
    vision_only = reference.decoder_reference(model, **inputs, pruning=Pruning(decoder_layers=0)).images[0]
    assert len(vision_only.kept) == 8
    assert vision_only.decoder == []
    language_only = reference.decoder_reference(model, **inputs, pruning=Pruning(tower_layers=0)).images[0]
    assert language_only.tower == []
    assert [len(group.kept) for group in language_only.decoder] == [7, 3]
    for visual_tokens, handed_over in {3: 6, 5: 9, 12: PATCHES}.items():  # 1.875 times as many
        pruning = Pruning(visual_tokens=visual_tokens, tower_tokens=None)
        assert len(reference.vision_reference(model, inputs["pixel_values"], pruning=pruning).kept[0]) == handed_over


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_row_does_not_feel_its_batch(model: SimpleNamespace, positions: str) -> None:
    pruning = Pruning(positions=positions)
    inputs = make_inputs("ttItqqt", "tIqtIqqtt", "tttqt")
    with torch.no_grad():
        batch = reference.decoder_reference(model, **inputs, pruning=pruning)
        for row, images in enumerate((slice(0, 1), slice(1, 3), None)):
            columns = inputs["attention_mask"][row].bool()
            names = ("input_ids", "attention_mask", "clip_spans")
            alone = {name: inputs[name][row : row + 1, columns] for name in names}
            alone["clip_input_ids"] = inputs["clip_input_ids"][row : row + 1]
            alone["pixel_values"] = None if images is None else inputs["pixel_values"][images]
            result = reference.decoder_reference(model, **alone, pruning=pruning)
            assert (result.alive[0] == batch.alive[row][columns]).all()
            assert_close(result.logits[0, result.alive[0]], batch.logits[row, batch.alive[row]])


@pytest.mark.parametrize("pseudo_cls", ["propagate", "pool"])
def test_generated_tokens_change_nothing_before_them(model: SimpleNamespace, pseudo_cls: str) -> None:
    pruning = Pruning(pseudo_cls=pseudo_cls)
    inputs = make_inputs("ttItqqt", "tIqtIqqtt")
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 10]])], dim=1)
    longer["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    with torch.no_grad():
        prompt = reference.decoder_reference(model, **inputs, pruning=pruning)
        computed = reference.decoder_reference(model, **longer, pruning=pruning)
        prescribed = reference.decoder_reference(model, **longer, pruning=pruning, selection=prompt.selection)
    for result in (computed, prescribed):
        assert (result.alive[:, :-3] == prompt.alive).all()
        assert result.alive[:, -3:].all()
        assert_close(result.logits[:, :-3][prompt.alive], prompt.logits[prompt.alive])
    assert torch.equal(computed.logits, prescribed.logits)


def test_relevance_is_the_cosine_of_stock_clip_features(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItIqqt")
    clip, language = model.model.clip_text_model, model.model.language_model
    columns = (inputs["clip_spans"][0, :, 1] < 0).nonzero()[:, 0].tolist()
    with torch.no_grad():
        words = clip.text_projection(clip.text_model(inputs["clip_input_ids"][0]).last_hidden_state).flatten(0, 1)
        pictures = model.model.visual_projection(model.model.vision_tower(inputs["pixel_values"]).pooler_output)
        embeds = language.embed_tokens(inputs["input_ids"][0, columns])
        for guidance in ("clip", "text_similarity"):
            pruning = Pruning(enabled=False, guidance=guidance)
            result = reference.decoder_reference(model, **inputs, pruning=pruning)
            for picture, cls, image in zip(pictures, result.vision.projected_cls, result.images, strict=True):
                if guidance == "clip":
                    c = torch.cosine_similarity(words, picture[None])
                    expected = torch.stack([c[1:3].mean(), c[2:4].mean()])
                else:
                    expected = torch.cosine_similarity(embeds, cls[None])
                assert list(image.relevance) == columns
                np.testing.assert_allclose(list(image.relevance.values()), expected, atol=1e-5)
                assert image.key_columns == [s for s, c_s in image.relevance.items() if c_s >= -0.18]


def test_the_threshold_parts_key_tokens_from_the_rest(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttIqqqqqqt")
    language = model.model.language_model
    with torch.no_grad():
        relevance = reference.decoder_reference(model, **inputs).images[0].relevance
        tau = sorted(relevance.values())[3]
        image = reference.decoder_reference(model, **inputs, pruning=Pruning(relevance_threshold=tau)).images[0]
        assert len(image.key_columns) == 3
        keys = language.embed_tokens(inputs["input_ids"][0, image.key_columns])
        assert_close(image.pseudo_cls, keys.mean(0))
        every = reference.decoder_reference(
            model, **inputs, pruning=Pruning(guidance="mean_text", relevance_threshold=1)
        )
        assert every.images[0].key_columns == list(relevance)


@pytest.mark.parametrize("missing", ["threshold", "inputs", "text tower", "instruction"])
def test_no_key_token_means_the_visual_cls(model: SimpleNamespace, missing: str) -> None:
    inputs, pruning = make_inputs("ttIttIttt" if missing == "instruction" else "ttIqtIqqt"), Pruning()
    model = SimpleNamespace(model=SimpleNamespace(**vars(model.model)), lm_head=model.lm_head, config=model.config)
    if missing == "threshold":
        pruning = Pruning(relevance_threshold=1.0)
    if missing == "inputs":
        inputs.update(clip_input_ids=None, clip_spans=None)
    if missing == "text tower":
        del model.model.clip_text_model, model.model.visual_projection
    with torch.no_grad():
        result = reference.decoder_reference(model, **inputs, pruning=pruning)
        expected = reference.decoder_reference(model, **inputs, pruning=Pruning(guidance="visual_cls"))
    for image, cls in zip(result.images, result.vision.projected_cls, strict=True):
        assert image.key_columns == []
        assert torch.equal(image.pseudo_cls, cls)
    assert torch.equal(result.logits, expected.logits)


def test_an_image_is_guided_by_its_own_turn(model: SimpleNamespace) -> None:
    inputs = make_inputs("tIqqttIqqt")
    start = 1 + PATCHES + 4
    pruning = Pruning(guidance="mean_text")
    with torch.no_grad():
        first, second = reference.decoder_reference(model, **inputs, turns=(0, start), pruning=pruning).images
        together = reference.decoder_reference(model, **inputs, pruning=pruning).images
    assert max(first.key_columns) < start <= min(second.key_columns)
    assert together[0].key_columns == together[1].key_columns == first.key_columns + second.key_columns


def test_loss_without_dropping_is_stock(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt", "tIqtIqqtt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels[0, : (inputs["attention_mask"][0] == 0).sum() + 1] = -100
    with torch.no_grad():
        expected = run_stock(model, inputs, labels=labels).loss
        result = reference.decoder_reference(model, **inputs, pruning=Pruning(enabled=False))
    assert_close(reference.reference_loss(result, labels).float(), expected)


def test_loss_ignores_what_a_dropped_token_predicts(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    behind_image = 2 + PATCHES
    tower = [np.arange(PATCHES)] * 3
    model.stock.zero_grad()
    losses = {}
    for name, last in {"dropped": [0, 1, 2], "kept": [0, 1, PATCHES - 1]}.items():
        prescribed = reference.Selection(tower, [np.arange(PATCHES), np.array(last)])
        result = reference.decoder_reference(model, **inputs, selection=[prescribed])
        per_token = nn.functional.cross_entropy(result.logits[0, :-1], labels[0, 1:], reduction="none")
        counted = [s for s in range(1, len(labels[0])) if labels[0, s] >= 0 and (name == "kept" or s != behind_image)]
        assert (behind_image in counted) == (name == "kept")
        losses[name] = reference.reference_loss(result, labels)
        assert_close(losses[name], per_token[torch.tensor(counted) - 1].mean())
    losses["dropped"].backward()
    for part in (model.model.vision_tower.embeddings, model.model.multi_modal_projector, model.model.language_model):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)
    model.stock.zero_grad()


def test_single_precision_agrees_with_double(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt")
    with torch.no_grad():
        double = reference.decoder_reference(model, **inputs)
        inputs["pixel_values"] = inputs["pixel_values"].float()
        single = reference.decoder_reference(build(dtype=torch.float32), **inputs)
    assert (single.logits.dtype, double.logits.dtype) == (torch.float32, torch.float64)
    assert (single.alive == double.alive).all()
    assert_close(single.logits[single.alive].double(), double.logits[double.alive], 1e-4)
    for one, other in zip(single.images[0].decoder, double.images[0].decoder, strict=True):
        np.testing.assert_allclose(one.importance, other.importance, atol=1e-5)


@pytest.mark.slow
def test_what_the_reference_cannot_do_raises(model: SimpleNamespace) -> None:
    inputs = make_inputs("ttItqqt")
    full = SimpleNamespace(**vars(model.config) | {"vision_feature_select_strategy": "full"})
    with pytest.raises(ValueError, match="strategy"):
        reference.vision_reference(SimpleNamespace(**vars(model) | {"config": full}), inputs["pixel_values"])
    mistral = build("mistral")
    mistral.model.language_model.config.sliding_window = 10
    with pytest.raises(ValueError, match="sliding window"):
        reference.decoder_reference(mistral, **inputs)
