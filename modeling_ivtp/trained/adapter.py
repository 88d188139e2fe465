"""Folders of trained pruners: `config.json` has options and the base they fit, `model.safetensors` the modules."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files.folder import new_folder, system_errors
from ..methods import METHODS
from ..methods.apply import llava_of

if TYPE_CHECKING:
    from .method import TrainedMethod

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINED: dict[str, type[TrainedMethod]] = {}
"""Every trained method by its name."""

_FORMAT = 1
_ROWS, _VALUES = 4, 4
_CLOSE = 0.02
"""Embeddings of one base differ by less, relatively, between float32 and bfloat16, and those of fine-tuned ones too."""
_SAME = 0.005
"""Weights differ by less, relatively, if one is the other in bfloat16 or float16."""
_NOTES = ("name_or_path", "embeddings", "trained")
"""What a description holds beside the shape."""


def register(method: type[TrainedMethod]) -> None:
    """Let `load` find a method by the name in a folder."""
    TRAINED[method.name] = method


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a trained pruner; the bare name of an untrained method never is a folder."""
    if folder in METHODS:
        return False
    file = Path(folder, CONFIG)
    return file.is_file() and "pruner" in _read(file)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return 64 hexadecimal digits of a trained pruner's options and weights.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    """
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        found.update(hashlib.sha256(Path(folder, name).read_bytes()).digest())
    return found.hexdigest()


def describe_base(model: Any, *, trained: bool = False) -> dict[str, Any]:
    """Describe the LLaVA that modules are made for: its shape, and a few values of its embeddings.

    Parameters
    ----------
    model : model
    trained : bool, default False
        Whether it was trained together with the modules, which then fit no other: values of what may have learned are
        part of the description.

    Returns
    -------
    dict
        Ready for JSON. `embeddings`, and values of `trained`, are None where the weights cannot be read.
    """
    llava = llava_of(model)
    found = describe_shape(llava.config) | {"embeddings": _probe(llava)}
    return found | {"trained": _probe_parts(llava)} if trained else found


