"""Ray: one that runs on this machine for as long as the command, or a cluster by its address."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from .budget import Need
from .options import Options

# Ray and vLLM read them when they are imported, here and in Ray's processes on this machine. Both send no reports. Ray
# leaves the GPUs visible to tasks that ask for none, and does not put the work behind all else on the machine, as it
# does by default.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import ray

_STORE_BYTES = 100 * 2**20
"""Memory for what tasks hand to each other: numbers of rows and their answers, a few kilobytes."""
_SECONDS = 5.0


@dataclass(frozen=True)
class Machines:
    """The processors to compute with.

    Attributes
    ----------
    nodes : int
    cpus : int
        Threads of the smallest node; of this machine as many as PyTorch takes, which OMP_NUM_THREADS may have set.
    gpus : int
        Of all nodes.
    """

    nodes: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Actors:
    """The processes that answer, and what each takes.

    Attributes
    ----------
    count : int
    threads : int
    gpus : float
        0: it computes on the CPU, or on the one device that the person named.
    """

    count: int
    threads: int
    gpus: float


@dataclass(frozen=True)
class Place:
    """The place where a run's rows are answered.

    Attributes
    ----------
    actors : Actors
    device : str or None
        As in `load_model`.
    memory : int
        Bytes of a batch.
    """

    actors: Actors
    device: str | None
    memory: int

    @property
    def device_type(self) -> str:
        """The kind of device that computes, such as "cuda"."""
        if self.device is None:
            return "cuda" if self.actors.gpus else "mps"
        return torch.device(self.device).type


@contextmanager
def connected(options: Options, need: Need, memory: int | None) -> Iterator[Place]:
    """Connect to a cluster, or start Ray on this machine and stop it in the end. A Ray that runs already is kept.

    Parameters
    ----------
    options : Options
    need : Need
    memory : int or None
        Bytes of a batch, if they are decided.

    Raises
    ------
    ValueError
        If the cluster cannot be reached, it has too few GPUs, or memory cannot hold the model and a row.
    """
    if options.address is None and not ray.is_initialized():
        machines = Machines(1, torch.get_num_threads(), torch.cuda.device_count())
        actors = share(options, machines)
        # What does not fit into main memory is refused at once; of GPUs an actor knows.
        place = None if actors.gpus else _place(options, need, memory, actors, machines)
        with _local(actors.count * actors.threads):
            yield place or _place(options, need, memory, actors, machines)
        return
    with nullcontext() if ray.is_initialized() else _joined(str(options.address)):
        machines = _machines()
        yield _place(options, need, memory, share(options, machines), machines)


def check_address(address: str) -> None:
    """Refuse an address at which nobody answers, without waiting as long for it as Ray does.

    Raises
    ------
    ValueError
        If the address is none, or nobody listens there.
    """
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "://" in address:
        raise ValueError(f"address={address!r}; allowed: auto or HOST:PORT, on a machine of the cluster")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(_unreachable(address, error)) from error


def share(options: Options, machines: Machines) -> Actors:
    """Share machines among actors: one for each GPU; without GPUs one on each node, with all threads.

    Raises
    ------
    ValueError
        If there are fewer GPUs than actors.
    """
    gpus = 0 if options.device is not None and options.device != "cuda" else machines.gpus
    if options.device == "cuda" and not gpus:
        raise ValueError("device='cuda'; there is no GPU")
    if gpus:
        count = options.actors or gpus
        if count > gpus:
            raise ValueError(
                f"actors={count}; allowed: up to {gpus}, one for each GPU, or any number with device='cpu'"
            )
        # A model that is too large for one GPU is spread over those of its actor.
        return Actors(count, options.threads or 1, min(gpus // count, max(1, gpus // machines.nodes)))
    count = options.actors or machines.nodes
    on_node = -(-count // machines.nodes)
    return Actors(count, options.threads or max(1, machines.cpus // on_node), 0)


def _place(options: Options, need: Need, memory: int | None, actors: Actors, machines: Machines) -> Place:
    if actors.gpus:
        device = "cuda" if actors.gpus == 1 else None
        return Place(actors, device, _asked(need, memory, device, 1, actors.gpus))
    device = options.device or (None if torch.backends.mps.is_available() else "cpu")
    if options.address is None:
        return Place(actors, device, need.batch(memory, device, actors.count))
    return Place(actors, device, _asked(need, memory, device, -(-actors.count // machines.nodes), 0))


def _asked(need: Need, memory: int | None, device: str | None, on_node: int, gpus: float) -> int:
    """Return the bytes of a batch, as a process finds them that is placed as an actor will be."""
    batch = ray.remote(num_cpus=0, num_gpus=gpus)(Need.batch)
    try:
        return int(ray.get(batch.remote(need, memory, device, on_node)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@contextmanager
def _local(cpus: int) -> Iterator[None]:
    """Run Ray on this machine: no dashboard, no reports, nothing on the console, nothing left behind."""
    # Ray puts sockets there, whose paths must be short.
    folder = tempfile.mkdtemp(prefix="ivtp-ray-", dir="/tmp" if os.name == "posix" else None)
    try:
        with _terminated_like_ctrl_c(), _native_log(Path(folder) / "driver.log"):
            try:
                _start(cpus, folder)
                with _terminated_like_ctrl_c():  # again: `ray.init` sets a handler of its own
                    yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(cpus: int, folder: str) -> None:
    try:
        ray.init(
            "local",
            num_cpus=cpus,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
    except SystemExit as error:  # Ray's own handler of SIGTERM raises it while Ray starts
        raise KeyboardInterrupt from error


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM stop the run as Ctrl-C does; with the handler that `ray.init` sets, the process aborts silently."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _native_log(file: Path) -> Iterator[None]:
    """Send to a file what Ray's C++ writes to standard error; Python's own goes where it went.

    It calls an error that actors which may be restarted have arguments, as all of Ray Data's have.
    """
    before, stream = os.dup(2), sys.stderr
    own = None
    if stream is not None and _descriptor(stream) == 2:
        own = sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    try:
        with open(file, "ab") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        if own is not None:
            sys.stderr = stream
            own.close()


def _descriptor(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Belong to a cluster for a while."""
    with _native_log(Path(os.devnull)):
        try:
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, TimeoutError) as error:
                raise ValueError(_unreachable(address, error)) from error
            with _terminated_like_ctrl_c():
                yield
        finally:
            ray.shutdown()


def _unreachable(address: str, error: Exception) -> str:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"no Ray cluster can be reached at {address} ({why}); `ray start --head` starts one, and where that has made a "
        "token, set RAY_AUTH_MODE=token"
    )


def _machines() -> Machines:
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(found["CPU"]) for found in resources if found.get("CPU", 0) >= 1]
    return Machines(max(1, len(cpus)), min(cpus, default=1), int(sum(found.get("GPU", 0) for found in resources)))
