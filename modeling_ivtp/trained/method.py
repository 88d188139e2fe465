"""The base class of trained methods: a method of `modeling_ivtp.methods`, and the modules that decide for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from ..methods import Method
from ..methods.selecting import text_tokens
from ..model.pruner import DecoderStep, Needs
from ..model.schedule import Group, PruningPlan
from ..model.visual_sequence import VisualSequence
from . import adapter

ATrained = TypeVar("ATrained", bound="TrainedMethod")


def summed_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes that train together, with its gradient; one process alone keeps its own."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total: torch.Tensor = all_reduce(value)
    return total


@dataclass(frozen=True)
class Weighed:
    """The weights that one module gave to a batch in training.

    Attributes
    ----------
    group : Group
        The layers after which it stands.
    weights : Tensor (B, M, k)
        Of the visual tokens from here on, with a gradient.
    present : bool Tensor (B, M, k)
        Which of them exist.
    """

    group: Group
    weights: torch.Tensor
    present: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Return how many tokens of each image are left: (I,), images in their order."""
        return self.weights.masked_fill(~self.present, 0).sum(-1)[self.present.any(-1)]


@dataclass
class Batch:
    """The batch that a model runs on, as far as a method knows it.

    Attributes
    ----------
    prompt : bool Tensor (B, S) or None
        Which columns are words of prompts, without the answers that are to be learned. None: all are.
    weighed : list of Weighed
        Of each module, lowest first.
    scores : list of Tensor (B, M, k)
        What the modules decided by, where the loss needs it.
    progress : float
        How much of the training is done, from 0 to 1.
    """

    prompt: torch.Tensor | None = None
    weighed: list[Weighed] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    progress: float = 0.0


