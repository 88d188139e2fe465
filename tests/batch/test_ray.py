"""`ivtp batch` on Ray: killed in any of its processes, it goes on and ends with every row once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.batches import answers, arguments, batch

ROOT = Path(__file__).parents[2]
SECONDS = 300
pytestmark = [pytest.mark.slow, pytest.mark.subprocess]


def started(sample, out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "modeling_ivtp.cli", *arguments(sample, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def until(process, condition):
    """Wait for something to be true of a run that goes on."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def written(out):
    return {path.name: path.read_bytes() for path in (out / "_checkpoint").glob("*[0-9].parquet")}


def below(process):
    """All processes that a run has started, by what they are called."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found[child] = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def test_killed_driver_actor_and_worker_lose_no_row_and_write_none_twice(capsys, sample, loaded, tmp_path):
    options = ["--id-column", "name", "--shard-rows", 2, "--batch-size", 1, "--memory", "1GB", "--max-new-tokens", 24]
    expected = batch(capsys, sample, tmp_path / "here", *options)
    out, more = tmp_path / "out", [*options, "--threads", 1, "--no-progress"]
    driver = started(sample, out, *more)
    until(driver, lambda: written(out))
    family = below(driver)
    assert any("MapWorker" in name for name in family.values())
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    # Nobody stopped Ray: all that could still answer or write ends by itself.
    psutil.wait_procs([process for process, name in family.items() if "Agent" not in name], timeout=60)
    first = written(out)
    assert 0 < len(first) < 20

    again = started(sample, out, *more)
    until(again, lambda: len(written(out)) > len(first))
    for kind in ("MapWorker", "Write"):
        for process, name in below(again).items():
            if f"ray::{kind}" in name:
                process.kill()
    family |= below(again)
    output, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, output
    assert output.splitlines()[-1] == f"done: 40 rows, 0 of them errors, in {out}"
    assert answers(out) == expected
    # What was written before is what it was.
    assert first.items() <= written(out).items()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_terminated_run_says_how_it_goes_on(sample, loaded, tmp_path):
    run = started(sample, tmp_path / "out", "--shard-rows", 2, "--batch-size", 1, "--memory", "1GB", "--threads", 1)
    until(run, lambda: written(tmp_path / "out"))
    family = below(run)
    run.terminate()
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 130
    assert output.splitlines()[-1] == "ivtp: stopped; the same command goes on from here"
    _, alive = psutil.wait_procs([process for process, name in family.items() if "Agent" not in name], timeout=60)
    assert not alive


def test_a_run_that_is_terminated_while_ray_starts_leaves_nothing(sample, loaded, tmp_path):
    run = started(sample, tmp_path / "out", "--threads", 1)
    folder = Path(until(run, lambda: re.search(r"/\S*/ivtp-ray-[^/\s]+", " ".join(below(run).values())))[0])
    family = below(run)
    run.terminate()
    output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 130, output
    assert output.splitlines()[-1] == "ivtp: stopped; the same command goes on from here"
    assert not folder.exists()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
