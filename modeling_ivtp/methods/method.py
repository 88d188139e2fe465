"""What all comparison systems share: options, and how a system is applied to a model for a while."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..pruning_policy import Policy
from ..token_budget import Group, PruningPlan


@dataclass(frozen=True)
class Method(Policy):
    """A pruning system. Called with a model it is a context manager, inside of which it prunes, and nothing else does.

    Parameters
    ----------
    keep : int
        Visual tokens of one image that are left in the end. A number that is not below what there is keeps all.
    positions : {"original", "compact"}, default "original"
        Whether kept tokens keep their RoPE positions or are renumbered without gaps.

    Raises
    ------
    ValueError
        For an option out of range.

    Examples
    --------
    >>> with FastV(keep=64)(model):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    keep: int
    positions: str = field(default="original", kw_only=True)

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    """At which of the moments of `pruning_policy.STAGES` it acts."""

    def __post_init__(self) -> None:
        self.check_whole("keep", 1)
        if self.positions not in ("original", "compact"):
            raise ValueError(f"{self.name}: positions={self.positions!r}; allowed: original, compact.")

    def __call__(self, model: Any) -> AbstractContextManager[Any]:
        """Apply the system to an IVTP or a stock LLaVA for a while; see `apply.applied`."""
        from .apply import applied

        return applied(model, self)

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether positions are renumbered without gaps."""
        return self.positions == "compact"

    def bind(self, config: Any) -> Policy:
        """The policy for one model: defaults that depend on its depth are filled in."""
        return self

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """What stays where; None where `keep` is not below `patches`."""
        plan = self.layout(config, patches) if self.keep < patches else None
        return None if plan is None or plan.final_tokens >= patches else plan

    def layout(self, config: Any, patches: int) -> PruningPlan:
        """What stays where for a budget below `patches`."""
        raise self._silent("lays out what stays where")

    def check_whole(self, option: str, least: int, most: int | None = None, optional: bool = False) -> None:
        """Refuse an option that is not a whole number in its range."""
        value = getattr(self, option)
        if value is None and optional:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            span = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
            raise ValueError(f"{self.name}: {option}={value!r}; allowed: {span}{' or None' if optional else ''}.")

    def check_share(self, option: str, optional: bool = False) -> None:
        """Refuse an option that is not between 0 and 1."""
        value = getattr(self, option)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{self.name}: {option}={value!r}; allowed: from 0 to 1{' or None' if optional else ''}.")

    def tops(self, config: Any, default: tuple[int, ...]) -> tuple[int, ...]:
        """The decoder layers behind which a system of several steps drops: its `layers`, or a default for 32 layers.

        Raises
        ------
        ValueError
            If they are not there or not ascending.
        """
        depth = config.text_config.num_hidden_layers
        numbers: tuple[int, ...] | None = vars(self)["layers"]
        tops = tuple(number - 1 for number in numbers or scaled_layers(default, 32, depth))
        self.check_layers(tops, depth)
        return tops

    def check_layers(self, layers: tuple[int, ...], there: int) -> None:
        """Refuse decoder layers that are not there or not ascending."""
        if any(not 0 <= layer < there for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(
                f"{self.name}: layers={layers}; allowed: ascending layers from 0 to {there - 1} of this decoder."
            )


def linear_schedule(start: int, end: int, steps: int) -> tuple[int, ...]:
    """Counts after each of `steps` equal steps down from `start` to `end`.

    Examples
    --------
    >>> linear_schedule(10, 4, 3)
    (8, 6, 4)
    """
    return tuple(round(start + (end - start) * step / steps) for step in range(1, steps + 1))


def behind(layers: Sequence[int], counts: Sequence[int], *, middle: bool = False) -> tuple[Group, ...]:
    """Groups of one layer each, with what stays behind it."""
    return tuple(Group(layer, layer, count, middle) for layer, count in zip(layers, counts, strict=True))


def single_layers(counts: tuple[int, ...], *, middle: bool = False) -> tuple[Group, ...]:
    """A group of one layer for each count, from the first layer on."""
    return behind(range(len(counts)), counts, middle=middle)


def scaled_layers(layers: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Numbers of layers, of a decoder of `of` of them, at the same share of another's depth; at least one.

    Examples
    --------
    >>> scaled_layers((8, 16, 24), 32, 40)
    (10, 20, 30)
    """
    return tuple(dict.fromkeys(max(1, round(layer * depth / of)) for layer in layers))
