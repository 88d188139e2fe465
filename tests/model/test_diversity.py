"""Greedy choices against determinants and distances spelt out, on every path; ties, and images with nothing left.

There is no GPU here: the Triton kernels are run by Triton's interpreter, and compiled for GPUs of several generations.
"""

import numpy as np
import pytest
import torch

from modeling_ivtp.model import diversity, fused_diversity
from modeling_ivtp.model.diversity import choose_diverse, farthest, quality, spanning
from modeling_ivtp.model.rollout import accumulate
from tests.support.interpreter import check_interpreted


def on_any_device(features, weights, scores, keep):
    """What `spanning` does where there is no CPU."""
    return diversity._filled(diversity._span(diversity._kernel(features, weights), keep), scores)


def in_triton(features, weights, scores, keep):
    """What `spanning` does on a GPU, in a process with Triton's interpreter."""
    return diversity._filled(fused_diversity.fused_span(diversity._kernel(features, weights), keep), scores)


PATHS = {"cpu": spanning, "any device": on_any_device}
SPREADING = {"cpu": farthest, "any device": diversity._spread}
EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def draw(seed, images=2, tokens=9, width=6):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, width, generator=generator) + torch.randn(width, generator=generator)
    return features, torch.rand(images, tokens, generator=generator, dtype=torch.float64) ** 0.25


def by_determinants(features, weights, keep):
    """Add the token that makes the determinant of the chosen rows and columns largest, over and over."""
    unit = features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    kernel = weights.numpy()[:, None] * (unit @ unit.T) * weights.numpy()
    chosen = []
    for _ in range(keep):
        sets = {token: [*chosen, token] for token in range(len(kernel)) if token not in chosen}
        chosen.append(max(sets, key=lambda token: np.linalg.det(kernel[np.ix_(sets[token], sets[token])])))
    return chosen


@EVERY_PATH
@pytest.mark.parametrize("seed", range(20))
def test_each_pick_has_the_largest_determinant(path, seed):
    features, weights = draw(seed)
    picked = path(features, weights, weights, 5)
    for image in range(2):
        assert picked[image].tolist() == by_determinants(features[image], weights[image], 5)
    # The controls: neither the weights alone nor the directions alone choose so.
    assert not torch.equal(picked, weights.argsort(descending=True)[:, :5])
    assert not torch.equal(picked, path(features, torch.ones_like(weights), weights, 5))


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_is_the_greedy_maximum_over_stretched_scores(seed):
    features, scores = draw(seed)
    for sharpness in (0.25, 2.0):
        spread = scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)
        stretched = ((scores - scores.amin(1, keepdim=True)) / spread) ** sharpness
        kept = choose_diverse(scores, features, 4, sharpness)
        for image in range(2):
            assert kept[image].tolist() == sorted(by_determinants(features[image], stretched[image], 4))


def test_quality_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(quality(scores, 0.5), [[0, 1, 0.5**0.5], [1, 1, 1]])
    np.testing.assert_allclose(quality(scores, 0.0), np.ones((2, 3)))
    assert quality(scores, 0.25).dtype == torch.float64


@EVERY_PATH
def test_of_equals_the_earlier_token_is_picked(path):
    equal = torch.ones(1, 6, dtype=torch.float64)
    assert path(torch.eye(6)[None] * 3, equal, equal, 4).tolist() == [[0, 1, 2, 3]]
    weights = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    assert path(torch.eye(6)[None], weights, weights, 5).tolist() == [[1, 3, 5, 0, 2]]
    # Directions of any length: equal weights are equal, whatever rounding makes of their lengths.
    features, _ = draw(0, images=1, tokens=6)
    assert path(features, equal, equal, 1).tolist() == [[0]]


