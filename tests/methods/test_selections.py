"""Methods choose as plain NumPy loops do: on tiny random models and on the trained miniature."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from benchmarks.quality.world import draw_scene, questions
from modeling_ivtp import methods
from modeling_ivtp.flops.shapes import load_shape
from modeling_ivtp.methods import text_attention, vispruner
from modeling_ivtp.methods.cenprune import distinctiveness, farthest_and_distinct
from modeling_ivtp.methods.hiprune import neighbourhood
from modeling_ivtp.methods.prumerge import outliers_and_sample
from modeling_ivtp.methods.prunesid import shares, suppressed
from modeling_ivtp.methods.random import fingerprint
from modeling_ivtp.methods.selecting import cls_attention
from modeling_ivtp.methods.sparsevlm import adapted, recycled_tokens, text_raters
from modeling_ivtp.methods.spatial_pooling import cells
from modeling_ivtp.methods.tome import halving_schedule, merge
from modeling_ivtp.methods.tops import preserved
from modeling_ivtp.methods.vscan import merged_into, scanned
from modeling_ivtp.model.pruner import PromptStep
from modeling_ivtp.serving.answering import load_model
from tests.methods.test_methods import EXAMPLES, ROWS
from tests.support.selections import BY_IMAGE, BY_ROW, array, raters, top, visual_columns
from tests.support.tiny import prompt, tiny_model

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
CHECKED = [*BY_IMAGE, *BY_ROW]
VARIANTS = [
    ("topk", "in_tower", {"criterion": "similarity"}),
    ("topk+", "in_tower", {"criterion": "similarity"}),
    ("topk+", "in_decoder", {"criterion": "similarity"}),
    ("tome", "in_tower", {"spatial_order": True}),
    ("pyramiddrop", "in_decoder", {"next_layer": False}),
    ("visionzip", "in_features", {"keep_cls": False}),
    ("sparsevlm", "in_decoder", {"adaptive": False}),
    ("sparsevlm", "in_decoder", {"recycle": False}),
    ("prumerge+", "in_features", {"adaptive": False}),
    ("prumerge+", "in_features", {"keep": 1}),
    ("prumerge+", "in_features", {"keep": 12}),
    ("hiprune", "in_features", {"wrap": False}),
    ("hiprune", "in_features", {"keep": 15, "alpha": 1.0}),
    ("hiprune", "in_features", {"keep": 15, "alpha": 1.0, "wrap": False}),
    *(("vispruner", "in_features", {"important_ratio": ratio}) for ratio in (0.0, 0.3, 1.0)),
    ("ivtp-extended", "in_tower", {"options": {"sharpness": 0}}),
    ("ivtp-extended", "in_decoder", {"options": {"sharpness": 2.0}}),
    ("ivtp-extended-late", "in_features", {"sharpness": 2.0}),
    *(("prunesid", "in_features", {"keep": keep}) for keep in (1, 2, 3, 8, 14, 15)),
    ("prunesid", "in_features", {"keep_cls": False}),
    ("vscan", "in_features", {"windows": 3, "tower_tokens": 15, "local_ratio": 0.8}),
    ("vscan", "in_features", {"local_ratio": 0.0}),
    ("vscan", "in_features", {"local_ratio": 1.0}),
    *(("tops", step, {"normalization": "minmax"}) for step in ("in_features", "in_decoder")),
    *(("tops", "in_decoder", {"keep": keep, "diversity": 2.0, "coverage": 0.3}) for keep in (2, 3)),
]
"""Options under which a method chooses otherwise than by default."""
NEWEST = [
    *((name, "in_features") for name in ("hiprune", "vispruner", "prunesid", "vscan", "tops", "cen-divprune")),
    *((name, "in_decoder") for name in ("vscan", "tops")),
    ("cen-cdpruner", "in_prompt"),
]
"""Steps at which one token in place of another must be noticed."""


@pytest.fixture(scope="module")
def miniature():
    model, processor = load_model(MINIATURE, device="cpu", dtype="float32")
    scenes = [draw_scene("validation", index) for index in range(2)]
    asked = [questions(scene, 1)[0].prompt for scene in scenes]
    images = [Image.fromarray(scene.pixels) for scene in scenes]
    return model, dict(processor(images=images, text=asked, padding=True, padding_side="left", return_tensors="pt"))


def watch_choices(monkeypatch, pruner, step_name, compare):
    """Compare every choice a pruner makes at one of its steps."""
    choices = []
    choose = getattr(type(pruner), step_name)

    def choose_and_compare(self, step):
        choice = choose(self, step)
        compare(self, step, choice)
        choices.append(choice)
        return choice

    monkeypatch.setattr(type(pruner), step_name, choose_and_compare)
    return choices


def assert_same(choice, at, expected):
    kept, mixture = expected
    np.testing.assert_array_equal(array(choice.kept[at])[: len(kept)], kept)
    if mixture is not None:
        weights = array(choice.mixture[at])[: len(kept)]
        np.testing.assert_allclose(weights[:, : mixture.shape[1]], mixture, rtol=1e-4, atol=1e-6)
    else:
        assert choice.mixture is None or np.array_equal(array(choice.mixture[at])[: len(kept)].argmax(1), kept)


def compare_with_numpy(name, step_name):
    def compare(pruner, step, choice):
        if (name, step_name) in BY_IMAGE:
            for image in range(len(choice.kept)):
                assert_same(choice, image, BY_IMAGE[name, step_name](pruner, step, image))
            return
        rows, most = choice.kept.shape[:2]
        present = torch.ones(rows, most, dtype=torch.bool)
        if step_name == "in_decoder":
            present = step.sequence.image_present
        for row in range(rows):
            for image in range(most):
                if present[row, image]:
                    assert_same(choice, (row, image), BY_ROW[name, step_name](pruner, step, row, image))

    return compare


@pytest.mark.parametrize(("name", "step", "options"), [*((*checked, {}) for checked in CHECKED), *VARIANTS])
@torch.no_grad()
def test_choices_on_random_tensors_equal_numpy_loops(name, step, options, monkeypatch):
    model, method = tiny_model(), replace(EXAMPLES[name], **options)
    choices = watch_choices(monkeypatch, method.bind(model.config), step, compare_with_numpy(name, step))
    inputs = prompt([["image", 9], [3, "image", 5]] if step == "in_prompt" else ROWS)
    with method(model):
        model(**inputs)
    assert choices


ONE_IMAGE = [[3, "image", 7], [6, "image", 2], [4, "image"], [5]]
"""Rows of one image at most, with texts of different lengths after it: no query before the longest one is needed."""


@pytest.mark.parametrize("name", [name for name, step in BY_ROW if step == "in_decoder"])
@torch.no_grad()
def test_choices_equal_numpy_loops_where_texts_after_the_image_differ_in_length(name, monkeypatch):
    model, method = tiny_model(), EXAMPLES[name]
    compare = compare_with_numpy(name, "in_decoder")
    choices = watch_choices(monkeypatch, method.bind(model.config), "in_decoder", compare)
    with method(model):
        model(**prompt(ONE_IMAGE))
    assert choices


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), CHECKED)
@torch.no_grad()
def test_choices_on_the_trained_miniature_equal_numpy_loops(name, step, miniature, monkeypatch):
    model, inputs = miniature
    method = methods.make(name, 16)
    choices = watch_choices(monkeypatch, method.bind(model.config), step, compare_with_numpy(name, step))
    with method(model):
        model(**inputs)
    assert choices


def test_a_choice_that_is_off_by_one_token_is_noticed(monkeypatch):
    model, method = tiny_model(), methods.FastV(4)

    def shifted(self, step):
        choice = methods.PyramidDrop.in_decoder(self, step)
        object.__setattr__(choice, "kept", (choice.kept + 1).clamp_max(15))
        return choice

    monkeypatch.setattr(methods.FastV, "in_decoder", shifted)
    watch_choices(monkeypatch, method, "in_decoder", compare_with_numpy("fastv", "in_decoder"))
    with pytest.raises(AssertionError), method(model):
        model(**prompt(ROWS))


@pytest.mark.parametrize(("name", "step"), NEWEST)
@torch.no_grad()
def test_one_token_in_place_of_another_is_noticed(name, step, monkeypatch):
    model, method = tiny_model(), EXAMPLES[name]
    choose = getattr(type(method), step)

    def swapped(self, asked):
        choice = choose(self, asked)
        kept = choice.kept.clone()
        row = kept.view(-1, kept.shape[-1])[0]
        row[0] = next(token for token in range(choice.scores.shape[-1]) if token not in row)
        object.__setattr__(choice, "kept", kept)
        return choice

    monkeypatch.setattr(type(method), step, swapped)
    watch_choices(monkeypatch, method, step, compare_with_numpy(name, step))
    with pytest.raises(AssertionError), method(model):
        model(**prompt([["image", 9], [3, "image", 5]]))


@torch.no_grad()
def test_raters_are_the_text_that_is_similar_to_the_image(monkeypatch):
    model, seen = tiny_model(), []
    prepare = methods.SparseVLM.prepare
    monkeypatch.setattr(
        methods.SparseVLM,
        "prepare",
        lambda self, sequence, embeds: seen.append((sequence, embeds)) or prepare(self, sequence, embeds),
    )
    with methods.SparseVLM(4)(model):
        model(**prompt(ROWS))
    ((sequence, embeds),) = seen
    mine = text_raters(sequence, embeds)
    for row, images in enumerate([1, 0, 2, 2]):
        for image in range(images):
            expected = raters(sequence, array(embeds)[row], row, image)
            assert mine[row, image].nonzero().flatten().tolist() == expected


def test_raters_who_agree_leave_fewer_tokens():
    assert adapted(16, 64, rank=8, raters=8) == 16
    assert adapted(16, 64, rank=4, raters=8) == 64 - round(48 / 56 * 60)
    assert adapted(16, 64, rank=1, raters=8) < adapted(16, 64, rank=7, raters=8) < 16


def test_recycled_tokens_are_a_tenth_of_three_tenths():
    def clusters_of(dropped):
        return int((int(0.3 * dropped) + 1) / 10) + 1

    for tokens, keep in ((576, 192), (300, 200), (64, 16), (5, 4)):
        clusters = recycled_tokens(tokens, keep)
        assert clusters_of(tokens - keep + clusters) <= clusters
        assert clusters == 1 or clusters_of(tokens - keep + clusters - 1) > clusters - 1
    assert recycled_tokens(5, 1) == 0


@pytest.mark.parametrize(
    ("published", "by_rank", "left"),
    [(192, (300, 200, 110), (309, 204, 113)), (128, (303, 110, 36), (312, 117, 39)), (64, (66, 30, 17), (82, 32, 18))],
)
def test_published_counts_of_sparsevlm_are_the_tables_of_its_code(published, by_rank, left):
    method, tokens = methods.SparseVLM(published=published), 576
    config = load_shape("llava-1.5-7b")
    plan = method.plan(config, 576)
    assert plan.exact
    assert [(group.last, group.keep) for group in plan.decoder] == list(zip((2, 6, 15), left, strict=True))
    # A layer counts there with what it passes on: 192 is 2 x 576, 4 x 309, 10 x 204 and 16 or 17 x 113 by 32 layers.
    assert (2 * 576 + 4 * left[0] + 9 * left[1] + 17 * left[2]) / 32 == pytest.approx(published, abs=1)
    for count, total in zip(by_rank, left, strict=True):
        assert total - recycled_tokens(tokens, total) == count
        tokens = total
    unrecycled = methods.SparseVLM(published=published, recycle=False).plan(config, 576)
    assert tuple(group.keep for group in unrecycled.decoder) == by_rank


EVERY_LAYER = tuple(range(23))
PUBLISHED = [
    (methods.TopK(64), EVERY_LAYER, ()),
    (methods.ToMe(64), EVERY_LAYER, ()),
    (methods.TopKPlus(64), EVERY_LAYER, tuple(range(12))),
    (methods.ToMePlus(64), EVERY_LAYER, tuple(range(12))),
    (methods.EViT(64), (7, 12, 18), ()),  # 4, 7 and 10 of 12, of the 23 below the features
    (methods.FastV(64), (), (1,)),  # K = 2
    (methods.PyramidDrop(64), (), (7, 15, 23)),  # after 8, 16 and 24 of 32
    (methods.IVTP(64), (2, 5, 8, 11, 14, 17, 20, 23), (2, 5, 8, 11)),
]


@pytest.mark.parametrize(("method", "tower", "decoder"), PUBLISHED, ids=lambda value: getattr(value, "name", None))
def test_methods_drop_after_the_layers_of_their_papers(method, tower, decoder):
    config = load_shape("llava-1.5-7b")
    plan = method.bind(config).plan(config, 576)
    assert tuple(group.last for group in plan.tower) == tower
    assert tuple(group.last for group in plan.decoder) == decoder
    assert (plan.features, plan.prompt, plan.final_tokens) == (None, None, 64)
    in_the_middle = method.name in ("tome", "tome+", "evit")  # between attention and MLP
    assert all(group.middle == in_the_middle for group in plan.tower)


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (methods.VisionZip(64), (-2,)),
        (methods.VisPruner(64), (-2,)),
        (methods.PruneSID(64), (-2,)),
        (methods.HiPrune(64), (8, -2)),  # the ninth layer of 24
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_methods_read_the_layers_of_their_papers(method, layers):
    assert method.bind(load_shape("llava-1.5-7b")).needs.recorded_layers == layers


def attention_of(layers):
    """Note each layer's attention map as transformers computes it (eager), averaged over heads."""
    maps = {}

    def noting(number):
        return lambda module, args, output: maps.update({number: output[1].detach().mean(1)})

    hooks = [layer.self_attn.register_forward_hook(noting(number)) for number, layer in enumerate(layers)]
    return maps, hooks


