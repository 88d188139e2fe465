"""A run, from the options to the last row."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..methods.names import OWN, UNPRUNED
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.placeholders import features_of_image
from ..model.processing_ivtp import IVTPLlavaProcessor
from ..serving.answering import check_device, set_budget, warn_if_unguided
from ..trained import is_adapter, make
from . import budget
from .actor import Job, read_data
from .folder import OutFolder
from .options import Options, Summary
from .remote import is_address
from .settings import SMALL_FILES, check_same, compared, model_fingerprint
from .vllm_engine import check_architecture, check_vllm

_SHARDS, _FEWEST, _MOST = 64, 16, 1024
_FEWEST_TOKENS = 2
"""Tokens of the shortest prompt beside its picture: the first token, and one of the question."""


def run(options: Options) -> Summary:
    """Answer a data set, or continue a run that was stopped.

    Ray answers: one that is started for this call, the cluster at `options.address`, or one that runs in this process.

    Raises
    ------
    ValueError
        For an unknown column, data without rows or a model that cannot be read; for other settings than those the
        folder was begun with, with all differences; if the machine cannot hold the weights and one row, or the memory
        budget cannot hold one row, with the bytes; if no cluster can be reached. Nothing is written then.
    OSError
        If data, model or the output's folder cannot be read or written.
    ChildProcessError
        If the processes that answer die again and again.
    """
    if options.method not in (OWN, UNPRUNED):
        make(options.method, options.visual_tokens)
    _check_places(options)
    folder = OutFolder(str(options.out))
    data = read_data(options)
    checkpoint, files = open_checkpoint(options.model, HubOptions(), extra=SMALL_FILES)
    config = read_config(files, options.model, quantized=True)
    dtype = budget.value_type(checkpoint, options.dtype)
    cost = budget.Cost(config, dtype.itemsize, options.max_new_tokens)
    length = _FEWEST_TOKENS + (features_of_image(config) if options.image_column else 0)
    need = budget.Need(checkpoint.loaded_bytes(dtype), cost(1, length, int(bool(options.image_column))))
    begun = folder.settings()
    known: dict[str, Any] = begun or {}
    settings = compared(
        options,
        model_fingerprint(checkpoint, files),
        data,
        dtype,
        device=known.get("device") if options.device is None else torch.device(options.device).type,
        memory=options.memory or known.get("memory"),
        shard_rows=options.shard_rows or known.get("shard_rows") or default_shard_rows(len(data)),
    )
    if options.engine == "vllm":
        check_architecture(options.model, config.architectures)
        settings["versions"] |= {"vllm": check_vllm(options)}
    if begun is not None:
        check_same(begun, settings, options.out)
        with folder.held():
            if folder.settle(len(data)).all():
                return Summary(len(data), *folder.count_errors(), was_finished=True)
    if options.image_column:
        if options.method != UNPRUNED:
            _warn_if_unguided(options, config, files)
        if data.left_out is not None:
            warnings.warn(data.left_out, stacklevel=2)
    _answer(options, need, folder, settings)
    return Summary(len(data), *folder.count_errors(), was_finished=False)


def default_shard_rows(rows: int) -> int:
    """Return the rows of a shard, a 64th of all, from 16 to 1024.

    Each actor then has several shards, and a shard has rows enough to form batches.
    """
    return min(_MOST, max(_FEWEST, -(-rows // _SHARDS)))


def _check_places(options: Options) -> None:
    """Refuse a device that is not here, a folder of answers within the data, and a cluster that does not answer."""
    device, data = options.device, Path(options.data).expanduser()
    if options.address is not None:
        from .cluster import check_address

        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={device!r}; allowed on a cluster: cpu, cuda")
        check_address(options.address)
    elif device is not None:
        check_device(device)
    out = Path(options.out).expanduser()
    if data.is_dir() and not is_address(str(options.out)) and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--out={options.out} lies in the folder of the data, {options.data}, and answers would become data; "
            "choose a folder beside it"
        )


def _warn_if_unguided(options: Options, config: Any, files: Path) -> None:
    """Warn as `answering.warn_if_unguided`, with a model that has no weights: those are for the actors."""
    with torch.device("meta"):
        model = IVTPLlavaForConditionalGeneration(config)
    model.name_or_path = options.model
    if options.method == OWN and options.visual_tokens is not None:
        set_budget(model, options.visual_tokens)
    untrained = options.method != OWN and not is_adapter(options.method)
    with make(options.method)(model) if untrained else nullcontext():
        warn_if_unguided(model, IVTPLlavaProcessor.from_pretrained(files))


def _answer(options: Options, need: budget.Need, folder: OutFolder, settings: dict[str, Any]) -> None:
    """Answer the rows that are left."""
    # Importing Ray takes seconds, which a run that is refused does not have to wait for.
    from .cluster import connected
    from .pipeline import answer_all

    with connected(options, need, settings["memory"]) as place:
        settings = settings | {"device": place.device_type, "memory": place.memory}
        expected = {} if options.address is None else {name: settings[name] for name in ("model", "data")}
        job = Job(
            _absolute(options), place.memory, settings["shard_rows"], place.actors.threads, place.device, expected
        )
        with folder.held():
            begun = folder.settings()
            if begun is None:
                names = {"model": options.model, "data": options.data, "split": options.split}
                folder.begin(names | {"settings": settings})
            else:  # here before, or by another command while this one waited for Ray
                check_same(begun, settings, options.out)
            try:
                if left := _left(folder, settings):
                    answer_all(job, left, folder, place.actors, options.progress)
            except BaseException:
                folder.forget_if_empty()
                raise
            if not folder.settle(settings["rows"]).all():
                raise RuntimeError(f"answers in {folder.name} were removed during the run; the same command goes on")


def _left(folder: OutFolder, settings: dict[str, Any]) -> list[np.ndarray]:
    """Return the rows that are not answered, shard by shard."""
    answered, size = folder.settle(settings["rows"]), settings["shard_rows"]
    shards = [first + np.flatnonzero(~answered[first : first + size]) for first in range(0, len(answered), size)]
    return [shard for shard in shards if len(shard)]


def _absolute(options: Options) -> Options:
    """Return the options with absolute paths: actors start in other folders."""
    found: dict[str, Any] = {}
    for name in ("model", "data", "method"):
        path = Path(getattr(options, name)).expanduser()
        # A pattern is no file, but its folder is one.
        if path.exists() or (name == "data" and not is_address(options.data) and path.parent.is_dir()):
            found[name] = str(path.absolute())
    return replace(options, **found)
