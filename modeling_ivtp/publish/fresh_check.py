"""A check that a repository is complete: a fresh, offline process without this package answers from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_ivtp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
"""Python that keeps this package from being imported, however it is installed."""

_SCRIPT = """
import json
folder, mode, image, question = sys.argv[1:]
sys.path.insert(0, folder)
if mode == "whole":
    import base64
    from handler import EndpointHandler

    encoded = base64.b64encode(open(image, "rb").read()).decode()
    request = {"inputs": {"image": encoded, "text": question}, "parameters": {"max_new_tokens": 4}}
    answer = EndpointHandler(folder)(request)
else:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    import handler

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, device_map="meta", output_loading_info=True
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info.get(kind)}
    if wrong:
        raise SystemExit(f"weights and code do not fit: {wrong}")
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answer = {}
print("answer:" + json.dumps(answer))
"""
# Memory of the process in weights: loading takes some beside them.
_ROOM = 1.3


def check_fresh(
    folder: Path, weight_bytes: int, image: Path, question: str, *, timeout: float = 1800
) -> dict[str, Any]:
    """Load a repository in a fresh process, and ask it a question if its weights fit into the free memory.

    Parameters
    ----------
    folder : Path
        The repository.
    weight_bytes : int
        Of all weights.
    image : Path
        Sample image.
    question : str
    timeout : float
        Seconds.

    Returns
    -------
    dict
        The endpoint handler's answer; empty if the free memory does not hold the weights, so that only the fit of
        weights and code was checked.

    Raises
    ------
    ValueError
        If it cannot be loaded or does not answer.
    """
    whole = weight_bytes * _ROOM < psutil.virtual_memory().available
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        arguments = [str(folder), "whole" if whole else "meta", str(image), question]
        try:
            done = subprocess.run(
                [sys.executable, "-c", HIDE + _SCRIPT, *arguments],
                cwd=home,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"a fresh process did not answer from {folder} within {timeout:g} seconds") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(f"a fresh process cannot answer from the repository: {last}")
    return dict(json.loads(lines[0].removeprefix("answer:")))
