"""Eq. 3 and 4 and the schedule, against NumPy loops written from the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_ivtp.model.configuration_ivtp import IVTPLlavaConfig, IVTPPruningConfig
from modeling_ivtp.model.rollout import AttentionRecord, aggregate, importance, keep_most_important
from modeling_ivtp.model.schedule import geometric_schedule, plan_pruning
from tests.support import reference


def softmax(values):
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def maps_and_records(seed, layers, images, heads, kv_heads, tokens, width, causal, reference_only):
    """Per layer and image: the head-averaged map (tokens x tokens), and the record the engine would make of it."""
    generator = np.random.default_rng(seed)
    maps, records = [], []
    for layer in range(layers):
        query = generator.normal(size=(images, heads, tokens, width)).astype(np.float32) * 2
        key = generator.normal(size=(images, kv_heads, tokens, width)).astype(np.float32) * 2
        visible = np.tril(np.ones((tokens, tokens), dtype=bool)) if causal else np.ones((tokens, tokens), dtype=bool)
        if causal:
            visible[0] = True  # the pseudo-CLS token stands last in the sequence and first among the tracked tokens
            visible[1:, 0] = False
        of_images = []
        for image in range(images):
            mean = np.zeros((tokens, tokens))
            for head in range(heads):
                logits = query[image, head].astype(np.float64) @ key[image, head * kv_heads // heads].T / width**0.5
                mean += softmax(np.where(visible, logits, -np.inf)) / heads
            of_images.append(mean)
        maps.append(of_images)
        record = AttentionRecord(reference_only=reference_only or layer == layers - 1)
        rows = 1 if record.reference_only else tokens
        record.fill(
            query=torch.from_numpy(query)[:, :, None, :rows],
            key=torch.from_numpy(key),
            visible=torch.from_numpy(visible)[None, None, :rows].expand(images, 1, -1, -1) if causal else None,
            scale=width**-0.5,
        )
        records.append(record)
    return maps, records


shapes = {
    "seed": st.integers(0, 2**31),
    "layers": st.integers(1, 5),
    "images": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "repeats": st.integers(1, 3),
    "tokens": st.integers(2, 12),
    "width": st.integers(1, 8),
    "causal": st.booleans(),
}


@given(**shapes)
@settings(max_examples=60, deadline=None)
def test_the_rolled_out_row_is_that_of_the_multiplied_maps(
    seed, layers, images, kv_heads, repeats, tokens, width, causal
):
    maps, records = maps_and_records(
        seed, layers, images, kv_heads * repeats, kv_heads, tokens, width, causal, reference_only=False
    )
    rows = aggregate(records, "rollout")[:, 0]
    for image in range(images):
        rolled = maps[0][image]
        for layer in range(1, layers):
            rolled = (maps[layer][image] + np.eye(tokens)) / 2 @ rolled
        np.testing.assert_allclose(rows[image], rolled[0], rtol=1e-4, atol=1e-6)


@given(how=st.sampled_from(["mean", "max", "multiply", "last"]), **shapes)
@settings(max_examples=60, deadline=None)
def test_the_other_aggregations_are_elementwise_over_the_layers(
    how, seed, layers, images, kv_heads, repeats, tokens, width, causal
):
    maps, records = maps_and_records(
        seed, layers, images, kv_heads * repeats, kv_heads, tokens, width, causal, reference_only=True
    )
    rows = aggregate(records, how)[:, 0]
    for image in range(images):
        stack = np.stack([maps[layer][image][0] for layer in range(layers)])
        expected = {"mean": stack.mean(0), "max": stack.max(0), "multiply": stack.prod(0), "last": stack[-1]}[how]
        if how == "multiply":
            expected = expected / expected.max()
        np.testing.assert_allclose(rows[image], expected, rtol=1e-3, atol=1e-6)


def test_multiplying_many_maps_does_not_underflow():
    _, records = maps_and_records(0, 24, 1, 1, 1, 400, 4, False, reference_only=True)
    scores = importance(aggregate(records, "multiply"), torch.ones(1, 1, 399))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), keep=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_importance_and_choice_follow_equation_4(seed, tokens, keep):
    generator = np.random.default_rng(seed)
    # Of so few different values products are equal, and of equals the earlier token stays.
    row, norms = np.round(generator.random(tokens + 1), 1) + 0.05, generator.choice([0.5, 1.0], tokens)
    scores = importance(torch.from_numpy(row).float()[None], torch.from_numpy(norms).float()[None])[0]
    total = sum(row[i + 1] * norms[i] for i in range(tokens))
    np.testing.assert_allclose(scores, [row[i + 1] * norms[i] / total for i in range(tokens)], rtol=1e-5)
    keep = min(keep, tokens)
    chosen = keep_most_important(scores, keep)
    best = sorted(sorted(range(tokens), key=lambda i: (-float(scores[i]), i))[:keep])
    assert chosen.tolist() == best


def test_of_equally_important_tokens_the_earlier_ones_stay():
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.3, 0.2], [0.5] * 6])
    assert keep_most_important(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert keep_most_important(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    many = torch.tensor([0.1, 0.3, 0.2]).repeat(200)  # a sort that is not stable errs on long rows alone
    assert keep_most_important(many, 100).tolist() == list(range(1, 300, 3))


def test_the_papers_schedule():
    assert geometric_schedule(576, 120, 8) == (473, 389, 320, 263, 216, 178, 146, 120)
    assert geometric_schedule(120, 64, 4) == (103, 88, 75, 64)
    plan = IVTPLlavaConfig().pruning_plan()
    assert [group.keep for group in plan.tower] == [473, 389, 320, 263, 216, 178, 146, 120]
    assert [(group.first, group.last) for group in plan.decoder] == [(0, 2), (3, 5), (6, 8), (9, 11)]
    assert plan.final_tokens == 64
    layers = plan.decoder_layer_tokens(32)
    assert layers == (120,) * 3 + (103,) * 3 + (88,) * 3 + (75,) * 3 + (64,) * 20


def paper_tflops(text_tokens, visual_layers):
    """Table 3's counting rule: 2 n (4 d^2 + 3 d m) + 4 n^2 d per layer, the head over all positions."""
    d, m, vocabulary = 4096, 11008, 32000
    total = 0.0
    for visual in visual_layers:
        n = text_tokens + visual
        total += 2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d
    return (total + 2 * (text_tokens + visual_layers[-1]) * d * vocabulary) / 1e12