@torch.no_grad()
def test_a_tower_record_is_the_attention_of_its_layer(monkeypatch):
    model, seen = tiny_model(attention="eager"), []
    method = EXAMPLES["vscan"].bind(model.config)
    choose = methods.VScan.in_features

    def choose_and_read(self, step):
        seen.append({layer: cls_attention(record) for layer, record in step.records.items()})
        return choose(self, step)

    monkeypatch.setattr(methods.VScan, "in_features", choose_and_read)
    maps, _ = attention_of(model.model.vision_tower.encoder.layers)
    with method(model):
        model.model.get_image_features(prompt(ROWS)["pixel_values"])
    (rows,) = seen
    assert set(rows) == {method.local_layer - 1, -2}
    for layer, row in rows.items():
        own = layer % 6
        torch.testing.assert_close(row, maps[own][:, 0, 1:], atol=1e-6, rtol=1e-5)
        for other in set(maps) - {own}:
            assert (row - maps[other][:, 0, 1:]).abs().max() > 1e-2  # the comparison can fail


@pytest.mark.parametrize("turns", [1, 2])
@torch.no_grad()
def test_a_decoder_record_is_the_attention_of_its_layer(turns, monkeypatch):
    """In padded batches, and over the cache of an earlier turn in which another row was padded."""
    model, seen, past = tiny_model(attention="eager"), [], DynamicCache()
    method = EXAMPLES["text_attention"]
    choose = methods.TextAttention.in_decoder

    def choose_and_read(self, step):
        maps = [record.attention_map(0) for record in step.decoder_records]
        seen.append((step.group, step.sequence.valid, step.decoder_records[0].past, maps))
        return choose(self, step)

    monkeypatch.setattr(methods.TextAttention, "in_decoder", choose_and_read)
    computed, _ = attention_of(model.model.language_model.layers)
    mask = torch.zeros(2, 0, dtype=torch.long)
    with method(model):
        for turn in range(turns):
            seen.clear()
            inputs = prompt([[3, "image", 2], [2, "image", 5]][:: (1, -1)[turn]], seed=turn, guided=False)
            mask = torch.cat([mask, inputs["attention_mask"]], 1)
            model(**inputs | {"attention_mask": mask}, past_key_values=past)
    assert [(group.first, group.last) for group, *_ in seen] == [(0, 1), (2, 3)]
    for group, valid, held, maps in seen:
        assert (held > 0) == (turns > 1)
        assert not valid.all()
        for layer, found in enumerate(maps, group.first):
            assert found.shape == (2, valid.shape[1], valid.shape[1])
            for row in range(2):
                expected = computed[layer][row, :, held:][valid[row]]
                torch.testing.assert_close(found[row][valid[row]], expected, atol=1e-6, rtol=1e-4)
                other = computed[layer ^ 1][row, :, held:][valid[row]]
                assert (found[row][valid[row]] - other).abs().max() > 1e-2  # the comparison can fail