@EVERY_PATH
@pytest.mark.parametrize("width", [1, 3])
def test_where_nothing_differs_any_more_the_highest_scores_fill_up(path, width):
    features, weights = draw(3, tokens=12, width=width)
    scores = torch.tensor([[0.0, 3, 1, 3, 2, 0, 5, 4, 1, 1, 0, 2]]).expand(2, -1)
    picked = path(features, weights, scores, 9)
    for image in range(2):
        spanned = by_determinants(features[image], weights[image], width)
        rest = sorted(set(range(12)) - set(spanned), key=lambda token: (-float(scores[image, token]), token))
        assert picked[image].tolist() == [*spanned, *rest[: 9 - width]]


@EVERY_PATH
def test_copies_add_nothing_and_tokens_without_weight_or_direction_come_last(path):
    features, weights = draw(4, images=1, tokens=4, width=8)
    twice = torch.cat([features, features], 1)
    picked = path(twice, weights.repeat(1, 2), torch.arange(8.0)[None], 8)
    assert picked[0, :4].tolist() == by_determinants(features[0], weights[0], 4)
    assert picked[0, 4:].tolist() == [7, 6, 5, 4]
    weights[0, 1], features[0, 2] = 0, 0
    assert set(path(features, weights, torch.arange(4.0)[None], 4)[0, :2].tolist()) == {0, 3}
    assert path(features, weights, torch.arange(4.0)[None], 4)[0, 2:].tolist() == [2, 1]


@EVERY_PATH
@pytest.mark.parametrize("broken", ["features", "weights", "scores", "all"])
def test_whatever_comes_every_token_is_picked_once(path, broken):
    features, weights = draw(5, tokens=8)
    scores = weights.clone()
    for name, tensor in (("features", features), ("weights", weights), ("scores", scores)):
        if broken in (name, "all"):
            tensor[0, 2] = float("nan")
    assert (path(features, weights, scores, 8).sort(1).values == torch.arange(8)).all()


@pytest.mark.parametrize("tokens", [20, 96])
def test_both_paths_pick_alike_and_a_batch_as_its_images(tokens):
    features, weights = draw(6, images=5, tokens=tokens, width=48)
    picked = spanning(features.half(), weights, weights, tokens)
    assert torch.equal(picked, on_any_device(features.half(), weights, weights, tokens))
    for image in range(5):
        one = slice(image, image + 1)
        assert torch.equal(spanning(features[one].half(), weights[one], weights[one], tokens), picked[one])
    assert spanning(features[:0], weights[:0], weights[:0], 3).shape == (0, 3)


@pytest.mark.parametrize("path", SPREADING.values(), ids=SPREADING)
def test_the_farthest_are_picked_one_after_the_other(path):
    for seed in range(10):
        features, _ = draw(seed)
        distance = torch.cdist(features, features)
        picked = path(distance, 5)
        for image, rows in enumerate(distance.tolist()):
            tokens = range(len(rows))
            chosen = [max(tokens, key=lambda i: min(rows[i][j] for j in tokens if j != i))]
            while len(chosen) < 5:
                rest = [i for i in tokens if i not in chosen]
                chosen.append(max(rest, key=lambda i: min(rows[i][j] for j in chosen)))
            assert picked[image].tolist() == chosen
    assert path(1 - torch.eye(5)[None], 3).tolist() == [[0, 1, 2]]
    assert path(torch.zeros(1, 4, 4), 4).tolist() == [[0, 1, 2, 3]]
    assert path(torch.zeros(2, 3, 3), 1).tolist() == [[0], [0]]


def test_accumulated_rows_are_sums_over_the_groups_that_a_patch_has_seen():
    """Two groups of three layers and one of two, as loops over patches; the CLS itself has no share."""
    generator = np.random.default_rng(0)
    alive, total, before = np.arange(8), np.zeros(8), None
    for layers, count in ((3, 8), (3, 5), (2, 3)):
        seen, alive = alive, np.sort(generator.choice(alive, count, replace=False))
        row = generator.random(1 + count)
        for place, patch in enumerate(alive):
            total[patch] += layers * count / 8 * row[1 + place]
        before = None if before is None else before[:, torch.from_numpy(np.isin(seen, alive))]
        before = accumulate(torch.from_numpy(row)[None].float(), layers, 8, before)
        np.testing.assert_allclose(before[0], total[alive], rtol=1e-6)
    # The control: the last group's own row ranks otherwise.
    assert not np.allclose(before[0], row[1:], rtol=0.1)


