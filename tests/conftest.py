"""What every test runs under: one thread, a reason for skipping, and a bound on memory."""

import ctypes
import gc
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

GIB = 2**30
MOST_MEMORY = int(float(os.environ.get("IVTP_TEST_GIB", "3.5")) * GIB)
"""Peak resident memory that one process of a run may have, or a process that it starts; two run side by side."""
MUCH_LEFT = 16 * 2**20
"""Resident bytes that one test may leave behind before memory is given back."""
_PEAKS = pytest.StashKey[list[int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--measure",
        metavar="FILE",
        type=Path,
        help="append a JSON line for each test: CPU seconds with child processes, seconds, and resident bytes after it",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[_PEAKS] = []
    for name in _marks_of_transformers():
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(_Workers(config), "memory of workers")


def _marks_of_transformers() -> set[str]:
    """Find the marks that transformers' tests use, for a run with a checkout of them (test_transformers_suite.py)."""
    checkout = os.environ.get("TRANSFORMERS_CHECKOUT")
    if checkout is None:
        return set()
    from transformers import testing_utils

    files = [testing_utils.__file__, *Path(checkout, "tests").glob("*.py")]
    return {name for file in files for name in re.findall(r"\bmark\.([a-z_]\w*)", Path(file).read_text())}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    """Return freed memory to the system after a test that left much behind, which cycles or glibc hold."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    if process.memory_info().rss - before < MUCH_LEFT:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note what a test took, module fixtures that it is the first or last to need included."""
    file = item.config.getoption("--measure")
    if file is None:
        return (yield)
    cpu, seconds = _cpu_seconds(), time.perf_counter()
    result = yield
    line = {
        "test": item.nodeid,
        "cpu": round(_cpu_seconds() - cpu, 2),
        "seconds": round(time.perf_counter() - seconds, 2),
        "resident": psutil.Process().memory_info().rss,
        "peak": peak_memory(),
    }
    with open(file, "a") as lines:
        lines.write(json.dumps(line) + "\n")
    return result


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory() -> int:
    """Peak resident bytes of this process, or of the largest that it started and waited for."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * (1 if sys.platform == "darwin" else 1024)


class _Workers:
    """Collects the peaks of pytest-xdist's workers in the process that started them."""

    def __init__(self, config: pytest.Config) -> None:
        self.peaks = config.stash[_PEAKS]

    def pytest_testnodedown(self, node: Any) -> None:
        self.peaks.append(getattr(node, "workeroutput", {}).get("peak_memory", 0))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of which a process took too much memory."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["peak_memory"] = peak_memory()
        return
    if not config.stash[_PEAKS]:
        config.stash[_PEAKS].append(peak_memory())
    if exitstatus == pytest.ExitCode.OK and max(config.stash[_PEAKS]) > MOST_MEMORY:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    peaks = config.stash[_PEAKS]
    told = ", ".join(f"{peak / GIB:.1f}" for peak in peaks)
    too_much = bool(peaks) and max(peaks) > MOST_MEMORY
    verdict = f"; more than the {MOST_MEMORY / GIB:.1f} GiB that one process may take" if too_much else ""
    terminalreporter.write_line(f"peak memory of processes: {told} GiB{verdict}", red=too_much)
