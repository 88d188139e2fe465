"""The options of a run, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_COLUMN, PROMPT_COLUMN = "image", "question"


@dataclass(frozen=True)
class Options:
    """The data and model of a run, and where its answers go.

    Attributes
    ----------
    model : str
        Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.
    data : str
        As `open_data` takes it.
    out : Path
        Folder of the answers.
    split : str, default "train"
    image_column : str, default "image"
        An empty name: there are no pictures.
    prompt_column : str, default "question"
    id_column : str, optional
        Column of the rows' names; None: `id`, if there is such a column. An empty name: rows have none.
    prompt : str, optional
        One question for all rows, instead of a column.
    visual_tokens : int, optional
        Visual tokens of one image left in the end; None: the checkpoint's or the trained method's own, or 64.
    method : str, default "ivtp"
        The method that prunes, or the folder of a trained one.
    max_new_tokens : int, default 64
        Length of the longest answer.
    batch_size : int, default 64
        Most rows in a batch, however much memory there is.
    memory : int, optional
        Bytes that a batch may take beside the weights, in one process; None: a share of the memory that the run's
        first process finds free.
    shard_rows : int, optional
        Rows of one shard; None: a 64th of all rows, from 16 to 1024.
    device : str, optional
        As in `answering.load_model`; None and several processes: one GPU each, or the CPU.
    dtype : str, default "auto"
    limit : int, optional
        Number of rows to answer, from the first.
    progress : bool, default True
        Whether the main process shows the run's progress.
    """

    model: str
    data: str
    out: Path
    split: str = "train"
    image_column: str = IMAGE_COLUMN
    prompt_column: str = PROMPT_COLUMN
    id_column: str | None = None
    prompt: str | None = None
    visual_tokens: int | None = None
    method: str = "ivtp"
    max_new_tokens: int = 64
    batch_size: int = 64
    memory: int | None = None
    shard_rows: int | None = None
    device: str | None = None
    dtype: str = "auto"
    limit: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("visual_tokens", "max_new_tokens", "batch_size", "memory", "shard_rows", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; allowed: a whole number from 1")


@dataclass(frozen=True)
class Summary:
    """The folder's content when all rows are answered.

    Attributes
    ----------
    rows, errors : int
        Number of all rows, and of those with an error in place of an answer.
    first_error : str or None
        The error of the first of these.
    was_finished : bool
        Whether all rows had been answered before.
    main : bool
        Whether this is the main process, which reports for all.
    """

    rows: int
    errors: int
    first_error: str | None
    was_finished: bool
    main: bool
