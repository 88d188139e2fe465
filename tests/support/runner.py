"""Runs what pages tell people to run, page after page in one process; see tests/docs/test_pages.py.

    python runner.py steps.json outcomes.json

`steps.json` is a list of [page, kind, block]. A page whose block fails is left at that block, and the next page runs.
"""

import contextlib
import io
import json
import shlex
import sys
import time
import traceback
from pathlib import Path


def run_bash(block: str) -> None:
    """Run the `ivtp` commands of a block."""
    from modeling_ivtp import cli

    for line in block.splitlines():
        command = shlex.split(line, comments=True)
        if not command:
            continue
        assert command[0] == "ivtp", f"no test runs {line!r}"
        print("+", line, flush=True)
        status = cli.main(command[1:])
        assert status == 0, f"{line!r} ended with {status}"


def prepare() -> None:
    """Replace the published shape by that of the model on the local Hub, and a server by a line that says so."""
    import uvicorn

    from modeling_ivtp import IVTPLlavaConfig
    from modeling_ivtp.checkpoints import recipes

    small = IVTPLlavaConfig.from_pretrained("OWNER/ivtp-llava-1.5-7b")
    original = recipes.load_shape
    recipes.load_shape = lambda name: small if name == "llava-1.5-7b" else original(name)
    uvicorn.run = lambda app, **options: print("would serve at", options["port"])


def main(steps: Path, outcomes: Path) -> None:
    """Run all blocks and write, for each page, what it printed, its time, and the error that ended it, if any."""
    names: dict = {}
    blocks = json.loads(steps.read_text())
    if any(kind == "bash" for _, kind, _ in blocks):
        prepare()
    results: dict = {}
    for page, kind, block in blocks:
        result = results.setdefault(page, {"output": "", "error": None, "cpu_seconds": 0.0})
        if result["error"] is not None:
            continue
        output, started = io.StringIO(), time.process_time()
        try:
            with contextlib.redirect_stdout(output):
                if kind == "bash":
                    run_bash(block)
                else:
                    exec(compile(block, page, "exec"), names)
        except BaseException:
            result["error"] = f"{block}\n{traceback.format_exc()}"
        result["output"] += output.getvalue()
        result["cpu_seconds"] += time.process_time() - started
    outcomes.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
