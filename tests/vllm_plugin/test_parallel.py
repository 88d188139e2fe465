"""The guided stage on devices that share every layer's heads, as two processes; nothing here needs vLLM."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from modeling_ivtp.vllm_plugin.prefix_decoder import Devices
from tests.support.tiny import prompt, tiny_model
from tests.support.vllm_layers import encoder_of, items_of

ROWS = [[3, "image", 7], [2, "image", 4, "image", 3], [3, "image", 12], [5, "image"]]
SEEDS = range(4)
ROW_DIMENSIONS = 3
"""Of the rows that score tokens (B, M, 1 + k), unlike those of a layer's outputs and of its value norms."""


class Summed:
    """A sum over both processes, and how often it was asked for."""

    def __init__(self):
        self.shapes = []

    def __call__(self, tensor):
        self.shapes.append(tensor.dim())
        total = tensor.clone()
        dist.all_reduce(total)
        return total


def chosen(model, devices=None, rank=0, scored=True):
    kept, passes = [], 0
    for seed in SEEDS:
        encoder = encoder_of(model, devices, rank, scored)
        found = encoder.features_of(items_of(prompt(ROWS, seed=seed), ROWS))
        kept += [patches.tolist() for _, patches in found]
        passes += encoder.chosen
    return kept, passes


def one_of_two(rank, port, aggregation, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, summed = tiny_model(aggregation=aggregation), Summed()
    with torch.no_grad():
        together, passes = chosen(model, Devices(2, summed), rank)
        apart, _ = chosen(model, Devices(2, Summed()), rank, scored=False)
    found = {"together": together, "apart": apart, "passes": passes, "rows": summed.shapes.count(ROW_DIMENSIONS)}
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["rollout", "mean"])
def test_two_devices_choose_as_one_does(aggregation, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(one_of_two, (port, aggregation, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone, _ = chosen(tiny_model(aggregation=aggregation))
    assert first["together"] == second["together"] == alone
    # The control: each scores by its own heads.
    assert first["apart"] != alone
    # The rows of a layer are put together once.
    assert first["rows"] == first["passes"] * tiny_model().pruning_config.decoder_layers
