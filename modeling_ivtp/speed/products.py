"""What the matrix products of a prefill take alone: how much of what FLOPs imply this machine can give at all.

Fewer tokens make smaller products, and small ones run at a lower rate: with few rows a GPU reads weights for longer
than it multiplies. What pruning reaches lies about there, whatever its scoring and launching cost; it can lie above,
where what is not a product, attention and norms, shrinks by more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.schedule import PruningPlan

Work = Sequence[tuple[nn.Linear, int]]
"""Linear layers in the order in which they run, and how many rows each gets."""


def products(model: Any, plan: PruningPlan | None, *, batch: int, text_tokens: int, words: int) -> Work:
    """The linear layers of a prefill of one image a row.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    plan : PruningPlan or None
        Of IVTP's. None: stock LLaVA's prefill.
    batch, text_tokens : int
    words : int
        CLIP tokens of a row's instruction; read only with a plan.
    """
    inner = model.model
    tower, decoder = inner.vision_tower.encoder.layers, inner.language_model.layers
    pruned, plan = plan is not None, plan or PruningPlan(inner.config.num_patches)
    # The pseudo CLS goes through the decoder's groups, CLS through the tower and, for want of words, the projector.
    observed = plan.decoder[-1].last + 1 if plan.decoder else 0
    work: list[tuple[nn.Linear, int]] = []
    for layer, tokens in zip(tower, plan.tower_layer_tokens(len(tower)), strict=True):
        work += _linears(layer, batch * (tokens + 1))
    work += _linears(inner.multi_modal_projector, batch * (plan.tower_tokens + pruned))
    if pruned and inner.has_text_tower:
        work += _linears(inner.clip_text_model, batch * words)
    for index, (layer, tokens) in enumerate(zip(decoder, plan.decoder_layer_tokens(len(decoder)), strict=True)):
        work += _linears(layer, batch * (tokens + text_tokens + (index < observed)))
    return [*work, (model.lm_head, batch)]


def _linears(module: nn.Module, rows: int) -> Iterator[tuple[nn.Linear, int]]:
    return ((part, rows) for part in module.modules() if isinstance(part, nn.Linear))


@torch.inference_mode()
def seconds(works: Mapping[str, Work], repeats: int = 5) -> dict[str, list[float]]:
    """Run the products of several arms by turns, on a GPU as CUDA graphs: seconds by arm, paired by place."""
    run = {arm: _runner(work) for arm, work in works.items()}
    told: dict[str, list[float]] = {arm: [] for arm in works}
    for turn in range(repeats + 1):
        for arm, timed in run.items():
            taken = timed()
            if turn:  # the first one warms up
                told[arm].append(taken)
    return told


def _runner(work: Work) -> Callable[[], float]:
    weight = work[0][0].weight
    most: dict[int, int] = {}
    for linear, rows in work:
        most[linear.in_features] = max(rows, most.get(linear.in_features, 0))
    inputs = {width: torch.randn(rows, width, dtype=weight.dtype, device=weight.device) for width, rows in most.items()}

    def multiply() -> None:
        for linear, rows in work:
            linear(inputs[linear.in_features][:rows])

    if weight.device.type != "cuda":

        def on_host() -> float:
            start = time.perf_counter()
            multiply()
            return time.perf_counter() - start

        return on_host
    multiply()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply()

    def on_gpu(held: Mapping[int, torch.Tensor] = inputs) -> float:
        """Holds what the graph reads."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return on_gpu
