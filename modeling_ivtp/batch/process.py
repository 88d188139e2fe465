"""One process of a run, from the options to the last shard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..model.placeholders import features_of_image
from ..serving.answering import check_device, load_model, set_budget, warn_if_unguided
from ..trained import make
from . import answers, budget
from .asking import Asker, failure
from .data import Data, open_data
from .folder import OutFolder
from .journal import Journal
from .options import Options, Summary
from .plan import default_shard_rows, plan_batches
from .progress import Counter, shown
from .settings import SMALL_FILES, check_same, compared, model_fingerprint

_FEWEST_TOKENS = 2
"""Tokens of the shortest prompt beside its picture: the first token, and one of the question."""


@dataclass(frozen=True)
class _Work:
    """Everything that the loop over shards needs."""

    data: Data
    folder: OutFolder
    asker: Asker
    cost: budget.Cost
    memory: int
    batch_size: int
    shard_rows: int
    shards: int


def run(options: Options) -> Summary:
    """Answer a data set, or continue a run that was stopped.

    Every process of a run calls this with the same options; `accelerate launch` starts them, and so does running a
    command twice. It returns when all rows are answered, by this process or others.

    Raises
    ------
    ValueError
        For an unknown column, data without rows or a model that cannot be read; for other settings than those the
        folder was begun with, with all differences; if the machine cannot hold the weights and one row, or the memory
        budget cannot hold one row, with the bytes. Nothing is written then.
    OSError
        If data, model or the output's folder cannot be read or written.
    """
    other = None if options.method == "ivtp" else make(options.method, options.visual_tokens)
    if options.device is not None:
        check_device(options.device)
    data = Path(options.data).expanduser()
    if data.is_dir() and options.out.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--out={options.out} lies in the folder of the data, {options.data}, and answers would become data; "
            "choose a folder beside it"
        )
    with launched(options.device) as state:
        return _run(options, state, other)


def _run(options: Options, state: PartialState, other: Any) -> Summary:
    device = own_device(options.device, state)
    folder = OutFolder(options.out)
    data = open_data(
        options.data,
        split=options.split,
        limit=options.limit,
        image_column=options.image_column or None,
        prompt_column=options.prompt_column if options.prompt is None else None,
        id_column=options.id_column,
        prompt=options.prompt,
    )
    checkpoint, files = open_checkpoint(options.model, HubOptions(), extra=SMALL_FILES)
    config = read_config(files, options.model, quantized=True)
    dtype = budget.value_type(checkpoint, options.dtype)
    cost = budget.Cost(config, dtype.itemsize, options.max_new_tokens)
    weights = checkpoint.loaded_bytes(dtype)
    least = (
        cost(1, _FEWEST_TOKENS + features_of_image(config), 1) if options.image_column else cost(1, _FEWEST_TOKENS, 0)
    )
    begun = folder.settings()
    known: dict[str, Any] = begun or {}
    derived = {
        "memory": options.memory or known.get("memory") or budget.default_budget(weights, least, device),
        "shard_rows": options.shard_rows or known.get("shard_rows") or default_shard_rows(len(data)),
    }
    settings = compared(options, model_fingerprint(checkpoint, files), data, dtype, **derived)
    if begun is not None:
        check_same(begun, settings, options.out)
        shards = _shards(data, settings)
        if len(folder.finished(shards)) == shards:
            return _summary(folder, shards, len(data), state, was_finished=True)
    budget.check_room(weights, least, options.memory, device)
    # A process that has loaded its model must not make the machine look full to the others. They wait only here.
    state.wait_for_everyone()
    model, processor = load_model(options.model, device=device, dtype=options.dtype)
    if options.visual_tokens is not None and other is None:
        set_budget(model, options.visual_tokens)
    folder.begin({"model": options.model, "data": options.data, "split": options.split, "settings": settings})
    # Another process may have begun meanwhile; all processes then take the memory and rows that it derived.
    begun = folder.settings() or {}
    settings |= {name: begun[name] for name in derived if getattr(options, name) is None}
    check_same(begun, settings, options.out)
    with nullcontext() if other is None else other(model):
        if options.image_column and state.is_main_process:
            warn_if_unguided(model, processor)
            if data.left_out is not None:
                warnings.warn(data.left_out, stacklevel=2)
        work = _Work(
            data=data,
            folder=folder,
            asker=Asker(model, processor, options.max_new_tokens),
            cost=cost,
            memory=settings["memory"],
            batch_size=options.batch_size,
            shard_rows=settings["shard_rows"],
            shards=_shards(data, settings),
        )
        _answer_all(work, state, options.progress)
    return _summary(folder, work.shards, len(data), state, was_finished=False)


def _shards(data: Data, settings: Mapping[str, Any]) -> int:
    return -(-len(data) // int(settings["shard_rows"]))


def own_device(name: str | None, state: PartialState) -> str | None:
    """Return the model's device; None spreads it over all GPUs, which several processes must not do."""
    if name is not None:
        return name
    if state.device.type == "cpu":
        return "cpu"
    return str(state.device) if state.num_processes > 1 else None


