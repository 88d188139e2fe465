"""Everything about speed that needs a GPU, in one run that needs nothing but the repository.

python -m benchmarks.on_gpu --out FOLDER

Runs the GPU tests, then `ivtp bench` on LLaVA-1.5-7B's shape with random weights: prefills over batches and prompt
lengths, whole answers, and small batches as CUDA graphs. What is finished is written at once: a run may be cut short.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

_SHAPE = ("--shape", "llava-1.5-7b", "--dtype", "bfloat16")
_BUDGETS = ("--arm", "ivtp@64", "--arm", "ivtp@128", "--arm", "ivtp@256")
_REPLAYED = ("--arm", "stock+graphs", "--arm", "ivtp@64+graphs")


def _repeated(option: str, *values: int) -> list[str]:
    return [word for value in values for word in (option, str(value))]


def _bench(*options: str) -> list[str]:
    return ["modeling_ivtp.cli", "bench", *_SHAPE, *options]


STEPS: dict[str, list[str]] = {
    "tests": ["pytest", "-m", "gpu", "-q", "tests/test_gpu.py"],
    "prefill": _bench(
        *_BUDGETS, "--arm", "ivtp@448", *_REPLAYED, "--new-tokens", "2", "--repeats", "6",
        *_repeated("--batch", 1, 2, 4, 8, 16, 32),
    ),
    "growth": _bench(
        "--label", "growth", "--arm", "ivtp@64", "--new-tokens", "2", "--repeats", "3",
        *_repeated("--batch", 1, 8, 32), *_repeated("--text-tokens", 64, 512, 2048),
    ),
    "answers": _bench("--label", "answers", *_REPLAYED, "--repeats", "6", *_repeated("--batch", 1, 32)),
    "off": _bench(
        "--label", "off", "--arm", "off", "--new-tokens", "2", "--repeats", "30", *_repeated("--batch", 1, 8),
    ),
    "graphs": _bench(
        "--label", "graphs", "--arm", "ivtp@64", *_REPLAYED, "--new-tokens", "2", *_repeated("--batch", 1, 2, 4, 8),
    ),
    "compiled": _bench("--arm", "ivtp@64", "--compile", "--new-tokens", "64", "--repeats", "6"),
}  # fmt: skip


def main() -> int:
    """Run the steps; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    asked = parser.parse_args()
    failed = 0
    for step in asked.steps:
        out = ["--out", str(asked.out / step)] if "bench" in STEPS[step] else []
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", *STEPS[step], *out]).returncode
        failed += status != 0
        print(f"{step}: {'failed' if status else 'done'} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
