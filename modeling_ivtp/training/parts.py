"""The parts of a model that learn, and the method that prunes it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from ..methods import METHODS, Method, make
from ..methods.names import OWN, UNPRUNED
from ..model.configuration_ivtp import IVTPPruningConfig
from ..model.placeholders import features_of_image
from ..model.pruner import IVTPPruner
from ..model.schedule import PruningPlan
from ..trained import TRAINED, PrunerTraining, TrainedMethod, is_adapter, load

NAMES = {
    "connector": ("model.connector.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "pruner": (),
}
"""Beginnings of the names of the parts' weights."""


def prefixes(parts: Sequence[str]) -> tuple[str, ...]:
    """Return how the names of the weights of some parts begin."""
    return tuple(prefix for part in parts for prefix in NAMES[part])


def let_learn(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Let some parts of a model learn and freeze all others.

    Returns
    -------
    list of str
        The names of what learns.

    Raises
    ------
    ValueError
        If the model has none of the parts.
    """
    learns = []
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(prefixes(parts)))
        if weight.requires_grad:
            learns.append(name)
    if not learns:
        raise ValueError(f"nothing of the model learns: it has no {', '.join(parts)}")
    return learns


@dataclass(frozen=True)
class PrunedBy:
    """The method that prunes while a model is trained.

    Attributes
    ----------
    method : str
        `"unpruned"`, `"ivtp"`, a method's name, a trained method's name (new modules) or its folder. A name wins over
        a folder of the same name, which is `"./lvpruning"`.
    tokens : int or None
        As in `Options`.
    options : mapping
        Options of the method.

    Raises
    ------
    ValueError
        For a name that is no method, or options of none.
    """

    method: str
    tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in (UNPRUNED, *METHODS) and not self.is_trained:
            names = ", ".join((UNPRUNED, *METHODS, *TRAINED))
            raise ValueError(f"method={self.method!r}; allowed: {names}, or a trained one's folder.")
        if self.method == UNPRUNED and self.options:
            raise ValueError(f"method={UNPRUNED!r} has no options; allowed: none of {', '.join(self.options)}.")

    @property
    def is_trained(self) -> bool:
        """Return whether the method has modules of its own."""
        return self.method in TRAINED or self.is_folder

    @property
    def is_folder(self) -> bool:
        """Return whether the method is the folder of a trained one."""
        return self.method not in (UNPRUNED, *TRAINED) and is_adapter(self.method)

    def check_parts(self, parts: Sequence[str]) -> None:
        """Refuse to train modules that the method does not have."""
        if "pruner" in parts and not self.is_trained:
            names = ", ".join(TRAINED)
            raise ValueError(
                f"trains={list(parts)} with method={self.method!r}, which has no modules; allowed: {names}, or the "
                "folder of one."
            )

    def check_connector(self, connector: Any) -> None:
        """Refuse a method, a budget or options beside a connector, which they would not change.

        Raises
        ------
        ValueError
            If one is given.
        """
        if connector is None:
            return
        given = [] if self.method in (UNPRUNED, OWN) else [f"method={self.method!r}"]
        given += [] if self.tokens is None else [f"tokens={self.tokens}"]
        given += [f"options={dict(self.options)}"] if self.options else []
        if given:
            raise ValueError(
                f"{', '.join(given)} with {connector}, which leaves no patches to choose among; allowed: "
                f"method={UNPRUNED!r} or 'ivtp', without tokens and options."
            )

    def make(self) -> Method:
        """Make the method, but for IVTP with the model's own options; a trained one made anew has no modules yet.

        Raises
        ------
        ValueError
            For an option that is unknown or out of range.
        """
        options, tokens = dict(self.options), self.tokens
        if "keep" in options:
            raise ValueError(f"{self.method} has no option keep here; allowed: --tokens {options['keep']}.")
        if self.is_folder:
            return load(self.method, **options | ({} if tokens is None else {"keep": tokens}))
        kind = TRAINED.get(self.method) or METHODS[self.method]
        if tokens is None and "keep" in kind.budgets and not any(options.get(name) for name in kind.budgets):
            tokens = 64
        if self.method in METHODS:
            return make(self.method, tokens, **options)
        known = [option.name for option in fields(kind) if option.init and option.compare and option.name != "keep"]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"{self.method} has no option {', '.join(unknown)}; allowed: {', '.join(known)}.")
        return kind(tokens, **options)

    def with_modules(self, model: Any) -> TrainedMethod:
        """Return a trained method with its modules: those of its folder, or new ones for a model."""
        method = self.make()
        assert isinstance(method, TrainedMethod)
        return method if method.learned is not None else method.for_model(model)

    def pruning(self, before: IVTPPruningConfig) -> IVTPPruningConfig:
        """Return the options that IVTP prunes with, from those that the model has."""
        changes: dict[str, Any] = {"enabled": True, **self.options}
        if self.tokens is not None:
            handed = before.tower_tokens
            changes = {"tower_tokens": handed if (handed or 0) >= self.tokens else None} | changes
            changes["visual_tokens"] = self.tokens
        return before.changed(**changes)

    def plan(self, config: Any) -> PruningPlan:
        """Lay out how many visual tokens of an image are where, from shapes alone.

        Raises
        ------
        ValueError
            If the method does not fit the model.
        """
        self.check_connector(config.connector)
        whole = PruningPlan(features_of_image(config))
        if self.method == UNPRUNED or config.connector is not None:
            return whole
        ours = self.method == "ivtp"
        pruner = IVTPPruner(self.pruning(config.pruning)) if ours else self.make().bind(config)
        plan = pruner.plan(config, config.num_patches)
        if isinstance(pruner, TrainedMethod):
            pruner.check_trainable(plan)
        return plan or whole

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which the method prunes a model.

        `"ivtp"` sets the model's own options for good, so that they are saved with what was trained under them; other
        methods leave no trace.

        Raises
        ------
        ValueError
            If the method or its budget does not fit the model.
        """
        self.check_connector(model.config.connector)
        if self.method == UNPRUNED or model.config.connector is not None:
            return model.pruning(enabled=False)
        if self.method != "ivtp":
            return self.make()(model)
        model.set_pruning(**self.pruning(model.pruning_config).to_dict())
        return nullcontext()


@contextmanager
def training_module(model: Any, pruned_by: PrunedBy, parts: Sequence[str]) -> Iterator[nn.Module]:
    """Apply a method and yield the module that `Trainer` trains: what learns of it has `requires_grad`.

    It is the model, or for a method with modules of its own a `PrunerTraining`, which holds both and adds its own loss.
    """
    if pruned_by.is_trained:
        learns = tuple(prefix.rstrip(".").split(".")[-1] for prefix in prefixes(parts) if "connector" not in prefix)
        with PrunerTraining(model, pruned_by.with_modules(model), learns) as training:
            yield training
        return
    let_learn(model, parts)
    with pruned_by.applied(model):
        yield model


def linked_to_pictures(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Add nothing to a loss, by way of what only pictures reach.

    A batch without pictures leaves projector and connector without gradients, which data-parallel training waits for.
    """
    names = prefixes(("connector", "projector"))
    weights = [weight for name, weight in model.named_parameters() if weight.requires_grad and name.startswith(names)]
    for weight in weights:
        loss = loss + 0.0 * weight.sum()
    return loss
