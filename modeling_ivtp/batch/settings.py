"""The settings that decide answers: written when a run begins, and compared when it continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.weights import Checkpoint
from ..trained import adapter, is_adapter
from .data import Data
from .options import Options

_SAMPLES, _SAMPLE_BYTES = 64, 65_536
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "clip_tokenizer/*")
"""A checkpoint's files beside its weights that decide answers."""
_PACKAGES = ("ivtp-llava", "torch", "transformers")
_ADDED = ("device",)
"""Settings that folders of older versions do not have; they are not compared there."""


def compared(
    options: Options, model: str, data: Data, dtype: torch.dtype, **derived: int | str | None
) -> dict[str, Any]:
    """Return the settings that must be the same when a run continues.

    Parameters
    ----------
    options : Options
    model : str
        The model's fingerprint, from `model_fingerprint`.
    data : Data
    dtype : torch.dtype
        The type that the model computes in.
    **derived
        `device`, its kind, `memory` and `shard_rows`, as the person chose them or as derived; None: not yet.
    """
    return {
        "model": model,
        "data": data.fingerprint(),
        "rows": len(data),
        "image_column": options.image_column,
        "prompt_column": None if options.prompt is not None else options.prompt_column,
        "id_column": data.id_column,
        "prompt": options.prompt,
        "visual_tokens": options.visual_tokens,
        "method": adapter.fingerprint(options.method) if is_adapter(options.method) else options.method,
        "max_new_tokens": options.max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "engine": options.engine,
        "batch_size": options.batch_size,
        **derived,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute the answers."""
    return {name: version(name) for name in _PACKAGES}


def model_fingerprint(checkpoint: Checkpoint, folder: Path) -> str:
    """Return a fingerprint of a checkpoint: of its small files, and of its weights' names, sizes and samples.

    Reading all weights of a 7B model would take longer than loading them; 64 samples of 64 KB from every file tell
    trained weights from those before the training.

    Parameters
    ----------
    checkpoint : Checkpoint
        A checkpoint whose files are on this machine.
    folder : Path
        The folder of the small files.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    if checkpoint.folder is None:
        raise ValueError(f"the weights of {checkpoint.source} are not here")
    found = hashlib.sha256()
    for path in sorted({file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}):
        found.update(f"{path.relative_to(folder).as_posix()} ".encode() + path.read_bytes())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        file = checkpoint.folder / name
        size = file.stat().st_size
        found.update(f"{name} {size} ".encode())
        with open(file, "rb") as weights:
            for sample in range(_SAMPLES):
                weights.seek(sample * max(0, size - _SAMPLE_BYTES) // max(1, _SAMPLES - 1))
                found.update(weights.read(_SAMPLE_BYTES))
    return found.hexdigest()


def check_same(begun: Mapping[str, Any], current: Mapping[str, Any], out: str | Path) -> None:
    """Refuse to continue a run with other settings than it was begun with.

    Raises
    ------
    ValueError
        With every difference.
    """
    names = [
        name
        for name in {**begun, **current}
        if begun.get(name) != current.get(name) and (name in begun or name not in _ADDED)
    ]
    if not names:
        return
    differences = ", ".join(
        f"{name} is {_short(begun.get(name))} there and {_short(current.get(name))} now" for name in names
    )
    raise ValueError(f"{out} was begun with other settings: {differences}; give the old ones, or choose another folder")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # The beginning of a fingerprint is enough to tell it from others.
    return text if len(text) < 60 else f"{text[:12]}…"
