"""The parts of a run that Ray Data's own tasks need: numbers of rows to read, names of files to write.

These tasks run in processes that only read and write. The file goes there as it is, by value, for which it imports
nothing of this package: that would bring PyTorch into each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ray import cloudpickle
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.checkpoint.checkpoint_filter import CheckpointManager
from ray.data.datasource import FilenameProvider


class RowNumbers(Datasource):
    """The rows to answer: one block for each shard.

    Parameters
    ----------
    shards : sequence of array of int
        The rows of each shard.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._shards = shards

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all blocks."""
        return sum(shard.nbytes for shard in self._shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Return a task for each shard."""
        return [
            ReadTask(_block_of(shard), BlockMetadata(len(shard), shard.nbytes, None, None)) for shard in self._shards
        ]


def _block_of(shard: np.ndarray) -> Callable[[], list[pa.Table]]:
    return lambda: [pa.table({"row": shard})]


class LeftToSettle(CheckpointManager):
    """Reads no checkpoint: `OutFolder.settle` has read them, and answered rows are not among `RowNumbers`.

    Ray's own would read them by a data set of its own, and filter by actors with a CPU and a gigabyte each.
    """

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Return that there is nothing to filter."""
        return None, 0


class AnswerFiles(FilenameProvider):
    """Names of the files of answers."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        """Return the name of a file; its checkpoint has the same."""
        return f"answers-{write_uuid}-{task_index:06d}.parquet"


cloudpickle.register_pickle_by_value(sys.modules[__name__])
