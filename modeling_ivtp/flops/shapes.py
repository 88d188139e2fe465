"""Published model shapes by name: `configuration/shapes/*.json`."""

from __future__ import annotations

import json
from typing import Any

from ..files.shipped import shipped
from ..model.configuration_ivtp import IVTPLlavaConfig


def shape_names() -> list[str]:
    """List the names that `load_shape` knows."""
    return sorted(file.stem for file in shipped("configuration/shapes").glob("*.json"))


def load_shape(name: str) -> IVTPLlavaConfig:
    """Load the configuration of a published shape, without weights.

    Raises
    ------
    ValueError
        If the name is unknown, with the known ones.
    """
    if name not in shape_names():
        raise ValueError(f"Unknown shape {name!r}; allowed: {', '.join(shape_names())}.")
    options: dict[str, Any] = json.loads((shipped("configuration/shapes") / f"{name}.json").read_text())
    return IVTPLlavaConfig(**options)