@pytest.mark.parametrize(("text", "paper"), [(128, 3.0), (256, 4.7), (512, 8.2), (1024, 15.5)])
def test_the_schedule_gives_the_flops_of_table_3(text, paper):
    plan = IVTPLlavaConfig().pruning_plan()
    tower, text_tower = 0.202, 0.080  # Table 9
    total = paper_tflops(text, plan.decoder_layer_tokens(32)) + tower + text_tower
    assert total == pytest.approx(paper, abs=0.06)


@pytest.mark.slow
@given(
    visual=st.integers(1, 700),
    tower=st.none() | st.integers(1, 700),
    per_group=st.none() | st.sampled_from([1, 2, 3, 4, 6, 12]),
    tower_layers=st.sampled_from([None, 12, 24]),
)
@settings(max_examples=200, deadline=None)
def test_any_budget_gives_a_falling_schedule_that_ends_exactly(visual, tower, per_group, tower_layers):
    if tower is not None and tower < visual:
        return
    pruning = IVTPPruningConfig(
        visual_tokens=visual, tower_tokens=tower, layers_per_group=per_group, tower_layers=tower_layers
    )
    plan = plan_pruning(pruning, 576, 24, 32)
    if visual >= 576:
        assert plan is None
        return
    counts = [576, *(group.keep for group in (*plan.tower, *plan.decoder))]
    assert counts == sorted(counts, reverse=True)
    assert plan.final_tokens == visual
    assert plan.tower_tokens == min(576, tower if tower is not None else round(1.875 * visual))
    if None not in (per_group, tower):
        expected = reference.geometric_schedule(576, plan.tower_tokens, len(plan.tower))
        assert [group.keep for group in plan.tower] == list(expected)
