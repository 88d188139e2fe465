"""How commands show what they found."""

from __future__ import annotations

import json
from typing import Any


def new_table(*columns: str, title: str | None = None) -> Any:
    """A table of text, whose cells fold where the terminal is narrow."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show(table: Any) -> None:
    """Print it."""
    from rich.console import Console

    # What models and people write is text, even where it looks like markup: "[/INST]".
    Console(markup=False, highlight=False).print(table)


def times(unpruned: float, pruned: float) -> str:
    """How many times less; nothing where nothing is left."""
    return f"{unpruned / pruned:.2f}x" if pruned else ""


def to_json(value: Any) -> str:
    """As a person reads it."""
    return json.dumps(value, indent=2, ensure_ascii=False)
