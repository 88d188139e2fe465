"""`ivtp quality`: what pruning costs in accuracy."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import typer


def quality(context: typer.Context) -> None:
    """Measure what pruning costs in accuracy, on the drawn world of the quality benchmark (from a clone)."""
    _benchmark("quality.evaluate_quality").run(context.args, "ivtp quality")


def _benchmark(name: str) -> Any:
    """A module of `benchmarks/`, which belongs to the repository and not to the installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir():
        raise ImportError(
            "the benchmarks are not part of the installed package: clone the repository, and there run "
            "pip install --editable '.[dev]'"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(f"benchmarks.{name}")