@contextmanager
def launched(device: str | None) -> Iterator[PartialState]:
    """Return a context in which launched processes know each other; one within another leaves that to the outer."""
    within = torch.distributed.is_initialized()
    state = processes(device)
    try:
        yield state
    finally:
        if torch.distributed.is_initialized() and not within:
            state.destroy_process_group()


def processes(device: str | None) -> PartialState:
    """Return this process's place among those that were launched; accelerate must know if they run on CPUs."""
    on_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    return PartialState(cpu=on_cpu)


def _answer_all(work: _Work, state: PartialState, progress: bool) -> None:
    counter = Counter(work.folder, len(work.data), work.shard_rows, work.shards)
    start = state.process_index * work.shards // state.num_processes
    with shown(counter, progress and state.is_main_process) as update, ThreadPoolExecutor(1) as reader:
        for shard in work.folder.claim(work.shards, start):
            if shard is not None:
                _answer_shard(work, shard, reader, update)
            update()


def _answer_shard(work: _Work, shard: int, reader: ThreadPoolExecutor, update: Callable[[], None]) -> None:
    first = shard * work.shard_rows
    rows = work.data.rows(first, min(first + work.shard_rows, len(work.data)))
    tasks, answered = work.asker.tasks(rows)
    batches, too_large = plan_batches(tasks, work.cost, work.memory, work.batch_size)
    answered += [failure(row, too_large[row.number]) for row in rows if row.number in too_large]
    with Journal(work.folder.journal(shard)) as journal:
        left = [number for number in range(len(batches)) if number not in journal.batches]
        # While the model answers a batch, the next one's pictures are read.
        ready = {number: reader.submit(work.asker.prepare, batches[number]) for number in left[:1]}
        for number, following in zip_longest(left, left[1:]):
            if following is not None:
                ready[following] = reader.submit(work.asker.prepare, batches[following])
            journal.add(number, work.asker.answer(batches[number], ready.pop(number).result))
            update()
        answered += [row for batch in journal.batches.values() for row in batch]
    _check_all(answered, rows, shard)
    answers.write(work.folder.answers(shard, work.shards), answered)
    # The process that first saw all shards finished has removed the folder.
    work.folder.journal(shard).unlink(missing_ok=True)


def _check_all(answered: Iterable[answers.Answered], rows: Iterable[Any], shard: int) -> None:
    if sorted(answer.row for answer in answered) != [row.number for row in rows]:
        raise RuntimeError(
            f"the journal of shard {shard} does not belong to these data; remove its .jsonl file in _unfinished/"
        )


def _summary(folder: OutFolder, shards: int, rows: int, state: PartialState, *, was_finished: bool) -> Summary:
    # Files of unfinished work remain if a process was killed just before it removed them.
    folder.tidy()
    main = state.is_main_process
    files = [folder.answers(shard, shards) for shard in range(shards)] if main else []
    return Summary(rows, *answers.count_errors(files), was_finished, main)