def test_random_patches_depend_on_image_and_seed():
    model, inputs = tiny_model(), prompt([["image", 2], ["image", 2]])
    kept = {}
    for seed in (0, 1):
        with methods.Random(6, seed=seed)(model):
            kept[seed] = model.model.get_image_features(inputs["pixel_values"]).kept_patches
            alone = model.model.get_image_features(inputs["pixel_values"][1:]).kept_patches
        assert torch.equal(kept[seed][1:], alone)
        assert not torch.equal(*kept[seed])
    assert not torch.equal(kept[0], kept[1])
    assert fingerprint(inputs["pixel_values"][0]) != fingerprint(inputs["pixel_values"][0].flip(0))


def test_random_patches_cover_the_image_evenly():
    model = tiny_model()
    images = torch.randn(300, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with methods.Random(4)(model), torch.no_grad():
        counts = model.model.get_image_features(images).kept_patches.flatten().bincount(minlength=16)
    assert (counts - 75).abs().max() < 4.5 * (300 * 0.25 * 0.75) ** 0.5


def test_cells_are_the_squarest_grid_that_fits():
    assert cells(64, 24, 24) == (8, 8)
    assert cells(32, 24, 24) == (4, 8)
    assert cells(192, 24, 24) == (12, 16)
    with pytest.raises(ValueError, match=r"keep=29 is no grid within 24 x 24 patches; nearest: 27, 28, 30"):
        cells(29, 24, 24)


def test_merging_never_takes_more_than_half_at_once():
    for end in (1, 16, 64, 120):
        counts = (576, *halving_schedule(576, end, 23))
        assert counts[-1] == end
        assert all(2 * after >= before > after for before, after in pairwise(counts))


@torch.no_grad()
def test_what_a_patch_receives_follows_from_queries_and_keys_as_from_the_map(monkeypatch):
    """A record has the averaged map only on a CPU, and without gradients."""
    steps, choose = [], methods.HiPrune.in_features

    def choose_twice(self, step):
        steps.append(choose(self, step))
        for record in step.records.values():
            assert record.averaged_map is not None
            record.averaged_map = None
        return choose(self, step)

    monkeypatch.setattr(methods.HiPrune, "in_features", choose_twice)
    with EXAMPLES["hiprune"](tiny_model()) as model:
        again = model.model.get_image_features(prompt(ROWS)["pixel_values"]).kept_patches
    assert torch.equal(steps[0].kept, again)


def test_hiprunes_share_is_counted_in_fives():
    """As in its authors' code: an anchor and its four neighbours; without a whole five of the budget there is none."""
    assert [round(keep * 0.1 / 5) for keep in (16, 64, 128, 192)] == [0, 1, 3, 4]
    corner = torch.tensor([[0], [7]])
    assert neighbourhood(corner, (2, 4), True).tolist() == [[0, 0, 1, 0, 4], [7, 6, 7, 3, 7]]
    assert neighbourhood(torch.tensor([[4]]), (2, 4), True).tolist() == [[4, 3, 5, 0, 7]]
    assert neighbourhood(torch.tensor([[4]]), (2, 4), False).tolist() == [[4, 4, 5, 0, 4]]


def test_vispruner_alternates_over_what_is_left_of_the_first_set_and_then_the_second():
    """Of patches 0, 2, 4 the most similar to one of 1, 3 goes first; then 2, 1 meet 4, 3, in the new order."""
    similarity = torch.zeros(1, 5, 5)
    for one, other, value in ((0, 1, 0.9), (2, 3, 0.5), (4, 3, 0.4), (2, 4, 0.8)):
        similarity[0, one, other] = similarity[0, other, one] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vispruner, "AT_ONCE", 1)
        left = [vispruner.without_duplicates(similarity, torch.arange(5)[None], keep)[0].tolist() for keep in (4, 3)]
    assert left == [[2, 4, 1, 3], [1, 4, 3]]


