"""Published shapes by name: `configuration/shapes/*.json`, which travel with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..configuration_ivtp import IVTPLlavaConfig

_INSTALLED = Path(__file__).parents[1] / "shapes"
_CLONE = Path(__file__).parents[2] / "configuration" / "shapes"


def _folder() -> Path:
    return _CLONE if _CLONE.is_dir() else _INSTALLED


def shape_names() -> list[str]:
    """The names that `load_shape` knows."""
    return sorted(file.stem for file in _folder().glob("*.json"))


def load_shape(name: str) -> IVTPLlavaConfig:
    """The configuration of a published shape, without weights.

    Raises
    ------
    ValueError
        For an unknown name, naming the known ones.
    """
    if name not in shape_names():
        raise ValueError(f"Unknown shape {name!r}; allowed: {', '.join(shape_names())}.")
    options: dict[str, Any] = json.loads((_folder() / f"{name}.json").read_text())
    return IVTPLlavaConfig(**options)
