"""What learns of a model, and the method that prunes it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..methods import METHODS, make
from ..trained import TRAINED, PrunerTraining, TrainedMethod, is_adapter, load

NAMES = {
    "connector": ("model.connector.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "pruner": (),
}
"""How the names of the parts' weights begin."""
UNPRUNED = "unpruned"
"""The name of the control: trained as long, with nothing pruned."""


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


def is_trained(method: str) -> bool:
    """Return whether a method has modules of its own: a name of one, or a folder with one."""
    return method in TRAINED or is_adapter(method)


def check_method(method: str, trains: Sequence[str]) -> None:
    """Refuse a name that is no method, and modules that it does not have."""
    if method not in (UNPRUNED, *METHODS) and not is_trained(method):
        raise ValueError(f"method={method!r}; allowed: {', '.join((UNPRUNED, *METHODS, *TRAINED))}, or a trained one.")
    if "pruner" in trains and not is_trained(method):
        raise ValueError(f"trains={list(trains)} with method={method!r}, which has no modules; allowed: {_names()}.")


def _names() -> str:
    return f"{', '.join(TRAINED)}, or a folder with one"


def trained_method(method: str, tokens: int | None, model: Any) -> TrainedMethod:
    """Return a trained method with its modules: new ones for this model, or those of a folder."""
    if not is_adapter(method):
        return TRAINED[method](64 if tokens is None else tokens).for_model(model)
    return load(method) if tokens is None else load(method, keep=tokens)


def pruned_by(model: Any, method: str, tokens: int | None) -> AbstractContextManager[Any]:
    """Return a context in which a method prunes a model.

    `"ivtp"` sets the model's own options for good, so that they are saved with what was trained under them; other
    methods leave no trace.

    Raises
    ------
    ValueError
        If the method or its budget does not fit the model.
    """
    if method == UNPRUNED or model.config.connector is not None:
        return model.pruning(enabled=False)
    if method != "ivtp":
        return make(method, 64 if tokens is None else tokens)(model)
    if tokens is not None:
        handed = model.pruning_config.tower_tokens
        model.set_pruning(enabled=True, visual_tokens=tokens, tower_tokens=handed if (handed or 0) >= tokens else None)
    return nullcontext()


@contextmanager
def training_module(model: Any, method: str, tokens: int | None, parts: Sequence[str]) -> Iterator[nn.Module]:
    """Apply a method and yield the module that `Trainer` trains: what learns of it has `requires_grad`.

    It is the model, or for a method with modules of its own a `PrunerTraining`, which holds both and adds its own loss.
    """
    if is_trained(method):
        learns = tuple(prefix.rstrip(".").split(".")[-1] for prefix in prefixes(parts) if "connector" not in prefix)
        with PrunerTraining(model, trained_method(method, tokens, model), learns) as training:
            yield training
        return
    let_learn(model, parts)
    with pruned_by(model, method, tokens):
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