def test_vscans_local_tokens_are_as_many_of_every_window():
    """96 tokens of LLaVA-1.5: three of each of 16 windows of 6 x 6; a remainder is global."""
    attention = torch.rand(2, 576, generator=torch.Generator().manual_seed(0))
    chosen = scanned(attention, (24, 24), 4, 48)
    windows = chosen.view(2, 4, 6, 4, 6).sum((2, 4))
    assert (windows == 3).all()
    assert scanned(attention, (24, 24), 4, 63).sum(1).tolist() == [48, 48]
    assert scanned(attention, (24, 24), 4, 15).sum(1).tolist() == [0, 0]
    assert scanned(torch.rand(1, 10), (2, 5), 4, 16).all()  # no more windows than rows and columns


def test_vscans_schedule_is_that_of_its_scripts():
    """96 tokens before the decoder and 32 after layer 16 make an average of 64."""
    config = load_shape("llava-1.5-7b")
    plan = methods.VScan(average=64).plan(config, 576)
    assert (plan.features, plan.decoder[0].last, plan.decoder[0].keep) == (96, 15, 32)
    assert plan.layer_average(32) == 64
    assert methods.VScan(32).bind(config).needs.recorded_layers == (5, -2)


@pytest.mark.parametrize(("name", "layers"), [("llava-1.5-7b", (12, 24)), ("llava-1.5-13b", (15, 30))])
def test_the_schedule_of_tops_is_table_9(name, layers):
    """128 tokens, 64 and 16 are what the paper calls 64; the larger model's layers are the same shares of its depth."""
    config = load_shape(name)
    for target, coverage in ((128, 0.5), (64, 1.0), (32, 1.0)):
        method = methods.TOPS(target // 4).bind(config)
        plan = method.plan(config, 576)
        assert plan.features == 2 * target
        assert [(group.last + 1, group.keep) for group in plan.decoder] == [
            *zip(layers, (target, target // 4), strict=True)
        ]
        assert method.coverage == coverage


def test_tops_takes_relevance_coverage_and_diversity_by_their_weights():
    """Token 0 is the most relevant; 1 is like it and relevant; 2 stands for 3 and 4; 5 is unlike all others."""
    relevance = torch.tensor([0.5, 0.4, 0.02, 0.02, 0.02, 0.04]).double()
    similarity = torch.eye(6).double()
    similarity[0, 1] = similarity[1, 0] = 0.9
    for one, other in ((2, 3), (2, 4)):
        similarity[one, other] = similarity[other, one] = 0.8
    similarity[5, :5] = similarity[:5, 5] = -0.5
    chosen = {
        weights: preserved(relevance, similarity, 2, *weights, "mean").tolist()[1]
        for weights in ((0.0, 0.0), (9.0, 0.0), (0.0, 9.0))
    }
    assert chosen == {(0.0, 0.0): 1, (9.0, 0.0): 5, (0.0, 9.0): 2}


def test_distinctiveness_is_the_mean_cosine_with_the_others_of_features_that_are_not_centred():
    features = torch.tensor([[2.0, 0.1], [1.0, 0.0], [3.0, -0.1], [0.0, 1.0]]).double()
    scores = distinctiveness(features)
    unit = torch.nn.functional.normalize(features, dim=-1)
    expected = -((unit @ unit.T).sum(-1) - 1) / 3
    assert torch.allclose(scores, (expected - expected.min()) / (expected.max() - expected.min()))
    assert scores.argmax() == 3
    assert distinctiveness(torch.ones(1, 3, 2).double()).tolist() == [[0.0] * 3]


def test_centred_tokens_are_farther_apart_than_right_angles():
    """A common direction hides that 0 and 1 are opposite; the weak token 2 is far from both, but not distinct."""
    features = torch.tensor([[[9.0, 1.0, 0.0], [9.0, -1.0, 0.0], [9.0, 0.0, 0.05], [9.0, 0.0, -0.05]]]).double()
    unit = torch.nn.functional.normalize(features - features.mean(1, keepdim=True), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    assert distance[0, 0, 1] == pytest.approx(2)
    picked = farthest_and_distinct(distance, distinctiveness(features), 2)
    assert picked.tolist() == [[0, 1]]


def test_merging_takes_the_mean_of_a_kept_token_and_of_those_nearest_to_it():
    unit = torch.nn.functional.normalize(torch.tensor([[[1.0, 0], [0, 1], [0.9, 0.1], [1, 0]]]), dim=-1)
    mixture = merged_into(unit @ unit.transpose(1, 2), torch.tensor([[0, 1, 3]]))
    assert mixture[0].tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_prunesid_suppresses_what_is_similar_to_a_picked_patch_of_its_group():
    attention, groups = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0, 0, 0, 1])
    similar = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]).bool()
    assert suppressed(attention, similar, groups, 2).tolist() == [1, 0, 4, 0]
    assert suppressed(attention, similar, torch.zeros(4, dtype=torch.long), 2).tolist() == [1, 0, 4, 4]


