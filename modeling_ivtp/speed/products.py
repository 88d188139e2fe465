"""Time of a prefill's matrix products alone: how much of the speed-up that FLOPs imply a machine can give at all.

Fewer tokens make smaller products, and small products run at a lower rate: with few rows a GPU reads weights for longer
than it multiplies. The speed-up of a whole prefill lies near that of its products, less the cost of scoring and
launching. It can be higher, because attention and norms shrink by more than products do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.schedule import PruningPlan

Work = Sequence[tuple[nn.Linear, int]]
"""Linear layers in the order in which they run, each with its number of rows."""


def products(model: Any, plan: PruningPlan | None, *, batch: int, text_tokens: int, words: int) -> Work:
    """List the linear layers of a prefill with one image a row.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    plan : PruningPlan or None
        A plan of IVTP's. None: stock LLaVA's prefill.
    batch, text_tokens : int
    words : int
        CLIP tokens of a row's instruction; used only with a plan.
    """
    inner = model.model
    tower, decoder = inner.vision_tower.encoder.layers, inner.language_model.layers
    pruned, plan = plan is not None, plan or PruningPlan(inner.config.num_patches)
    # The pseudo CLS runs through the decoder's groups, CLS through the tower and, for Eq. 8's fallback, the projector.
    with_pseudo_cls = plan.decoder[-1].last + 1 if plan.decoder else 0
    work: list[tuple[nn.Linear, int]] = []
    for layer, tokens in zip(tower, plan.tower_layer_tokens(len(tower)), strict=True):
        work += _linears(layer, batch * (tokens + 1))
    work += _linears(inner.multi_modal_projector, batch * (plan.tower_tokens + pruned))
    if pruned and inner.has_text_tower:
        work += _linears(inner.clip_text_model, batch * words)
    for index, (layer, tokens) in enumerate(zip(decoder, plan.decoder_layer_tokens(len(decoder)), strict=True)):
        work += _linears(layer, batch * (tokens + text_tokens + (index < with_pseudo_cls)))
    return [*work, (model.lm_head, batch)]


def _linears(module: nn.Module, rows: int) -> Iterator[tuple[nn.Linear, int]]:
    return ((part, rows) for part in module.modules() if isinstance(part, nn.Linear))


@torch.inference_mode()
def seconds(works: Mapping[str, Work], repeats: int = 5) -> dict[str, list[float]]:
    """Time the products of several arms by turns, on a GPU as CUDA graphs: seconds by arm, paired by repeat."""
    run = {arm: _runner(work) for arm, work in works.items()}
    times: dict[str, list[float]] = {arm: [] for arm in works}
    for turn in range(repeats + 1):
        for arm, timed in run.items():
            taken = timed()
            if turn:  # the first one warms up
                times[arm].append(taken)
    return times


def _runner(work: Work) -> Callable[[], float]:
    weight = work[0][0].weight
    sizes: dict[int, int] = {}
    for linear, rows in work:
        sizes[linear.in_features] = max(rows, sizes.get(linear.in_features, 0))
    inputs = {
        width: torch.randn(rows, width, dtype=weight.dtype, device=weight.device) for width, rows in sizes.items()
    }

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
        """Time one replay; the default keeps the tensors alive that the graph reads."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return on_gpu
