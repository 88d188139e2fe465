"""Which rows are answered together: shards of consecutive rows, and in a shard batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..files.folder import human_bytes
from .data import Row

_SHARDS, _FEWEST, _MOST = 64, 16, 1024


@dataclass(frozen=True)
class Task:
    """A row and what it takes to answer it.

    Attributes
    ----------
    row : Row
    prompt : str
        As the model was trained on it, with a placeholder for every picture.
    tokens : int
        Of the prompt, all tokens of its pictures included.
    """

    row: Row
    prompt: str
    tokens: int


def default_shard_rows(rows: int) -> int:
    """A 64th of all rows, from 16 to 1024: several shards for each process, and rows enough to make batches from."""
    return min(_MOST, max(_FEWEST, -(-rows // _SHARDS)))


def plan_batches(
    tasks: Sequence[Task], cost: Callable[[int, int, int], int], budget: int, largest: int
) -> tuple[list[list[Task]], dict[int, str]]:
    """Cut tasks into batches, from the longest to the shortest, so that little is padded and the first is the largest.

    Parameters
    ----------
    tasks : sequence of Task
    cost : callable
        Bytes of so many rows, of a padded length in tokens, with so many images in all.
    budget : int
        Bytes that a batch may take.
    largest : int
        Most rows in a batch.

    Returns
    -------
    batches : list of list of Task
    too_large : dict of int to str
        By its number in the data, what is wrong with a row that exceeds the budget all alone.
    """
    batches: list[list[Task]] = []
    too_large: dict[int, str] = {}
    images = 0
    for task in sorted(tasks, key=lambda task: (-task.tokens, task.row.number)):
        alone = cost(1, task.tokens, len(task.row.images))
        if alone > budget:
            too_large[task.row.number] = (
                f"{task.tokens} tokens need {human_bytes(alone)}, and a batch may take {human_bytes(budget)}"
            )
            continue
        more = images + len(task.row.images)
        last = batches[-1] if batches else []
        if last and len(last) < largest and cost(len(last) + 1, last[0].tokens, more) <= budget:
            last.append(task)
            images = more
        else:
            batches.append([task])
            images = len(task.row.images)
    return batches, too_large