def test_prunesids_shares_follow_what_was_not_suppressed():
    assert shares([10, 10, 4], [2, 6, 4], 12, 11) == [2, 5, 4]  # at most five of each 64
    assert shares([10, 10, 4], [1, 1, 1], 12, 12) == [4, 4, 4]  # more than was picked, evenly
    assert shares([12, 0, 4], [6, 0, 2], 8, 8) == [5, 0, 3]
    assert sum(shares([30, 300, 246], [3, 30, 24], 192, 191)) == 191


@torch.no_grad()
def test_prunesid_keeps_as_many_patches_less_one_and_cls(monkeypatch):
    choices, choose = [], methods.PruneSID.in_features
    monkeypatch.setattr(
        methods.PruneSID, "in_features", lambda self, step: choices.append(choose(self, step)) or choices[-1]
    )
    for keep_cls in (True, False):
        with methods.PruneSID(9, keep_cls=keep_cls)(tiny_model()) as model:
            model.model.get_image_features(prompt(ROWS)["pixel_values"])
    assert choices[0].kept.shape == choices[1].kept.shape == (5, 9)
    assert choices[0].mixture[..., -1].sum(-1).tolist() == [1.0] * 5
    assert choices[1].mixture is None


@pytest.mark.parametrize("seed", range(4))
def test_cdpruner_ranks_near_ties_as_exact_determinants_do(seed):
    """Features that differ by less than float32 resolves in a product of unit vectors."""
    draws = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 1, 1, 32, generator=draws) + 1e-3 * torch.randn(1, 1, 48, 32, generator=draws)
    patches, text = torch.randn(1, 1, 48, 8, generator=draws), torch.randn(1, 1, 8, generator=draws)
    step = PromptStep(6, features, patches, text, torch.ones(1, 1, dtype=torch.bool))
    method = methods.CDPruner(6)
    assert_same(method.in_prompt(step), (0, 0), BY_ROW["cdpruner", "in_prompt"](method, step, 0, 0))


