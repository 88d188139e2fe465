"""Rows that are answered together: shards of consecutive rows, and in a shard batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..files.sizes import human_bytes
from .data import Row

_SHARDS, _FEWEST, _MOST = 64, 16, 1024


@dataclass(frozen=True)
class Task:
    """A row that can be answered.

    Attributes
    ----------
    row : Row
    prompt : str
        The prompt in the form that the model was trained on, with a placeholder for every picture.
    tokens : int
        Length of the prompt with all tokens of its pictures.
    """

    row: Row
    prompt: str
    tokens: int


def default_shard_rows(rows: int) -> int:
    """Return the rows of a shard, a 64th of all, from 16 to 1024.

    Each process then has several shards, and a shard has rows enough to form batches.
    """
    return min(_MOST, max(_FEWEST, -(-rows // _SHARDS)))


def plan_batches(
    tasks: Sequence[Task], cost: Callable[[int, int, int], int], budget: int, largest: int
) -> tuple[list[list[Task]], dict[int, str]]:
    """Group tasks into batches, from the longest to the shortest.

    Little is padded then, and the first batch is the largest.

    Parameters
    ----------
    tasks : sequence of Task
    cost : callable
        Returns the bytes of a number of rows, padded to a length in tokens, with a number of images in all.
    budget : int
        Bytes that a batch may take.
    largest : int
        Most rows in a batch.

    Returns
    -------
    batches : list of list of Task
    too_large : dict of int to str
        Errors of the rows that exceed the budget alone, by their number in the data.
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
