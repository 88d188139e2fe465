"""Random choices that are the same on every machine and with every NumPy.

NumPy keeps the raw bits of PCG64 stable for good, but not the results of `Generator`. So choices are made here, in
integers, from the raw bits.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """A stream of random choices.

    Parameters
    ----------
    *key : int
        Non-negative integers. Equal keys give equal streams, different keys independent ones.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._pool: list[int] = []

    def below(self, stop: int) -> int:
        """Draw a number from 0 to `stop` - 1."""
        if not self._pool:
            self._pool = (self._bits.random_raw(128) >> 32).tolist()
        return self._pool.pop() * stop >> 32

    def between(self, first: int, last: int) -> int:
        """Draw a number from `first` to `last`, both included."""
        return first + self.below(last - first + 1)

    def chance(self, parts: int, whole: int) -> bool:
        """Return True in `parts` of `whole` cases."""
        return self.below(whole) < parts

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], number: int) -> list[T]:
        """Draw `number` different options, or all if there are fewer, in random order."""
        pool = list(options)
        number = min(number, len(pool))
        for place in range(number):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:number]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Return all options in random order."""
        return self.sample(options, len(options))

    def bytes(self, *shape: int) -> np.ndarray:
        """Draw random uint8 values of a shape."""
        number = int(np.prod(shape))
        raw = self._bits.random_raw(-(-number // 8)).astype("<u8")
        return raw.view(np.uint8)[:number].reshape(shape)