@pytest.mark.parametrize("turns", [1, 2])
@torch.no_grad()
def test_pyramiddrop_ranks_with_the_layer_after_each_stage(turns, monkeypatch):
    """As transformers computes that layer's attention on the stage's output, on the cache of earlier turns."""
    model, method, steps, past = tiny_model(), methods.PyramidDrop(4, layers=(2, 3)), [], DynamicCache()
    choose = methods.PyramidDrop.in_decoder
    monkeypatch.setattr(methods.PyramidDrop, "in_decoder", lambda self, step: steps.append(step) or choose(self, step))
    with method(model):
        for turn in range(turns):
            steps.clear()
            length, inputs = past.get_seq_length(), prompt([[3, "image", 2 + turn]], seed=turn, guided=False)
            mask = torch.ones(1, length + inputs["input_ids"].shape[1], dtype=torch.long)
            model(**inputs | {"attention_mask": mask}, past_key_values=past)
    assert [step.group.last for step in steps] == [1, 2]
    language = tiny_model(attention="eager").model.language_model
    for step in steps:
        index, held, cache = step.group.last + 1, step.next_record.past, DynamicCache()
        for number, layer in enumerate(past.layers[: index + 1]):
            cache.update(layer.keys[:, :, :held], layer.values[:, :, :held], number)
        assert (held > 0) == (turns > 1)
        columns = torch.arange(step.sequence.size)
        visible = torch.arange(held + len(columns)) <= held + columns[:, None]
        layer = language.layers[index]
        _, weights = layer.self_attn(
            layer.input_layernorm(step.hidden),
            position_embeddings=language.rotary_emb(step.hidden, position_ids=step.sequence.slots + length),
            attention_mask=torch.where(visible, 0.0, -torch.inf)[None, None],
            past_key_values=cache,
        )
        received = array(weights[0, :, -1, held:].mean(0))[visual_columns(step.sequence, 0, 0)]
        np.testing.assert_array_equal(array(choose(method, step).kept)[0, 0], top(received, step.group.keep))