@dataclass(frozen=True)
class TrainedMethod(Method):
    """A method with modules that decide which tokens stay.

    In training mode (of the modules) tokens are weighted and none is dropped; otherwise the engine drops them. The
    base's weights are never changed by applying the method, only by training them.

    Parameters
    ----------
    language_weight : float, default 1.0
        Of the language loss, beside the method's own.
    learned : Module, optional
        The modules; `for_model` makes new ones, `load` reads them.
    base : mapping, optional
        The model that they fit, from `adapter.describe_base`.
    """

    language_weight: float = field(default=1.0, kw_only=True)
    learned: nn.Module | None = field(default=None, kw_only=True, repr=False, compare=False)
    base: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False, compare=False)
    batch: Batch = field(default_factory=Batch, init=False, repr=False, compare=False)

    stages: ClassVar[tuple[str, ...]] = ("decoder",)
    paper: ClassVar[str]
    """Its paper, as cards cite it."""
    trains: ClassVar[tuple[str, ...]] = ()
    """Parts of the base that its paper trains together with the modules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weight("language_weight")

    def __call__(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which this method prunes a model.

        Raises
        ------
        ValueError
            If the modules were made for another model, or there are none.
        """
        self.modules_or_raise()
        if self.base is not None:
            adapter.check_base(self.name, self.base, model)
        return super().__call__(model)

    @property
    def needs(self) -> Needs:
        """Ask for what any method needs; in training mode tokens are weighted."""
        return replace(super().needs, weights=self.learned is not None and self.learned.training)

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        """Make new modules for a base, from its description."""
        raise self._missing("builds modules")

    def module_flops(self, visual: int, text: int) -> int:
        """Count the products of one module, for an image of `visual` tokens and a prompt of `text` tokens."""
        raise self._missing("counts FLOPs")

    def mask(self, step: DecoderStep) -> torch.Tensor:
        """Decide with a gradient what one module leaves of the visual tokens: (B, M, k), from 0 to 1."""
        raise self._missing("masks")

    def loss(self) -> torch.Tensor:
        """Return the method's own loss, weighted, of the batch that was run last: a scalar."""
        raise self._missing("has a loss")

    def measures(self) -> dict[str, float]:
        """Return what is worth logging of the batch that was run last, by name."""
        return {}

    def for_model(self: ATrained, model: Any) -> ATrained:
        """Return the method with new, untrained modules for a model, on its device, in float32 and evaluation mode.

        Raises
        ------
        ValueError
            If the method does not fit the model.
        """
        base = adapter.describe_base(model)
        return self.with_modules(self.build(base).to(next(model.parameters()).device), base)

    def with_modules(self: ATrained, learned: nn.Module, base: Mapping[str, Any]) -> ATrained:
        """Return the method with these modules, in evaluation mode."""
        return replace(self, learned=learned.eval(), base=base)

    def changed(self: ATrained, **options: Any) -> ATrained:
        """Return the method with other options and the same modules; a budget replaces the former one."""
        if any(options.get(budget) is not None for budget in self.budgets):
            options = dict.fromkeys(self.budgets) | options
        return replace(self, **options)

    def save(self, folder: str | os.PathLike[str], *, model: Any = None, overwrite: bool = False) -> None:
        """Write options and modules into a folder; see `adapter.save`.

        Parameters
        ----------
        folder : str or path
        model : model, optional
            The base as it is now, if it was trained together with the modules; they then fit no other.
        overwrite : bool, default False
            Replace a folder that holds something.
        """
        method = self if model is None else replace(self, base=adapter.describe_base(model, trained=True))
        adapter.save(method, folder, overwrite=overwrite)

    def modules_or_raise(self) -> nn.Module:
        """Return the modules.

        Raises
        ------
        ValueError
            If there are none yet.
        """
        if self.learned is None:
            raise ValueError(
                f"{self.name} has no modules: make them with for_model(model), or read trained ones with "
                "modeling_ivtp.trained.load(folder)."
            )
        return self.learned

    @contextmanager
    def running(self, prompt: torch.Tensor | None) -> Iterator[Batch]:
        """Tell the method for one forward which columns are words of prompts (bool (B, S))."""
        self.batch.prompt, self.batch.weighed, self.batch.scores = prompt, [], []
        try:
            yield self.batch
        finally:
            self.batch.prompt = None

    def check_trainable(self, plan: PruningPlan | None) -> None:
        """Refuse a plan of the model under this method in which no module is asked.

        Raises
        ------
        ValueError
            If all visual tokens stay.
        """
        if plan is None or not plan.decoder:
            options = ", ".join(f"{name}={value}" for name, value in adapter.options_of(self).items())
            raise ValueError(
                f"{self.name}: {options} leaves all visual tokens, so its modules would learn nothing; allowed: a "
                "budget that drops some."
            )

    def prompt_text(self, sequence: VisualSequence, answers: bool = False) -> torch.Tensor:
        """Mark the columns that are words of a prompt, or also of `answers` that are to be learned: bool (B, n)."""
        text = text_tokens(sequence, answers) & (
            torch.arange(sequence.size, device=sequence.columns.device) < sequence.prompt_end
        )
        if self.batch.prompt is None or answers:
            return text
        return text & sequence.at_slots(self.batch.prompt.to(text.device))

    def readers_of(self, sequence: VisualSequence) -> torch.Tensor:
        """Mark the words after each image; after one that ends its prompt, the last token reads: bool (B, M, n)."""
        column = torch.arange(sequence.size, device=sequence.columns.device)
        last = sequence.columns.masked_fill(~sequence.token_present, -1).amax(-1, keepdim=True)
        words = self.prompt_text(sequence)
        after = words[:, None] & (column > last)
        end = (words * column).amax(-1)[:, None, None].maximum(last)
        return after | (~after.any(-1, keepdim=True) & (column == end))

    def weigh(self, step: DecoderStep) -> torch.Tensor:
        """Multiply what earlier modules left with what this one decides (LVPruning Eq. 10)."""
        own = self.mask(step)
        weights = own if step.weights is None else step.weights.to(own.device) * own
        self.batch.weighed.append(Weighed(step.group, weights, step.sequence.token_present.to(weights.device)))
        return weights
