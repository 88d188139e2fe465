"""Counts of the tokens that a method keeps of each picture, where it adapts the number to the picture."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from modeling_ivtp.model.pruner import Choice, DecoderStep, FeatureStep, Pruner, PrunerWrapper
from modeling_ivtp.model.schedule import PruningPlan

FEATURES = "features"
"""The name of the choice before the decoder; one in the decoder is named by the number of the layer it follows."""

Kept = dict[str, list[int]]
"""For each choice that may differ between pictures, the tokens that stay of each of them."""


class Counting(PrunerWrapper):
    """A pruner that notes how many tokens another one keeps of each picture; every row has one picture."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner)
        self.kept: Kept = defaultdict(list)

    def in_features(self, step: FeatureStep) -> Choice:
        """Ask the wrapped pruner."""
        return self._noted(FEATURES, super().in_features(step), step.patches.shape[1])

    def in_decoder(self, step: DecoderStep) -> Choice:
        """Ask the wrapped pruner."""
        return self._noted(str(step.group.last), super().in_decoder(step), step.sequence.patches.shape[2])

    def _noted(self, name: str, choice: Choice, tokens: int) -> Choice:
        if choice.ragged:
            self.kept[name] += (choice.kept < tokens).flatten(1).sum(1).tolist()
        return choice


@contextmanager
def counting(model: Any) -> Iterator[Kept]:
    """Note what a model's pruner keeps of each picture, if it adapts the number."""
    inner = model.model
    plan = inner.plan()
    if plan is None or plan.exact:
        yield {}
        return
    before = vars(inner).get("applied_pruner")
    inner.applied_pruner = watching = Counting(inner.pruner)
    try:
        yield watching.kept
    finally:
        if before is None:
            del inner.applied_pruner
        else:
            inner.applied_pruner = before


def joined(parts: Sequence[Kept]) -> Kept:
    """Return the counts of all batches, in their order."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [count for part in parts for count in part[name]] for name in names}


def decoder_tokens(plan: PruningPlan, layers: int, kept: Mapping[str, Sequence[int]]) -> list[Any]:
    """Return the visual tokens that each decoder layer gets: an int, or an array with one for each picture."""
    if plan.ahead:
        return _chosen_along(plan, layers + 1, kept)[-1:] * layers
    return _chosen_along(plan, layers, kept)


def ahead_tokens(plan: PruningPlan, kept: Mapping[str, Sequence[int]]) -> list[Any]:
    """Return what each layer of the pass ahead of the decoder gets, as `decoder_tokens` does; nothing without one."""
    return _chosen_along(plan, plan.decoder[-1].last + 1, kept) if plan.ahead and plan.decoder else []


def _chosen_along(plan: PruningPlan, layers: int, kept: Mapping[str, Sequence[int]]) -> list[Any]:
    tokens: Any = np.array(kept[FEATURES]) if FEATURES in kept else plan.tower_tokens
    counts: list[Any] = []
    for group in plan.decoder:
        counts += [tokens] * (group.last + 1 - len(counts))
        tokens = np.array(kept[str(group.last)]) if str(group.last) in kept else np.minimum(tokens, group.keep)
    return counts + [tokens] * (layers - len(counts))


def as_counted(tokens: Any) -> int | float:
    """Return one number for all pictures: their own if it is the same, otherwise the mean."""
    mean = float(np.mean(tokens))
    return int(mean) if mean.is_integer() else mean