def test_pyramiddrop_cannot_look_beyond_the_last_layer():
    message = r"pyramiddrop: layers=\(2, 6\); allowed: 1 to 5, .*next_layer=False"
    with pytest.raises(ValueError, match=message), methods.PyramidDrop(4, layers=(2, 6))(tiny_model()):
        pass
    with methods.PyramidDrop(4, layers=(2, 6), next_layer=False)(tiny_model()):
        pass


def test_tome_alternates_over_its_own_output():
    """Its output is what is unmerged of the first set, then the second set; the next layer alternates over that."""
    metric = torch.eye(8)[None]
    metric[0, 3] = metric[0, 4]  # the second of the first set is merged into the third of the second set
    choice = merge(metric, 7, None, None, first_goes=False)
    assert choice.kept[0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert choice.kept[0][choice.order[0]].tolist() == [1, 5, 7, 0, 2, 4, 6]
    metric = torch.eye(7)[None]
    metric[0, 3] = metric[0, 2]  # patches 4 and 2: the first set is 5, 0, 4 now, and the second 1, 7, 2, 6
    again = merge(metric, 6, None, choice.order, first_goes=False)
    assert choice.kept[0][again.kept[0]].tolist() == [0, 1, 2, 5, 6, 7]


def test_tome_without_a_class_token_puts_the_most_similar_of_the_unmerged_first():
    metric = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1.0], [0.5, 0.5], [0.1, 1.0], [-1.0, 0.1]]])
    choice = merge(metric, 5, None, None, first_goes=True)
    unit = metric[0] / metric[0].norm(dim=-1, keepdim=True)
    best = (unit[::2] @ unit[1::2].T).amax(-1)
    unmerged = [int(token) * 2 for token in best.argsort(descending=True)[1:]]
    assert choice.kept[0][choice.order[0]].tolist() == [*unmerged, 1, 3, 5]


