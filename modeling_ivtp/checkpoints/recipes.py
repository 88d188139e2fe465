"""Recipes: the published settings that checkpoints are built from, `configuration/*.json`.

A recipe names the LLaVA and the CLIP to join, the shape both must have, the model card of the result, and every pruning
option, so that a change of a default never changes a published checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files.shipped import shipped
from ..flops.shapes import load_shape, shape_names
from ..model.configuration_ivtp import IVTPPruningConfig

_FIELDS: dict[str, Any] = {
    "base_model": str,
    "clip": (str, type(None)),
    "shape": str,
    "card": str,
    "dtype": str,
    "pruning": dict,
}
_KINDS = {str: "a string", (str, type(None)): "a string or null", dict: "an object"}
_DTYPES = ("float16", "bfloat16", "float32")
# Two models are of one shape if these agree: every number that sizes a tensor or a sequence.
_SIZES = {
    "text_config": (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    "vision_config": (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ),
    "clip_text_config": ("hidden_size", "num_hidden_layers", "projection_dim", "max_position_embeddings", "vocab_size"),
}


@dataclass(frozen=True)
class Recipe:
    """A published setting.

    Attributes
    ----------
    name : str
        The file's name without its ending, such as `"ivtp-llava-1.5-7b-64"`.
    base_model : str
        Hub id or folder of the LLaVA.
    clip : str or None
        Hub id or folder of the CLIP whose text half joins it; None if the base has one.
    shape : str
        Name of a shape in `configuration/shapes`; the base model must have it.
    card : str
        Folder in `hub_cards/` of the model card.
    dtype : {"float16", "bfloat16", "float32"}
    pruning : IVTPPruningConfig
    """

    name: str
    base_model: str
    clip: str | None
    shape: str
    card: str
    dtype: str
    pruning: IVTPPruningConfig

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as the file holds it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"} | {
            "pruning": asdict(self.pruning)
        }

    def config(self) -> Any:
        """Return the IVTPLlavaConfig of this recipe's checkpoint."""
        config = load_shape(self.shape)
        config.pruning = self.pruning
        return config

    def check(self, config: Any, source: str) -> None:
        """Check that a model has the recipe's shape.

        Parameters
        ----------
        config : IVTPLlavaConfig
        source : str
            The name or path that the user gave; the error names it.

        Raises
        ------
        ValueError
            If a size differs.
        """
        expected = self.config()
        for part, names in _SIZES.items():
            ours, theirs = getattr(expected, part), getattr(config, part)
            for name in names if theirs is not None else ():
                if getattr(ours, name) != getattr(theirs, name):
                    raise ValueError(
                        f"{source} is not of the shape {self.shape} that recipe {self.name} is for: {part}.{name} is "
                        f"{getattr(theirs, name)!r}, not {getattr(ours, name)!r}"
                    )


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes; one whose base lies in a clone of the project is listed only there."""
    files = shipped("configuration").glob("*.json")
    return sorted(file.stem for file in files if _has_base(json.loads(file.read_text()), file.parent))


def _has_base(values: Mapping[str, Any], folder: Path) -> bool:
    base = str(values["base_model"])
    return not base.startswith(".") or (folder / base).is_dir()


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """Load a recipe by the path of its file, or a shipped one by name.

    Raises
    ------
    ValueError
        If there is none, or the file is no recipe: a field is unknown or missing, a value of the wrong kind or out of
        range.
    """
    file = Path(recipe).expanduser()
    if not file.is_file() and str(recipe) in recipe_names():
        file = shipped("configuration") / f"{recipe}.json"
    if not file.is_file():
        raise ValueError(f"there is no recipe {str(recipe)!r}; allowed: a file, or one of {', '.join(recipe_names())}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return _checked(values, file)


def _checked(values: Any, file: Path) -> Recipe:
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds no JSON object")
    for names, fault in ((set(values) - set(_FIELDS), "unknown"), (set(_FIELDS) - set(values), "missing")):
        if names:
            raise ValueError(f"{file} has {fault} field(s) {', '.join(sorted(names))}; allowed: {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{file}: {name}={values[name]!r}; allowed: {_KINDS[kind]}")
    if values["shape"] not in shape_names():
        raise ValueError(f"{file}: shape={values['shape']!r}; allowed: {', '.join(shape_names())}")
    if values["dtype"] not in _DTYPES:
        raise ValueError(f"{file}: dtype={values['dtype']!r}; allowed: {', '.join(_DTYPES)}")
    try:
        pruning = IVTPPruningConfig.create(values["pruning"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    # A relative path starts at the recipe's own folder, so that the working directory does not matter.
    base, clip = (_resolved(values[name], file.parent) for name in ("base_model", "clip"))
    recipe = Recipe(file.stem, str(base), clip, values["shape"], values["card"], values["dtype"], pruning)
    try:
        recipe.config().pruning_plan()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return recipe


def _resolved(source: str | None, folder: Path) -> str | None:
    return os.path.normpath(folder / source) if source is not None and source.startswith(".") else source
