"""A complete Hub repository from a checkpoint folder: weights, code, processor, card, terms, endpoint handler."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.llava_source import is_stock, meta_model, read_config
from ..checkpoints.sources import naming_damaged_file
from ..checkpoints.weights import INDEX_FILE, Checkpoint
from ..checkpoints.writing import RECIPE_FILE, TERMS, copy_beside, save_without_weights
from ..files import images
from ..files.console import quiet
from ..files.shipped import shipped
from ..model.placeholders import check_placeholders, complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from ..trained import is_adapter, load
from ..trained.adapter import CONFIG, WEIGHTS, hub_name
from .cards import GENERIC, card_images, card_names, render, render_pruner

# Kinds of files that are not text.
_ATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "png", "jpg", "model")
)
_LLAMA_2 = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
"""The notice that the Llama 2 Community License (1.b.iii) asks for."""


@dataclass(frozen=True)
class Repository:
    """A repository that is ready to be uploaded.

    Attributes
    ----------
    folder : Path
        The complete folder; its weights are links to the checkpoint's.
    card : str
        The model card: a name of `hub_cards/`, or the file it comes from.
    files : mapping of str to int
        Bytes of every file by its place in the repository.
    left_out : tuple of str
        Files of the checkpoint's folder that are not uploaded.
    pruner : bool
        Whether it holds a trained pruner alone, and no model that could answer.
    """

    folder: Path
    card: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    pruner: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors"))


def stage(
    source: str | os.PathLike[str], repo_id: str, target: Path, *, card: str | None = None, revision: str = "main"
) -> Repository:
    """Lay out a repository in an empty folder.

    Parameters
    ----------
    source : str or path
        Folder of an IVTP-LLaVA, or of a trained pruner.
    repo_id : str
        The repository's name on the Hub, which the card shows in its examples.
    target : Path
        An empty folder.
    card : str, optional
        A card of `hub_cards/` by name, or a file. Default: that of the recipe the checkpoint was built by, else the
        folder's own README.md if it has a card's metadata, else the one for any checkpoint.
    revision : str, default "main"
        The branch, which the card shows in its examples.

    Raises
    ------
    ValueError
        If the folder is no IVTP-LLaVA or lacks CLIP's text half, or the card does not exist.
    OSError
        If a file is missing or damaged.
    """
    folder = Path(source).expanduser()
    if not os.fspath(source) or not folder.is_dir():  # an empty name would be the current folder
        raise FileNotFoundError(f"there is no folder {os.fspath(source)!r}; ivtp convert makes one")
    if is_adapter(folder):
        return _stage_pruner(folder, repo_id, target, card, revision)
    with quiet():
        config = read_config(folder, str(source))
    if is_stock(folder):
        raise ValueError(
            f"{source} is a stock LLaVA, not an IVTP-LLaVA; ivtp convert {source} --clip CLIP --out FOLDER makes one"
        )
    if config.clip_text_config is None:
        raise ValueError(f"{source} has no text tower of CLIP; ivtp convert {source} --clip CLIP --out FOLDER joins it")
    checkpoint = Checkpoint.from_folder(folder, str(source))
    recipe = _recipe(folder)
    # Reading 7B takes a while, and only a recipe or a card makes claims about particular weights.
    weights = checkpoint.digest() if recipe is not None or card in card_names() else None
    if recipe is not None and recipe["weights"] != weights:
        warnings.warn(
            f"the weights in {source} are not those that recipe {recipe['recipe']} made; its card is not theirs",
            stacklevel=2,
        )
        recipe = None
    name, text = _card(folder, card, recipe, repo_id, config, weights, revision)
    with quiet(), naming_damaged_file(source, folder):
        model = meta_model(config, checkpoint.tensors, checkpoint.main_dtype, str(source))
        processor = IVTPLlavaProcessor.from_pretrained(folder)
        complete_processor(processor, config)
        if processor.clip_tokenizer is None:
            raise ValueError(
                f"{source} has no clip_tokenizer/; ivtp convert {source} --clip CLIP --out FOLDER joins it"
            )
        check_placeholders(processor, config, source)
        save_without_weights(model, processor, target)
    copy_beside(folder, target)
    if recipe is not None:
        shutil.copyfile(folder / RECIPE_FILE, target / RECIPE_FILE)
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        _link(folder / file, target / file)
    if (folder / INDEX_FILE).is_file() and not (target / "model.safetensors").exists():
        shutil.copyfile(folder / INDEX_FILE, target / INDEX_FILE)
    (target / "README.md").write_text(text, encoding="utf-8")
    (target / ".gitattributes").write_text(_ATTRIBUTES)
    _terms(target)
    _endpoint(target)
    if name in (*card_names(), GENERIC):
        _images(name, target)
    files = _files(target)
    left_out = [place for place in _files(folder) if place not in files and not place.startswith(".")]
    return Repository(target, name, files, tuple(left_out))


def _stage_pruner(folder: Path, repo_id: str, target: Path, card: str | None, revision: str) -> Repository:
    """Lay out the repository of a trained pruner, whose modules are read to be sure that they fit."""
    method, name = load(folder), "pruner"
    if card is None:
        text = render_pruner(method, repo_id, revision=revision)
    else:
        name, file = card, Path(card).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no card {card!r}; allowed for a trained pruner: a file, or none")
        text = _read_card(file)
    _link(folder / WEIGHTS, target / WEIGHTS)
    note = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = str(note["base"].get("name_or_path", ""))
    if hub_name(named) == named:
        _link(folder / CONFIG, target / CONFIG)
    else:  # 0.2.0 wrote the path of the base's folder
        note["base"]["name_or_path"] = ""
        (target / CONFIG).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(text, encoding="utf-8")
    (target / ".gitattributes").write_text(_ATTRIBUTES)
    files = _files(target)
    return Repository(target, name, files, tuple(place for place in _files(folder) if place not in files), pruner=True)


def _files(folder: Path) -> dict[str, int]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _recipe(folder: Path) -> dict[str, Any] | None:
    if not (folder / RECIPE_FILE).is_file():
        return None
    try:
        values = json.loads((folder / RECIPE_FILE).read_text())
        return {name: values[name] for name in ("recipe", "card", "base_model", "clip", "weights")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECIPE_FILE} is damaged ({error}); remove it or convert again") from error


def _card(
    folder: Path,
    card: str | None,
    recipe: Mapping[str, Any] | None,
    repo_id: str,
    config: Any,
    weights: str | None,
    revision: str,
) -> tuple[str, str]:
    """Return the card's name or file, and its text."""
    if card is not None and card not in (*card_names(), GENERIC):
        file = Path(card).expanduser()
        if not file.is_file():
            allowed = ", ".join([*card_names(), GENERIC])
            raise ValueError(f"there is no card {card!r}; allowed: a file, or one of {allowed}")
        return str(file), _read_card(file)
    if card is None and recipe is not None:
        card = recipe["card"]
    own = folder / "README.md"
    if card is None and own.is_file() and (text := _read_card(own)).startswith("---\n"):
        return str(own), text
    name = card or GENERIC
    return name, render(name, repo_id, config, recipe, weights=weights, revision=revision)