@torch.no_grad()
def test_the_order_of_tome_is_carried_from_layer_to_layer(monkeypatch):
    orders = []
    ask = methods.ToMe.in_tower
    monkeypatch.setattr(
        methods.ToMe, "in_tower", lambda self, step: orders.append((step.order, ask(self, step))) or orders[-1][1]
    )
    with methods.ToMe(4)(tiny_model()) as model:
        model(**prompt(ROWS))
    assert orders[0][0] is None
    for (_, before), (order, _) in pairwise(orders):
        assert torch.equal(order, before.order)
    moved = [not torch.equal(choice.order, choice.order.sort(-1).values) for _, choice in orders]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "patches"), [({}, 53), ({"keep_cls": False}, 54), ({"contextual": 64}, 0), ({"contextual": 0}, 63)]
)
@torch.no_grad()
def test_visionzips_dominant_tokens_are_cls_and_patches(options, patches, monkeypatch):
    asked, choose = [], methods.VisionZip.in_features

    def choose_and_note(self, step):
        asked.append((step, choose(self, step)))
        return asked[-1][1]

    monkeypatch.setattr(methods.VisionZip, "in_features", choose_and_note)
    model, _ = load_model(MINIATURE, device="cpu", dtype="float32")
    method = methods.VisionZip(64, **options)
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2, generator=torch.Generator().manual_seed(3))
    with method(model):
        features = model.model.get_image_features(pixels).pooler_output[0]
    ((step, choice),) = asked
    tokens = step.patches.shape[1]
    contextual = options.get("contextual", 10)
    alone = (choice.mixture[0] != 0).sum(-1) == 1
    assert choice.kept.shape == (1, 64)
    assert choice.mixture[0, :, :tokens].sum(-1)[alone].sum() == patches
    has_cls = choice.mixture.shape[-1] > tokens
    assert has_cls == (options.get("keep_cls", True) and contextual < 64)
    if has_cls:
        (row,) = choice.mixture[0, :, tokens].nonzero()
        expected = model.model.multi_modal_projector(step.cls)[0]
        torch.testing.assert_close(features[row[0]], expected, rtol=1e-5, atol=1e-5)


def test_the_adaptive_sample_of_prumerge_is_every_so_many_th_patch():
    """With 12 outliers of 576 it is range(0, 575, 16), as in the authors' code, without the outliers themselves."""
    attention = torch.rand(576, generator=torch.Generator().manual_seed(0)) * 1e-3
    outliers = [16, 33, 100, 160, 161, 200, 300, 301, 400, 480, 500, 575]
    attention[outliers] = 1.0
    kept = outliers_and_sample(attention, 576, adaptive=True).tolist()
    assert kept == sorted({*outliers, *range(0, 575, 16)})
    few = outliers_and_sample(attention, 20, adaptive=True).tolist()
    assert len(few) == 20
    assert set(outliers) < set(few) < set(kept)
    assert len(outliers_and_sample(attention, 5, adaptive=True)) == 5


@torch.no_grad()
def test_only_words_of_the_instruction_read(monkeypatch):
    """Of the text after an image, the words that `clip_spans` marks; all of it where none of it is marked."""
    model, inputs = tiny_model(), prompt(ROWS)
    inputs["clip_spans"][:, -2:] = 0
    inputs["clip_spans"][2] = 0
    kept = {}
    for readers in ("instruction", "text", "vision"):
        method = replace(EXAMPLES["text_attention"], readers=readers)
        with monkeypatch.context() as patch:
            compare = compare_with_numpy("text_attention", "in_decoder")
            choices = watch_choices(patch, method, "in_decoder", compare)
            with method(model):
                model(**inputs)
        kept[readers] = choices[0].scores
    first, other = kept["instruction"], kept["text"]
    assert not torch.allclose(first[0], other[0])
    assert not torch.allclose(kept["vision"][0], other[0])
    assert torch.equal(first[2], other[2])


@torch.no_grad()
def test_without_spans_all_text_after_the_image_reads_and_a_warning_says_so(monkeypatch):
    model, warnings = tiny_model(), []
    monkeypatch.setattr(text_attention.logger, "warning_once", warnings.append)
    inputs = {name: value for name, value in prompt(ROWS).items() if not name.startswith("clip_")}
    scores = {}
    for readers in ("instruction", "text"):
        with replace(EXAMPLES["text_attention"], readers=readers)(model):
            scores[readers] = [group.importance for image in model.explain(**inputs).images for group in image.groups]
    assert all(torch.equal(*pair) for pair in zip(*scores.values(), strict=True))
    assert warnings
    assert all("do not say which tokens are the instruction (clip_spans)" in warning for warning in warnings)


def test_the_defaults_of_text_attention_are_fused_and_progressive():
    config = load_shape("llava-1.5-7b")
    plan = methods.TextAttention(64).plan(config, 576)
    assert [(group.first, group.last, group.keep) for group in plan.decoder] == [(5, 7, 192), (13, 15, 64)]
    plan = methods.TextAttention(ratios=(0.5, 0.25)).plan(config, 576)
    assert [group.keep for group in plan.decoder] == [288, 72]
    plan = methods.TextAttention(64, layers=(8,), fuse=1).plan(config, 576)
    assert [(group.first, group.last, group.keep) for group in plan.decoder] == [(7, 7, 64)]
    plan = methods.TextAttention(64, layers=(2, 4)).plan(config, 576)
    assert [(group.first, group.last) for group in plan.decoder] == [(0, 1), (2, 3)]
    plan = methods.TextAttention(64, weights=(1.0, 2.0)).plan(config, 576)
    assert [(group.first, group.last) for group in plan.decoder] == [(6, 7), (14, 15)]
