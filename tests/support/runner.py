"""Runs what a page tells people to run, block after block in one process; see test_pages.py."""

import json
import shlex
import sys
from pathlib import Path


def run_bash(block: str) -> None:
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
    """The published shape becomes the one of what lies on the Hub here, and a server only says that it would serve."""
    import uvicorn

    from modeling_ivtp import IVTPLlavaConfig
    from modeling_ivtp.checkpoints import recipes

    small = IVTPLlavaConfig.from_pretrained("OWNER/ivtp-llava-1.5-7b")
    original = recipes.load_shape
    recipes.load_shape = lambda name: small if name == "llava-1.5-7b" else original(name)
    uvicorn.run = lambda app, **options: print("would serve at", options["port"])


def main(steps: Path) -> None:
    there: dict = {}
    blocks = json.loads(steps.read_text())
    if any(kind == "bash" for kind, _ in blocks):
        prepare()
    for kind, block in blocks:
        if kind == "bash":
            run_bash(block)
        else:
            print(">>>", block.splitlines()[0], flush=True)
            exec(compile(block, "page", "exec"), there)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
