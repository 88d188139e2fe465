"""Two processes that train as one does on the joint batch."""

import os
import socket
from contextlib import contextmanager

import torch
import torch.distributed as dist


def free_port():
    """Find a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def one_of_two(rank, port):
    """Join the other process, and leave it in the end."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    yield
    dist.destroy_process_group()


def row(inputs, rank):
    """Take a process's row of a batch."""
    return {name: value[rank : rank + 1] for name, value in inputs.items()}
