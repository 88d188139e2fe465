"""Random choices that are the same on every machine and with every NumPy.

NumPy promises the raw bits of PCG64 for good, but not what `Generator` makes of them; so the choices are made here, in
integers, from the raw bits.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """A stream of random choices.

    Args:
        key: non-negative integers; equal keys give equal streams, different ones independent streams.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._pool: list[int] = []

    def below(self, stop: int) -> int:
        """One of 0 … `stop` - 1."""
        if not self._pool:
            self._pool = (self._bits.random_raw(128) >> 32).tolist()
        return self._pool.pop() * stop >> 32

    def between(self, first: int, last: int) -> int:
        """One of `first` … `last`, both included."""
        return first + self.below(last - first + 1)

    def chance(self, parts: int, whole: int) -> bool:
        """True in `parts` of `whole` cases."""
        return self.below(whole) < parts

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], number: int) -> list[T]:
        """`number` different ones of the options (all, where there are fewer), in random order."""
        pool = list(options)
        number = min(number, len(pool))
        for place in range(number):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:number]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All options in random order."""
        return self.sample(options, len(options))

    def bytes(self, *shape: int) -> np.ndarray:
        """Random uint8 of a shape."""
        number = int(np.prod(shape))
        raw = self._bits.random_raw(-(-number // 8)).astype("<u8")
        return raw.view(np.uint8)[:number].reshape(shape)
