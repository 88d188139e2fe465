"""All speed measurements that need a GPU, in one run that needs only the repository.

python -m benchmarks.on_gpu --out FOLDER

Runs the GPU tests, then `ivtp bench` on LLaVA-1.5-7B's shape with random weights: prefills over batches, with and
without CUDA graphs; whole answers; pruning off; growth over prompt lengths; everything compiled. The results of each
step are written at once, so the run may be interrupted.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

_SHAPE = ("--shape", "llava-1.5-7b", "--dtype", "bfloat16")
_COMPILED_TEST = "cuda_graphs_of"
"""The test that compiles prompts and decoding steps, which takes longer than all others."""


def _repeated(option: str, *values: int | str) -> list[str]:
    return [str(word) for value in values for word in (option, value)]


def _bench(*options: str) -> list[str]:
    return ["modeling_ivtp.cli", "bench", *_SHAPE, *options]


_GPU_TESTS = "tests/model/test_gpu.py"
STEPS: dict[str, list[str]] = {
    "tests": ["pytest", "-m", "gpu", "-q", _GPU_TESTS, "-k", f"not {_COMPILED_TEST}", "--durations", "5"],
    "prefill": _bench(
        *_repeated("--arm", "ivtp@64", "ivtp@256", "ivtp@448"), *_repeated("--batch", 1, 2, 4, 8, 16, 32),
        "--new-tokens", "2",
    ),
    "answers": _bench("--label", "answers", "--arm", "ivtp@64", "--repeats", "3", *_repeated("--batch", 1, 32)),
    "graphs": _bench(
        "--label", "graphs", *_repeated("--arm", "ivtp@64-graphs", "stock+graphs", "ivtp@64+graphs"),
        *_repeated("--batch", 1, 2, 4, 8), "--new-tokens", "2",
    ),
    "off": _bench(
        "--label", "off", "--arm", "off", "--new-tokens", "2", "--repeats", "30", *_repeated("--batch", 1, 8),
    ),
    "growth": _bench(
        "--label", "growth", "--arm", "ivtp@64", "--new-tokens", "2", "--repeats", "3",
        *_repeated("--batch", 1, 32), *_repeated("--text-tokens", 64, 512, 2048),
    ),
    "compiled-test": ["pytest", "-m", "gpu", "-q", _GPU_TESTS, "-k", _COMPILED_TEST],
    "compiled": _bench("--arm", "ivtp@64", "--compile", "--new-tokens", "64", "--repeats", "6"),
}  # fmt: skip


def main() -> int:
    """Run the steps, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    arguments = parser.parse_args()
    failed = 0
    for step in arguments.steps:
        out = ["--out", str(arguments.out / step)] if "bench" in STEPS[step] else []
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", *STEPS[step], *out]).returncode
        failed += status != 0
        print(f"{step}: {'failed' if status else 'done'} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