INTERPRETED = """
import torch
from modeling_ivtp.model.fused_diversity import fused_spread
from tests.model import test_diversity as tests
for seed in range(5):
    tests.test_each_pick_has_the_largest_determinant(tests.in_triton, seed)
tests.test_of_equals_the_earlier_token_is_picked(tests.in_triton)
for width in (1, 3):
    tests.test_where_nothing_differs_any_more_the_highest_scores_fill_up(tests.in_triton, width)
tests.test_copies_add_nothing_and_tokens_without_weight_or_direction_come_last(tests.in_triton)
for broken in ("features", "weights", "scores", "all"):
    tests.test_whatever_comes_every_token_is_picked_once(tests.in_triton, broken)
tests.test_the_farthest_are_picked_one_after_the_other(fused_spread)
# Several panels, of which the last is not full; or nothing is left to pick in the second one.
for tokens, width in ((50, 64), (50, 20), (33, 64)):
    features, weights = tests.draw(9, images=3, tokens=tokens, width=width)
    for keep in (1, 16, 33):
        found = tests.in_triton(features, weights, weights, keep)
        assert torch.equal(found, tests.spanning(features, weights, weights, keep)), (tokens, width, keep)
print("agreed")
"""


@pytest.mark.subprocess
def test_interpreted_the_kernels_pick_as_the_loops_do():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    check_interpreted(INTERPRETED)


@pytest.mark.parametrize("numbers", ["fp32", "fp64"])
@pytest.mark.parametrize("generation", [75, 80, 90])
def test_the_kernels_compile(generation, numbers):
    triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    floats = dict.fromkeys(("matrix", "left", "floor", "factors"), f"*{numbers}")
    sizes = dict.fromkeys(("tokens", "keep", "first", "count"), "i32")
    for kernel, signature, constants in (
        (fused_diversity._pick_panel, floats | {"picked": "*i64"} | sizes, {"PANEL": 16, "WIDTH": 1024}),
        (
            fused_diversity._pick_farthest,
            {"distance": f"*{numbers}", "first": "*i64", "picked": "*i64", "tokens": "i32", "keep": "i32"},
            {"WIDTH": 1024},
        ),
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        options = {"num_warps": fused_diversity._WARPS}
        assert triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options).asm["ptx"]


def test_where_the_kernels_fail_pytorch_takes_over(monkeypatch, caplog):
    """Without a C compiler Triton can be imported and cannot run."""

    def failing(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    assert not fused_diversity.is_served(torch.eye(3)[None])
    monkeypatch.setattr(fused_diversity, "fused_span", failing)
    assert not fused_diversity._compiles(torch.device("cpu"), torch.float64)
    assert "Choosing falls back to PyTorch on cpu" in caplog.text


@pytest.mark.parametrize("function", [lambda f, w: spanning(f, w, w, 4), lambda f, w: farthest(torch.cdist(f, f), 4)])
def test_a_choice_is_one_operator(function):
    features, weights = draw(7)
    expected = function(features, weights)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(features, weights), expected)

    class Module(torch.nn.Module):
        def forward(self, features, weights):
            return function(features, weights)

    exported = torch.export.export(Module(), (features, weights))
    ours = [str(node.target) for node in exported.graph.nodes if "diversity" in str(node.target)]
    assert len(ours) == 1
    assert torch.equal(exported.module()(features, weights), expected)


def test_the_operators_describe_themselves():
    features, weights = draw(8)
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(diversity._spanning, (features, weights, weights, 3), test_utils=checked)
    torch.library.opcheck(diversity._farthest, (torch.cdist(features, features), 3), test_utils=checked)
