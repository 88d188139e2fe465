"""vLLM's HTTP server as a process of its own, and what it costs."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 900
"""Seconds that a server may take to answer; on two busy cores most of it is spent on imports and compilation."""


@dataclass(frozen=True)
class HttpServer:
    """A server that answers.

    Attributes
    ----------
    url : str
        Its address, without a path.
    model : str
        The model's name there.
    process : psutil.Process
        The process that was started; vLLM starts more below it.
    log : Path
        Everything it printed.
    """

    url: str
    model: str
    process: psutil.Process
    log: Path

    def family(self) -> list[psutil.Process]:
        """Return the server's processes."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family())

    def resident_bytes(self) -> int:
        """Return the memory that its processes hold, shared pages counted once."""
        return sum(process.memory_full_info().pss for process in self.family())

    def metrics(self) -> dict[str, float]:
        """Return the samples of `/metrics`, summed over labels."""
        samples: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, value = line.rsplit(" ", 1)
                    name = name.partition("{")[0]
                    samples[name] = samples.get(name, 0.0) + float(value)
        return samples


@contextmanager
def http_server(
    model: Path, *flags: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[HttpServer]:
    """Start vLLM's server on a free port of loopback, wait until it answers, and end it afterwards.

    Parameters
    ----------
    model : Path
    *flags : str
        After `--model`, `--host` and `--port`.
    log : Path
        Where it prints.
    environment : mapping, optional
        Beside this process's.

    Raises
    ------
    RuntimeError
        If it ends before it answers; the message holds the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    # The engine in a process of its own, as users run it, whatever the tests of the engine set.
    variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | dict(environment or {})
    with open(log, "wb") as output:
        started = subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, started, log)
        yield HttpServer(url, str(model), psutil.Process(started.pid), log)
    finally:
        _end(started)


def _wait(url: str, started: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if started.poll() is not None:
            raise RuntimeError(f"the server ended with status {started.returncode}:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} seconds:\n{log.read_text()[-4000:]}")


def _end(started: subprocess.Popen[bytes]) -> None:
    """End a server and every process below it."""
    try:
        family = psutil.Process(started.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if started.poll() is None:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=10)
    started.wait()
