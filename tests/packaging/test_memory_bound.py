"""A run of the tests fails where one of its processes takes more memory than the bound."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
import sys
sys.path.insert(0, {root!r})
import tests.conftest
from tests.conftest import *
tests.conftest.MOST_MEMORY = {bound}
"""


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize("bound", [2**20, 2**40], ids=["too much", "in bounds"])
def test_a_run_that_takes_too_much_memory_fails(tmp_path: Path, workers: tuple[str, ...], bound: int) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT), bound=bound))
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", *workers, "--measure", "measured.jsonl", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (1 if bound == 2**20 else 0)
    assert ("more than the 0.0 GiB that one process may take" in done.stdout) == (bound == 2**20)
    assert (tmp_path / "measured.jsonl").read_text().count("test_it.py::test_it") == 1