def _read_card(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the card {file} is no text in UTF-8, which the Hub asks for") from error


def _terms(target: Path) -> None:
    """Add the code's licence beside the terms that came with the weights, and the notice that Llama 2's ask for."""
    card = (target / "README.md").read_text(encoding="utf-8")
    if "license: llama2" in card:
        if not any(target.glob("NOTICE*")):
            (target / "NOTICE").write_text(_LLAMA_2)
        if not any(target.glob("LICEN[SC]E*")):
            warnings.warn(
                "the Llama 2 licence asks for a copy of itself wherever the weights go, and the base came without one: "
                "put it into the folder as LICENSE.txt, and it is uploaded too",
                stacklevel=3,
            )
    of_weights = [file for pattern in TERMS for file in target.glob(pattern)]
    covers_weights = "license: apache-2.0" in card and not of_weights
    shutil.copyfile(shipped("LICENSE"), target / ("LICENSE" if covers_weights else "LICENSE-CODE"))


def _endpoint(target: Path) -> None:
    for name in ("handler.py", "requirements.txt"):
        shutil.copyfile(shipped(f"hub_cards/{name}"), target / name)
    shutil.copyfile(images.__file__, target / "handler_images.py")


def _images(card: str, target: Path) -> None:
    (target / "images").mkdir()
    for place, file in card_images(card).items():
        shutil.copyfile(file, target / place)
        licences = file.with_name("LICENSES.md")
        if licences.is_file():
            shutil.copyfile(licences, target / "images" / licences.name)


def _link(source: Path, target: Path) -> None:
    """Link a weight file; where users may not make symbolic links (Windows), make a hard link or a copy."""
    for link in (lambda: target.symlink_to(source.resolve()), lambda: os.link(source, target)):
        with suppress(OSError):
            link()
            return
    shutil.copyfile(source, target)
