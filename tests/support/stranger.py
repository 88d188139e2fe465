"""A fresh, offline process in which this package cannot be imported, however it is installed."""

import os
import subprocess
import sys
from pathlib import Path

from modeling_ivtp.publish.fresh_check import HIDE


def run(script: str, *arguments: object, home: Path) -> str:
    """Run a script as a stranger would, with caches below `home`; returns what it printed."""
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E", "-c", HIDE + script, *map(str, arguments)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
