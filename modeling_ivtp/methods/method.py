"""The base class of all methods: their options, how many tokens stay where, and how one is applied to a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from .._moved import accept_old_pruner, old_names
from ..model.configuration_ivtp import is_number, is_weight, is_whole
from ..model.pruner import Needs, Pruner
from ..model.schedule import Group, PruningPlan

AMethod = TypeVar("AMethod", bound="Method")


@dataclass(frozen=True)
class Method(Pruner):
    """A published pruning method. Called with a model, it returns a context in which it alone prunes this model.

    Parameters
    ----------
    keep : int, optional
        Visual tokens of one image that are left in the end. A number of all patches or more keeps all.
    positions : {"original", "compact"}, default "original"
        Whether kept tokens keep their RoPE positions or are renumbered without gaps.
    average : float, optional
        In place of `keep`: visual tokens of one image per decoder layer, averaged over all layers. The method's
        schedule is scaled to the final number that comes nearest.

    Raises
    ------
    ValueError
        For an option out of range, or unless exactly one budget is given.

    Examples
    --------
    >>> with FastV(keep=64)(model):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    keep: Any = None  # an int wherever `schedule` is asked
    positions: str = field(default="original", kw_only=True)
    average: float | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    requires: ClassVar[Needs] = Needs()
    stages: ClassVar[tuple[str, ...]]
    """The steps of `pruner.STAGES` at which it acts."""
    budgets: ClassVar[tuple[str, ...]] = ("keep", "average")
    """The options of which exactly one is given."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        accept_old_pruner(cls)

    def __post_init__(self) -> None:
        self._check_budget()
        if "layers" in vars(self):
            self._check_layers_option()
        if self.positions not in ("original", "compact"):
            raise ValueError(f"{self.name}: positions={self.positions!r}; allowed: original, compact.")

    def __call__(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which this method prunes an IVTP or a stock LLaVA; see `apply.applied`."""
        from .apply import applied

        return applied(model, self)

    @property
    def needs(self) -> Needs:
        """The needs of the class, and renumbered positions if this object's options say so."""
        return replace(self.requires, compact_positions=self.positions == "compact")

    def bind(self, config: Any) -> Pruner:
        """Return the pruner for one model, with defaults that depend on its depth filled in."""
        return self

    def plan(self, config: Any, patches: int) -> PruningPlan | None:
        """Plan how many tokens stay after each step; None if the budget is not below `patches`."""
        keep = self.final_tokens(config, patches)
        plan = self.at(keep).schedule(config, patches) if keep < patches else None
        return plan if plan is not None and plan.drops else None

    def schedule(self, config: Any, patches: int) -> PruningPlan:
        """Plan how many tokens stay after each step, for a `keep` below `patches`."""
        raise self._missing("plans")

    def at(self: AMethod, keep: int) -> AMethod:
        """Return the method with this `keep`, whatever its budget."""
        method = copy(self)
        object.__setattr__(method, "keep", keep)
        return method

    def final_tokens(self, config: Any, patches: int) -> int:
        """Return the number of tokens in the end: `keep`, or the one that comes nearest to `average`.

        Raises
        ------
        ValueError
            If `average` cannot be reached.
        """
        if self.average is None:
            return self.keep
        if self.average >= patches:
            return patches
        text, vision = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
        key = patches, text, vision, config.feature_depth, config.grid, config.pruning
        found: dict[Any, int] = vars(self)["_found"]
        if key not in found:
            found[key] = self._nearest(config, patches, self.average)
        return found[key]

    def _nearest(self, config: Any, patches: int, average: float) -> int:
        """Find the final number whose schedule has the layer average that is nearest to this one."""
        averages, reason = {patches: float(patches)}, None
        for keep in range(1, patches):
            try:
                plan = self.at(keep).schedule(config, patches)
            except ValueError as error:  # some methods cannot have every number
                reason = error
                continue
            averages[keep] = plan.layer_average(config.text_config.num_hidden_layers)
        if len(averages) == 1 and reason is not None:
            raise reason
        if average < (least := min(averages.values())):
            raise ValueError(f"{self.name}: average={average} cannot be reached; allowed: at least {least:.1f}.")
        return min(averages, key=lambda keep: abs(averages[keep] - average))

    def tops(self, config: Any, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return the decoder layers (0-based) after which tokens are dropped: `layers`, or a default for 32 layers.

        Raises
        ------
        ValueError
            If the decoder does not have them.
        """
        depth = config.text_config.num_hidden_layers
        numbers: tuple[int, ...] = vars(self)["layers"] or scaled_layers(default, 32, depth)
        self.check_depth("layers", numbers, depth)
        return tuple(number - 1 for number in numbers)

    def tower_layer(self, option: str, default: int, config: Any) -> int:
        """Return the number of a tower layer, from 1 on: the option's, or a default for 24 layers.

        Raises
        ------
        ValueError
            If the tower does not have it.
        """
        depth = config.vision_config.num_hidden_layers
        number: int = vars(self)[option] or scaled_layers((default,), 24, depth)[0]
        if number > depth:
            raise ValueError(f"{self.name}: {option}={number}; allowed: 1 to {depth}, the layers of this tower.")
        return number

    def check_depth(self, option: str, numbers: tuple[int, ...], depth: int) -> None:
        """Refuse numbers of layers that a decoder of this depth does not have."""
        if max(numbers) > depth:
            value = vars(self)[option] or numbers
            raise ValueError(f"{self.name}: {option}={value}; allowed: 1 to {depth}, the layers of this decoder.")

    def check_whole(self, option: str, least: int, most: int | None = None, optional: bool = False) -> None:
        """Refuse an option that is not a whole number in its range."""
        value = getattr(self, option)
        if value is None and optional:
            return
        if not is_whole(value) or value < least or (most is not None and value > most):
            span = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
            raise ValueError(f"{self.name}: {option}={value!r}; allowed: {span}{' or None' if optional else ''}.")
        object.__setattr__(self, option, int(value))

    def check_flag(self, option: str) -> None:
        """Refuse an option that is neither True nor False."""
        if not isinstance(getattr(self, option), bool):
            raise ValueError(f"{self.name}: {option}={getattr(self, option)!r}; allowed: True, False.")

    def check_share(self, option: str, optional: bool = False) -> None:
        """Refuse an option that is not between 0 and 1."""
        value = getattr(self, option)
        if value is None and optional:
            return
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{self.name}: {option}={value!r}; allowed: from 0 to 1{' or None' if optional else ''}.")

    def check_weight(self, option: str, optional: bool = False) -> None:
        """Refuse an option that is not a finite number of at least 0."""
        value = getattr(self, option)
        if not (value is None and optional) and not is_weight(value):
            or_none = " or None" if optional else ""
            raise ValueError(f"{self.name}: {option}={value!r}; allowed: a number of at least 0{or_none}.")

    def _check_budget(self) -> None:
        values = {name: getattr(self, name) for name in self.budgets if getattr(self, name) is not None}
        if len(values) != 1:
            listed = ", ".join(f"{name}={value!r}" for name, value in values.items()) or "no budget"
            raise ValueError(f"{self.name}: {listed}; give one of {', '.join(self.budgets)}.")
        self.check_whole("keep", 1, optional=True)
        if self.average is not None and not (is_number(self.average) and self.average >= 1):
            raise ValueError(f"{self.name}: average={self.average!r}; allowed: a number of at least 1.")
        object.__setattr__(self, "_found", {})

    def _check_layers_option(self) -> None:
        layers: Any = vars(self)["layers"]
        if layers is None:
            return
        numbers = isinstance(layers, (tuple, list)) and all(is_whole(layer) and layer >= 1 for layer in layers)
        if not numbers or not layers or list(layers) != sorted(set(layers)):
            raise ValueError(
                f"{self.name}: layers={layers!r}; allowed: ascending numbers from 1 on, such as (8, 16), or None."
            )
        object.__setattr__(self, "layers", tuple(int(layer) for layer in layers))


def linear_schedule(start: int, end: int, steps: int) -> tuple[int, ...]:
    """Return the counts after each of `steps` equal steps down from `start` to `end`.

    Examples
    --------
    >>> linear_schedule(10, 4, 3)
    (8, 6, 4)
    """
    return tuple(round(start + (end - start) * step / steps) for step in range(1, steps + 1))


def groups_after(layers: Sequence[int], counts: Sequence[int], *, middle: bool = False) -> tuple[Group, ...]:
    """Return groups of one layer each, with the number of tokens that stay after it."""
    return tuple(Group(layer, layer, count, middle) for layer, count in zip(layers, counts, strict=True))


def single_layers(counts: tuple[int, ...], *, middle: bool = False) -> tuple[Group, ...]:
    """Return a group of one layer for each count, from the first layer on."""
    return groups_after(range(len(counts)), counts, middle=middle)


def scaled_layers(layers: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Scale numbers of layers from a decoder of `of` layers to another depth, to 1 at least.

    Examples
    --------
    >>> scaled_layers((8, 16, 24), 32, 40)
    (10, 20, 30)
    """
    return tuple(dict.fromkeys(max(1, round(layer * depth / of)) for layer in layers))


__getattr__ = old_names(__name__)