def describe_shape(config: Any) -> dict[str, Any]:
    """Describe what a configuration alone tells of a LLaVA that modules are made for; a folder's path stays here."""
    text, vision = config.text_config, config.vision_config
    return {
        "name_or_path": hub_name(str(getattr(config, "_name_or_path", ""))),
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "patches": (vision.image_size // vision.patch_size) ** 2,
    }


def hub_name(name_or_path: str) -> str:
    """Return a name on the Hub, which has one slash and is no folder here; of anything else nothing."""
    is_name = name_or_path.count("/") == 1 and name_or_path[0] not in "/.~" and not Path(name_or_path).exists()
    return name_or_path if is_name else ""


def _probe_parts(llava: Any) -> dict[str, list[float] | None]:
    """Return a few values of each part that can be trained together with modules."""
    layers = llava.model.language_model.layers
    parts = {
        "language_model": layers[len(layers) // 2].mlp.down_proj,
        "lm_head": llava.get_output_embeddings(),
        "multi_modal_projector": llava.model.multi_modal_projector.linear_2,
    }
    return {name: _values(part.weight) for name, part in parts.items()}


def _values(weight: torch.Tensor) -> list[float] | None:
    """Return values of a matrix; None of what is quantized, sharded or offloaded."""
    if weight.is_meta or weight.dim() != 2 or not weight.is_floating_point() or hasattr(weight, "to_local"):
        return None
    values: list[float] = weight.detach()[_ROWS : 2 * _ROWS, :_VALUES].flatten().float().tolist()
    return values


@torch.no_grad()
def _probe(llava: Any) -> list[float] | None:
    """Return the first values of the embeddings of tokens 3 to 6; reading the layer also works under offload."""
    embed = llava.get_input_embeddings()
    device = next(iter(embed.parameters())).device
    rows = embed(torch.arange(3, 3 + _ROWS, device="cpu" if device.type == "meta" else device))
    return None if rows.device.type == "meta" else rows[:, :_VALUES].flatten().float().tolist()


def check_base(name: str, base: Mapping[str, Any], model: Any) -> None:
    """Refuse a model that the modules were not made for.

    Raises
    ------
    ValueError
        If its shape or its embeddings differ, or it is not the one that was trained together with them.
    """
    found = describe_base(model, trained=bool(base.get("trained")))
    check_shape(name, base, found)
    difference = _difference(base.get("embeddings"), found["embeddings"], _CLOSE)
    if difference is not None:
        raise ValueError(
            f"{name}: this model's embeddings are not those of the adapter's base{_named(base)}: the largest "
            f"difference is {difference:.3g}; allowed: the base itself, or a fine-tuned one."
        )
    for part, values in (base.get("trained") or {}).items():
        difference = _difference(values, found["trained"].get(part), _SAME)
        if difference is not None:
            raise ValueError(
                f"{name}: this model's {part} is not the one that was trained together with the modules: the largest "
                f"difference is {difference:.3g}; allowed: the model that was saved beside them, such as model/ beside "
                "pruner/."
            )


def _difference(theirs: list[float] | None, ours: list[float] | None, close: float) -> float | None:
    """Return the largest difference of values that are not close, relatively; None of close or unknown ones."""
    if theirs is None or ours is None:
        return None
    known, found = torch.tensor(theirs), torch.tensor(ours)
    is_close = bool((known - found).norm() <= close * known.norm())
    return None if is_close else float((known - found).abs().max())


def check_shape(name: str, base: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a shape, from `describe_shape`, that the modules were not made for.

    Raises
    ------
    ValueError
        If it differs.
    """
    for key, value in base.items():
        if key not in _NOTES and found.get(key) != value:
            raise ValueError(
                f"{name}: this model has {key}={found.get(key)}; allowed: {value}, as the base of this adapter"
                f"{_named(base)} has."
            )


def _named(base: Mapping[str, Any]) -> str:
    return f" ({base['name_or_path']})" if base.get("name_or_path") else ""


def save(method: TrainedMethod, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a trained pruner into a folder, which appears complete or not at all.

    Raises
    ------
    FileExistsError
        If the folder holds something and `overwrite` is False.
    ValueError
        If the method has no modules.
    """
    learned = method.modules_or_raise()
    weights = {name: tensor.detach().contiguous() for name, tensor in learned.state_dict().items()}
    note = {"format": _FORMAT, "pruner": method.name, "base": method.base, "options": options_of(method)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with new_folder(folder, needed_bytes=size, overwrite=overwrite) as path:
        (path / CONFIG).write_text(json.dumps(note, indent=1) + "\n")
        with system_errors(path):
            save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


def options_of(method: TrainedMethod) -> dict[str, Any]:
    """Return the options that differ from their defaults, ready for JSON."""
    options = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.init and field.compare and value != field.default:
            options[field.name] = list(value) if isinstance(value, tuple) else value
    return options


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> TrainedMethod:
    """Read a trained pruner from its folder, or from the Hub.

    Parameters
    ----------
    folder : str or path
        Or a Hub id, where there is no such folder.
    revision, token : str, optional
        For the Hub.
    dtype : torch.dtype, optional
        Of the modules; default: as they were saved.
    **options
        In place of saved ones, such as another `ratio`. A budget replaces the saved budget, whatever it is.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the folder holds no trained pruner or not one of this format, or an option or the weights do not fit.
    """
    path = Path(folder)
    if not path.is_dir() and str(folder).count("/") == 1:
        path = Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS]))
    note = _read(path / CONFIG)
    name = note.get("pruner")
    if name not in TRAINED:
        raise ValueError(f"{folder}: pruner={name!r} in {CONFIG}; allowed: {', '.join(TRAINED)}.")
    if note.get("format") != _FORMAT:
        raise ValueError(f"{folder}: format={note.get('format')!r} in {CONFIG}; allowed: {_FORMAT}.")
    kind = TRAINED[name]
    known = [field.name for field in fields(kind) if field.init and field.compare]
    if unknown := sorted({*options, *note["options"]} - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; allowed: {', '.join(known)}.")
    saved = {key: tuple(value) if isinstance(value, list) else value for key, value in note["options"].items()}
    if any(options.get(budget) is not None for budget in kind.budgets):
        saved = {key: value for key, value in saved.items() if key not in kind.budgets}
    with torch.device("meta"):
        method = kind(**saved | options)
        learned = method.build(note["base"])
    learned.load_state_dict(_weights(path / WEIGHTS, learned), assign=True)
    learned = learned if dtype is None else learned.to(dtype)
    return method.with_modules(learned, note["base"])


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: it is no folder of a trained pruner")
    try:
        note = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(note, dict):
        raise ValueError(f"{file} holds {type(note).__name__}; allowed: an object.")
    return note


def _weights(file: Path, learned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read weights that fit the modules exactly."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: it is no folder of a trained pruner")
    try:
        weights: dict[str, torch.Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in learned.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(
            f"{file} does not fit its {CONFIG}: {wrong[0][0]} is {found.get(wrong[0][0])}; allowed: "
            f"{expected.get(wrong[0][0])} ({len({name for name, _ in wrong})} tensors differ)."
        )
    return weights
