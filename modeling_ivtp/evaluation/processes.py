"""Processes that `accelerate launch` starts for lmms-eval: which is this one, and which device is its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


def own_device(name: str | None, state: PartialState) -> str | None:
    """Return the model's device; None spreads it over all GPUs, which several processes must not do."""
    if name is not None:
        return name
    if state.device.type == "cpu":
        return "cpu"
    return str(state.device) if state.num_processes > 1 else None


@contextmanager
def launched(device: str | None) -> Iterator[PartialState]:
    """Return a context in which launched processes know each other; one within another leaves that to the outer."""
    within = torch.distributed.is_initialized()
    state = processes(device)
    try:
        yield state
    finally:
        if torch.distributed.is_initialized() and not within:
            state.destroy_process_group()


def processes(device: str | None) -> PartialState:
    """Return this process's place among those that were launched; accelerate must know if they run on CPUs."""
    on_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    return PartialState(cpu=on_cpu)
