"""Recipes: the published settings that checkpoints are built from, `configuration/*.json`.

A recipe names the LLaVA and the CLIP to join, the shape both must have, the model card that tells of the result, and
every pruning option, so that a change of a default never changes a published checkpoint.
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
_DTYPES = ("float16", "bfloat16", "float32")
# What makes two models one shape: everything that sizes a tensor or a sequence.
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
    """One published setting.

    Attributes
    ----------
    name : str
        The file's name without its ending, such as `"ivtp-llava-1.5-7b-64"`.
    base_model : str
        Hub id or folder of the LLaVA.
    clip : str or None
        Hub id or folder of the CLIP whose text half joins it; None if the base has one.
    shape : str
        Name of a shape in `configuration/shapes`; the base model has to have it.
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
        """As in the file."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"} | {
            "pruning": asdict(self.pruning)
        }

    def config(self) -> Any:
        """The configuration that a checkpoint of this recipe has, without weights: IVTPLlavaConfig."""
        config = load_shape(self.shape)
        config.pruning = self.pruning
        return config

    def check(self, config: Any, source: str) -> None:
        """Make sure that a model is the one the recipe is for.

        Parameters
        ----------
        config : IVTPLlavaConfig
        source : str
            What the person named; it stands in the error.

        Raises
        ------
        ValueError
            If a size differs.
        """
        wanted = self.config()
        for part, names in _SIZES.items():
            ours, theirs = getattr(wanted, part), getattr(config, part)
            for name in names if theirs is not None else ():
                if getattr(ours, name) != getattr(theirs, name):
                    raise ValueError(
                        f"{source} is not of the shape {self.shape} that recipe {self.name} is for: {part}.{name} is "
                        f"{getattr(theirs, name)!r}, not {getattr(ours, name)!r}"
                    )


def recipe_names() -> list[str]:
    """The recipes that ship; those whose base lies in a clone of the project, only there."""
    files = shipped("configuration").glob("*.json")
    return sorted(file.stem for file in files if _has_base(json.loads(file.read_text()), file.parent))


def _has_base(stated: Mapping[str, Any], folder: Path) -> bool:
    base = str(stated["base_model"])
    return not base.startswith(".") or (folder / base).is_dir()


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """A recipe by the path of its file, or by name if it ships.

    Raises
    ------
    ValueError
        If there is none, or it is no recipe: a field unknown or missing, a value of the wrong kind or out of range.
    """
    file = Path(recipe).expanduser()
    if not file.is_file() and str(recipe) in recipe_names():
        file = shipped("configuration") / f"{recipe}.json"
    if not file.is_file():
        raise ValueError(f"there is no recipe {str(recipe)!r}; allowed: a file, or one of {', '.join(recipe_names())}")
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return _checked(stated, file)


def _checked(stated: Any, file: Path) -> Recipe:
    if not isinstance(stated, Mapping):
        raise ValueError(f"{file} holds no JSON object")
    for wrong, what in ((set(stated) - set(_FIELDS), "unknown"), (set(_FIELDS) - set(stated), "missing")):
        if wrong:
            raise ValueError(f"{file} has {what} field(s) {', '.join(sorted(wrong))}; allowed: {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if not isinstance(stated[name], kind):
            raise ValueError(f"{file}: {name}={stated[name]!r} is not what a recipe has there")
    if stated["shape"] not in shape_names():
        raise ValueError(f"{file}: shape={stated['shape']!r}; allowed: {', '.join(shape_names())}")
    if stated["dtype"] not in _DTYPES:
        raise ValueError(f"{file}: dtype={stated['dtype']!r}; allowed: {', '.join(_DTYPES)}")
    try:
        pruning = IVTPPruningConfig.create(stated["pruning"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    # A path is meant from the recipe's own folder, so that it holds wherever the command is given.
    base, clip = (_resolved(stated[name], file.parent) for name in ("base_model", "clip"))
    made = Recipe(file.stem, str(base), clip, stated["shape"], stated["card"], stated["dtype"], pruning)
    try:
        made.config().pruning_plan()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return made


def _resolved(source: str | None, folder: Path) -> str | None:
    return os.path.normpath(folder / source) if source is not None and source.startswith(".") else source
