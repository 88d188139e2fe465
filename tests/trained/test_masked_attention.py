"""Attention with weighted keys, in which learned pruners are trained: against plain loops and against gathering."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_ivtp.methods import FastV
from modeling_ivtp.model.masked_attention import EPSILON, masked_attention
from modeling_ivtp.model.pruner import PrunerWrapper
from modeling_ivtp.model.rollout import DecoderAttentionRecord
from tests.support.tiny import prompt, tiny_model
from tests.support.trained import ROWS

LAYER = torch.nn.Module()


def masked_softmax(logits, weights, visible):
    """The attention map of these logits: with unit keys and values, queries are logits and the output is the map."""
    unit = torch.eye(logits.shape[-1], dtype=logits.dtype).expand_as(logits)
    return masked_attention(LAYER, logits, unit, unit, visible, weights=weights, scaling=1.0)[0].transpose(1, 2)


def by_loops(logits, weights, visible):
    """LVPruning Eq. 7 and 9, entry by entry."""
    rows, heads, size, _ = logits.shape
    result = np.zeros(logits.shape)
    for b in range(rows):
        for h in range(heads):
            for i in range(size):
                seen = [j for j in range(size) if visible[b, 0, i, j] or i == j]
                factor = {j: 1.0 if i == j else weights[b, j] for j in seen}
                most = max(logits[b, h, i, j] for j in seen if factor[j])
                shares = {j: math.exp(logits[b, h, i, j] - most) * factor[j] if factor[j] else 0.0 for j in seen}
                total = sum(shares.values()) + EPSILON
                for j in seen:
                    result[b, h, i, j] = (shares[j] + EPSILON / len(seen)) / total
    return result


def sample(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, size, generator=generator, dtype=torch.float64)
    weights[0, 2], weights[1, 3] = 0.0, 1.0
    visible = torch.ones(size, size, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[1, :, :, 0] = False  # padding
    return logits, weights, visible


def test_the_masked_softmax_is_that_of_the_paper():
    logits, weights, visible = sample()
    mine = masked_softmax(logits, weights, visible)
    np.testing.assert_allclose(mine.numpy(), by_loops(logits.numpy(), weights.numpy(), visible.numpy()), atol=1e-12)
    torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine[..., 0]))
    wrong = by_loops(logits.numpy(), weights.numpy() * 0.9, visible.numpy())
    assert np.abs(mine.numpy() - wrong).max() > 1e-3  # the comparison can fail


def test_weights_of_zero_and_one_leave_a_softmax_over_the_others():
    logits, _, visible = sample()
    weights = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 0]], dtype=torch.float64)
    seen = visible & weights.bool()[:, None, None] | torch.eye(6, dtype=torch.bool)
    expected = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(masked_softmax(logits, weights, visible), expected, atol=1e-6, rtol=0)
    logits[0, :, :, 1] += 200  # a token that is gone may have by far the largest logit
    seen_only = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(masked_softmax(logits, weights, visible), seen_only, atol=1e-6, rtol=0)


def test_gradients_are_those_of_finite_differences_also_at_zero_and_at_one():
    logits, weights, visible = sample(size=4)
    inner = weights.clamp_min(0.01)
    inputs = logits.requires_grad_(), inner.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, m: masked_softmax(a, m, visible), inputs, eps=1e-7, atol=1e-5)
    assert weights[0, 2] == 0
    weights.requires_grad_()
    masked_softmax(logits, weights, visible)[0, :, 3, 1].sum().backward()
    exact = weights.grad[0, 2].item()
    assert abs(exact) > 1e-3  # a token that is gone can learn to come back
    with torch.no_grad():
        before = masked_softmax(logits, weights, visible)[0, :, 3, 1].sum()
        weights[0, 2] += 1e-3
        after = masked_softmax(logits, weights, visible)[0, :, 3, 1].sum()
    assert (after - before).item() / 1e-3 == pytest.approx(exact, rel=0.02)


def parts(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, heads, size, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    _, weights, visible = sample(seed, size)
    return [one.requires_grad_() for one in (query, key, value, weights.clamp_min(0.01))], visible


def test_the_derivative_is_that_of_finite_differences_for_every_part():
    inputs, visible = parts()

    def attend(query, key, value, weights):
        return masked_attention(LAYER, query, key, value, visible, weights=weights, scaling=0.7)[0]

    assert torch.autograd.gradcheck(attend, inputs, eps=1e-7, atol=1e-5)


def test_dropout_leaves_the_same_entries_out_of_output_and_derivative():
    inputs, visible = parts()

    def attend(query, key, value, weights):
        torch.manual_seed(0)
        options = {"weights": weights, "scaling": 0.7, "dropout": 0.5}
        return masked_attention(LAYER, query, key, value, visible, **options)[0]

    assert torch.autograd.gradcheck(attend, inputs, eps=1e-7, atol=1e-5)
    without = masked_attention(LAYER, *inputs[:3], visible, weights=inputs[3], scaling=0.7)[0]
    assert (attend(*inputs) - without).abs().max() > 0.1


def test_no_map_is_kept_for_the_backward_pass():
    size = 64
    query = torch.randn(1, 2, size, 4, requires_grad=True)
    weights = torch.rand(1, size, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        masked_attention(LAYER, query, query, query, None, weights=weights, scaling=0.5)
    maps = [one for one in kept if one.numel() >= size * size]
    assert kept
    assert not maps


def test_half_precision_is_computed_in_float32():
    inputs, visible = parts()
    results, gradients = [], []
    for dtype in (torch.float64, torch.bfloat16):
        query, key, value, weights = (one.detach().to(dtype).requires_grad_() for one in inputs)
        output, _ = masked_attention(LAYER, query, key, value, visible, weights=weights.float(), scaling=0.7)
        assert output.dtype == dtype
        output.square().sum().backward()
        results.append(output.double())
        gradients.append(weights.grad.double())
    torch.testing.assert_close(*results, atol=0.05, rtol=0)
    torch.testing.assert_close(*gradients, atol=0.1, rtol=0.05)


class Weighing(PrunerWrapper):
    """Weighs every token alike, after the layers of another pruner."""

    weight = 1.0

    @property
    def needs(self):
        return replace(self.pruner.needs, weights=True)

    def weigh(self, step):
        return torch.full(step.sequence.columns.shape, self.weight)


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_weights_of_one_change_nothing_and_half_weights_do(decoder, attention):
    model = tiny_model(decoder, attention=attention, enabled=False)
    inputs = prompt(ROWS)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    present = inputs["attention_mask"].bool()
    stock = model(**inputs, use_cache=False).logits[present]
    model.model.applied_pruner = Weighing(FastV(4))
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[present], stock, atol=1e-5, rtol=0)
    model.model.applied_pruner.weight = 0.5
    assert (model(**inputs, use_cache=False).logits[present] - stock).abs().max() > 1e-3


@torch.no_grad()
def test_a_record_with_weights_gives_the_attention_of_the_masked_softmax():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    weights = torch.tensor([[1, 0.5, 0, 1, 1], [1, 1, 0.25, 0, 1]])
    record = DecoderAttentionRecord(0, None, None, weights)
    record.attend(query, key, key, None, None, 8**-0.5)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected = masked_softmax(logits, weights, visible).mean(1)
    torch.testing.assert_close(record.attention_map(0), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.attention_map(2), expected[:, 2:], atol=1e-5, rtol=0)
