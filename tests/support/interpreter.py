"""Code run in a process of its own with Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check_interpreted(code):
    """Run code that prints "agreed" if the kernels compute what they should."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("this version of Triton's interpreter does not work with this version of NumPy")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "agreed" in run.stdout
