"""Rows through Ray Data: numbers of rows in, answers out, a checkpoint for each file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from ..files.images import shortened
from .actor import Answering, Job
from .cluster import Actors
from .folder import OutFolder
from .row_files import AnswerFiles, LeftToSettle, RowNumbers
from .vllm_engine import answers_by_vllm

_RETRIES = 20
"""Times that a shard is given to another process when its own dies. A shard that always kills must end the run."""
_SMALL_TASK = {"num_cpus": 0}
"""Reading and writing take next to nothing, and must not wait for a CPU that the actors have taken."""


def answer_all(job: Job, shards: Sequence[np.ndarray], folder: OutFolder, actors: Actors, progress: bool) -> None:
    """Answer rows and write the answers. Ray must be running.

    Parameters
    ----------
    job : Job
    shards : sequence of array of int
        The rows, in the groups in which they are written.
    folder : OutFolder
    actors : Actors
    progress : bool
        Whether Ray Data shows how far it is, if this is a terminal.

    Raises
    ------
    ChildProcessError
        If the processes that answer a shard die again and again.
    Exception
        What an actor raised.
    """
    with _context(folder, progress):
        numbers = ray.data.read_datasource(
            RowNumbers(shards), override_num_blocks=len(shards), concurrency=1, **_SMALL_TASK
        )
        try:
            answers = answers_by_vllm if job.options.engine == "vllm" else _answers
            answers(numbers, job, actors).write_parquet(
                folder.path,
                filesystem=folder.arrow,
                filename_provider=AnswerFiles(),
                concurrency=1,
                ray_remote_args=_SMALL_TASK,
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            why = shortened(" ".join(str(error).split()))
            raise ChildProcessError(f"processes of the run died: {why}; the same command goes on") from error


def _answers(numbers: Dataset, job: Job, actors: Actors) -> Dataset:
    return numbers.map_batches(
        Answering,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        # With GPUs Ray Data wants a number. A shard is a batch: it has no more rows, and less than that the last alone.
        batch_size=job.shard_rows if actors.gpus else None,
        compute=ActorPoolStrategy(size=actors.count),
        num_cpus=actors.threads,
        num_gpus=actors.gpus,
        max_restarts=-1,
        max_task_retries=_RETRIES,
    )


@contextmanager
def _context(folder: OutFolder, progress: bool) -> Iterator[None]:
    """Set Ray Data's options for one run."""
    context = DataContext.get_current()
    wanted = {
        "checkpoint_config": CheckpointConfig(
            id_column="row",
            checkpoint_path=folder.checkpoints,
            override_filesystem=folder.arrow,
            delete_checkpoint_on_success=False,
            checkpoint_manager_cls=LeftToSettle,
        ),
        # Elsewhere than on a terminal they are a dozen lines of its log, every ten seconds.
        "enable_progress_bars": progress and sys.stdout.isatty(),
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in wanted}
    console = [one for one in logging.getLogger("ray.data").handlers if isinstance(one, logging.StreamHandler)]
    for handler in console:
        handler.addFilter(_nothing)
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler in console:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    """Keep Ray Data's log from the console; it is in files, too, and errors are raised."""
    return False
