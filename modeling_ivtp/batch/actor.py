"""The work of an actor: the model, and the rows of one shard after another."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import torch

from ..checkpoints.sources import HubOptions, open_checkpoint
from ..methods.names import OWN, UNPRUNED
from ..serving.answering import load_model, set_budget
from ..trained import make
from .answers import Answered, table
from .asking import Asker, failure
from .budget import Cost, plan_batches
from .data import Data, open_data
from .options import Options
from .settings import SMALL_FILES, model_fingerprint


@dataclass(frozen=True)
class Job:
    """A run as every actor is given it.

    Attributes
    ----------
    options : Options
        With absolute paths.
    memory, shard_rows : int
        As in `Options`, chosen or derived.
    threads : int
        Threads of one actor.
    device : str or None
        As in `load_model`; None spreads the model over the GPUs that the actor sees.
    expected : dict
        The fingerprints of `model` and `data` on the machine where the command runs, if other machines answer.
    """

    options: Options
    memory: int
    shard_rows: int
    threads: int
    device: str | None
    expected: dict[str, str]


def read_data(options: Options) -> Data:
    """Open the data of a run."""
    return open_data(
        options.data,
        split=options.split,
        limit=options.limit,
        image_column=options.image_column or None,
        prompt_column=options.prompt_column if options.prompt is None else None,
        id_column=options.id_column,
        prompt=options.prompt,
    )


class Answering:
    """Answers the rows of a shard, in batches of similar length that memory holds.

    Parameters
    ----------
    job : Job
    """

    def __init__(self, job: Job) -> None:
        self._failed: Exception | None = None
        try:
            self._start(job)
        except Exception as error:
            # Ray replaces an actor that cannot start, as often as it likes; the error of a call it hands to the caller.
            self._failed = error

    def _start(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        options = job.options
        self._job, self._data = job, read_data(options)
        check_same_files(job, self._data)
        own = options.method in (OWN, UNPRUNED)
        other = None if own else make(options.method, options.visual_tokens)
        model, processor = load_model(options.model, device=job.device, dtype=options.dtype)
        if other is not None:
            self._applied = ExitStack()
            self._applied.enter_context(other(model))
        elif options.method == UNPRUNED:
            model.set_pruning(enabled=False)
        elif options.visual_tokens is not None:
            set_budget(model, options.visual_tokens)
        self._asker = Asker(model, processor, options.max_new_tokens)
        self._cost = Cost(model.config, model.dtype.itemsize, options.max_new_tokens)
        self._reader = ThreadPoolExecutor(1)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the answers of the rows whose numbers a block holds."""
        if self._failed is not None:
            raise self._failed
        return table(self._answered(block["row"].to_pylist()))

    def _answered(self, numbers: list[int]) -> list[Answered]:
        wanted = set(numbers)
        rows = [row for row in self._data.rows(min(wanted), max(wanted) + 1) if row.number in wanted]
        tasks, answered = self._asker.tasks(rows)
        batches, too_large = plan_batches(tasks, self._cost, self._job.memory, self._job.options.batch_size)
        answered += [failure(row, too_large[row.number]) for row in rows if row.number in too_large]
        # While the model answers a batch, the next one's pictures are read.
        ready: Any = self._reader.submit(self._asker.prepare, batches[0]) if batches else None
        for batch, following in zip_longest(batches, batches[1:]):
            prepared = ready
            if following is not None:
                ready = self._reader.submit(self._asker.prepare, following)
            answered += self._asker.answer(batch, prepared.result)
        return answered


def check_same_files(job: Job, data: Data) -> None:
    """Refuse to answer on a machine that has another model or other data under the same names."""
    if not job.expected:
        return
    checkpoint, files = open_checkpoint(job.options.model, HubOptions(), extra=SMALL_FILES)
    here = {"model": model_fingerprint(checkpoint, files), "data": data.fingerprint()}
    for name, fingerprint in here.items():
        if fingerprint != job.expected[name]:
            raise ValueError(
                f"{getattr(job.options, name)} on {socket.gethostname()} is not what it is where the command runs; "
                "put the same there, or under an address that all machines read"
            )
