"""The kernel without a GPU: run by Triton's interpreter, and compiled for GPUs of several generations."""

import pytest
import torch

from modeling_ivtp.model import attention_maps, fused_attention
from modeling_ivtp.model.attention_maps import attend_with_map, weighted_attention
from tests.support.interpreter import check_interpreted

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

SHAPES = [
    (2, 4, 4, 77, 77, 64),
    (1, 4, 2, 130, 65, 32),
    (2, 2, 2, 64, 64, 8),
    (1, 2, 1, 30, 100, 80),
    (1, 1, 1, 1, 1, 16),
]
INTERPRETED = """
import numpy as np, torch
from modeling_ivtp.model.fused_attention import fused_weighted_attention
from tests.model.test_fused_attention import SHAPES, averaged_map
for dtype in (torch.float32, torch.float16):
    for seed, (batch, heads, kv_heads, queries, keys, width) in enumerate(SHAPES):
        draws = torch.Generator().manual_seed(seed)
        # As views of what projections put out: the strides of heads and tokens are exchanged.
        query = torch.randn(batch, queries, heads, width, generator=draws).transpose(1, 2).to(dtype)
        key = torch.randn(batch, keys, kv_heads, width, generator=draws).transpose(1, 2).to(dtype)
        weights = torch.rand(batch, queries, generator=draws)
        expected = np.einsum("bq,bqk->bk", weights.numpy(), averaged_map(query, key, width**-0.5))
        found = fused_weighted_attention(weights, query, key, width**-0.5)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
        # The control: another scale is another map.
        other = fused_weighted_attention(weights, query, key, 2 * width**-0.5)
        assert keys == 1 or np.abs(other.numpy() - expected).max() > 1e-3
print("agreed")
"""


def averaged_map(query, key, scale):
    """Eq. 2 in NumPy, in float64: (B, Q, K)."""
    query, key = query.double().numpy(), key.double().numpy()
    heads, kv_heads = query.shape[1], key.shape[1]
    total = 0
    for head in range(heads):
        logits = query[:, head] @ key[:, head // (heads // kv_heads)].transpose(0, 2, 1) * scale
        exponents = torch.exp(torch.from_numpy(logits - logits.max(-1, keepdims=True))).numpy()
        total = total + exponents / exponents.sum(-1, keepdims=True)
    return total / heads


@pytest.mark.slow
def test_interpreted_it_is_weights_times_the_averaged_map():
    check_interpreted(INTERPRETED)


@pytest.mark.parametrize("scale", ["fp32", "fp64"], ids=["called", "compiled caller"])
@pytest.mark.parametrize("numbers", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("generation", [75, 80, 90])
def test_it_compiles(generation, numbers, scale):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if generation == 75 and numbers == "bf16":
        pytest.skip("GPUs of that generation have no bfloat16")
    sizes = ["queries", "keys", "heads", "repeats", "width"]
    strides = ["query_batch", "query_head", "query_step", "key_batch", "key_head", "key_step"]
    tensors = {"query": f"*{numbers}", "key": f"*{numbers}", "totals": "*fp32"}
    for kernel, more in (
        (fused_attention._row_totals, {}),
        (fused_attention._column_sums, {"weights": "*fp32", "sums": "*fp32"}),
    ):
        signature = tensors | more | dict.fromkeys(sizes, "i32") | {"scale": scale} | dict.fromkeys(strides, "i32")
        constants = {"TILE": 64, "WIDTH": 64}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        assert triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm["ptx"]


def test_a_cpu_is_not_served():
    query = torch.randn(1, 2, 8, 16)
    assert not fused_attention.is_served(query, query)


def test_where_it_fails_pytorch_takes_over(monkeypatch, caplog):
    """Without a C compiler Triton can be imported and cannot run."""

    def failing(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(fused_attention, "fused_weighted_attention", failing)
    assert not fused_attention._compiles(torch.device("cpu"), torch.float16, 64)
    assert "Scoring falls back to PyTorch on cpu" in caplog.text


@pytest.mark.parametrize("limit", [1, 2**20])
def test_one_map_serves_output_and_scores(monkeypatch, limit):
    monkeypatch.setattr(attention_maps, "MAP_VALUES_CPU", limit)
    query, key, value = (torch.randn(3, 4, 20, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    output, averaged = attend_with_map(query, key, value, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(averaged.double().numpy(), averaged_map(query, key, 0.3), atol=1e-6, rtol=0)
    weights = torch.rand(3, 1, 20)
    torch.testing.assert_close(
        weights @ averaged, weighted_attention(weights, query[:, :, None], key, 0.3), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("limit", [1, 500, 1500, 2**20])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_maps_come_in_the_order_of_heads_whatever_fits(monkeypatch, limit, kv_heads):
    monkeypatch.setattr(attention_maps, "MAP_VALUES_CPU", limit)
    query, key = torch.randn(2, 8, 10, 4), torch.randn(2, kv_heads, 12, 4)
    found = torch.cat(list(attention_maps.map_heads(query, key, 0.5)), 1)
    torch.testing.assert_close(found, query * 0.5 @ key.repeat_interleave(8 // kv_heads, 1).transpose(2, 3))
    assert limit > 500 or max(part.shape[1] for part in attention_maps.map_heads(query, key, 0.5)) <= 2
