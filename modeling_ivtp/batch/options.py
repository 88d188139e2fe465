"""The options of a run, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..methods.names import OWN, UNPRUNED

IMAGE_COLUMN, PROMPT_COLUMN = "image", "question"
ENGINES = ("transformers", "vllm")
_COUNTS = ("visual_tokens", "max_new_tokens", "batch_size", "memory", "shard_rows", "limit", "actors", "threads")


@dataclass(frozen=True)
class Options:
    """The data and model of a run, and where its answers go.

    Attributes
    ----------
    model : str
        Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.
    data : str
        As `open_data` takes it.
    out : str or Path
        Folder of the answers, or the address of one.
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
        The method that prunes, or the folder of a trained one; `"unpruned"` drops nothing.
    max_new_tokens : int, default 64
        Length of the longest answer.
    batch_size : int, default 64
        Most rows in a batch, however much memory there is.
    memory : int, optional
        Bytes that a batch may take beside the weights, in one actor; None: a share of the memory that is free where
        the first actor will be.
    shard_rows : int, optional
        Rows of one shard; None: a 64th of all rows, from 16 to 1024.
    device : str, optional
        `"cpu"`, `"cuda"`, or one device of this machine, such as `"cuda:1"`; None: GPUs if there are any.
    dtype : str, default "auto"
    limit : int, optional
        Number of rows to answer, from the first.
    progress : bool, default True
        Whether Ray Data shows the run's progress on a terminal.
    engine : str, default "transformers"
        `"vllm"` answers with vLLM and this package's plug-in.
    actors : int, optional
        Processes that answer; None: one for each GPU, and one without GPUs.
    threads : int, optional
        CPU threads of each; None: this machine's, shared among the actors, and one beside a GPU.
    address : str, optional
        A Ray cluster, as `auto` or HOST:PORT; None: this machine.
    """

    model: str
    data: str
    out: str | Path
    split: str = "train"
    image_column: str = IMAGE_COLUMN
    prompt_column: str = PROMPT_COLUMN
    id_column: str | None = None
    prompt: str | None = None
    visual_tokens: int | None = None
    method: str = OWN
    max_new_tokens: int = 64
    batch_size: int = 64
    memory: int | None = None
    shard_rows: int | None = None
    device: str | None = None
    dtype: str = "auto"
    limit: int | None = None
    progress: bool = True
    engine: str = "transformers"
    actors: int | None = None
    threads: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}; allowed: {', '.join(ENGINES)}")
        if self.method == UNPRUNED and self.visual_tokens is not None:
            raise ValueError(f"visual_tokens={self.visual_tokens} with method={UNPRUNED!r}, which drops nothing")
        for name in _COUNTS:
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
    """

    rows: int
    errors: int
    first_error: str | None
    was_finished: bool
