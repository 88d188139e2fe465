"""Tables for pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table with the first column aligned to the left and the others to the right."""
    ruled = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in ruled) + "\n"
