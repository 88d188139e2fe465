"""Tables in which commands show their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def new_table(*columns: str, title: str | None = None) -> Any:
    """Return an empty table of text, whose cells fold where the terminal is narrow."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def file_table(files: Mapping[str, int]) -> Any:
    """Return a table of files and their bytes, to which more rows can be added."""
    from modeling_ivtp.files.sizes import human_bytes

    table = new_table("file", "bytes")
    for name, size in files.items():
        table.add_row(name, human_bytes(size))
    return table


def show(table: Any) -> None:
    """Print a table."""
    from rich.console import Console

    # What models and people write is text, even where it looks like markup: "[/INST]".
    Console(markup=False, highlight=False).print(table)


def times(unpruned: float, pruned: float) -> str:
    """Return how many times smaller the pruned value is, or an empty text if it is zero."""
    return f"{unpruned / pruned:.2f}x" if pruned else ""


def to_json(value: Any) -> str:
    """Return a value as indented JSON for a person to read."""
    return json.dumps(value, indent=2, ensure_ascii=False)
