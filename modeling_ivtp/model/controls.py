"""What a user turns and sees: pruning options of a loaded model, and the explanation of one prompt."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .compat import cache_of, one_cache
from .configuration_ivtp import IVTPPruningConfig
from .trace import PruningTrace, TraceRecorder


class PruningOptions:
    """Mixin for every model: options that change."""

    config: Any

    @property
    def pruning_config(self) -> IVTPPruningConfig:
        """The options in force."""
        return self.config.pruning

    def set_pruning(self, **options: Any) -> None:
        """Change pruning options for good; `save_pretrained` keeps them.

        Raises
        ------
        ValueError
            For an option that is unknown, out of range, or does not fit this model. Nothing changes then.
        """
        before = self.config.pruning
        self._use_pruning(before.changed(**options))

    @contextmanager
    def pruning(self, **options: Any) -> Iterator[None]:
        """Change pruning options for a while; nests, and is undone when left by an exception, too.

        The options belong to the model, not to the thread: a model that several threads share needs a lock around this.

        Examples
        --------
        >>> with model.pruning(enabled=False):  # doctest: +SKIP
        ...     stock = model.generate(**inputs)
        """
        before = self.config.pruning
        self._use_pruning(before.changed(**options))
        try:
            yield
        finally:
            self._use_pruning(before)

    def _use_pruning(self, pruning: IVTPPruningConfig) -> None:
        before = self.config.pruning
        if getattr(getattr(self, "model", self), "applied_pruner", None) is not None:
            raise ValueError(
                "Another system prunes this model, and its own options have no say: leave that system's `with` block."
            )
        self.config.pruning = pruning
        try:
            self.config.pruning_plan()
        except ValueError:
            self.config.pruning = before
            raise


class PruningControls(PruningOptions):
    """Mixin for the class that users load: options, and what they do to a prompt."""

    @torch.no_grad()
    def explain(self, processor: Any = None, **inputs: Any) -> PruningTrace:
        """Show what is kept of each image for a prompt, and why.

        Parameters
        ----------
        processor : processor or tokenizer, optional
            Puts the instruction's tokens into words. Default: the one saved next to this checkpoint, if it is on disk.
        **inputs
            What `generate` takes: `input_ids`, `pixel_values`, … A cache of earlier turns is read and left as it is.

        Returns
        -------
        PruningTrace

        Raises
        ------
        ValueError
            If there is no image, or pruning is off.
        """
        if isinstance(processor, Mapping):
            processor, inputs = None, {**processor, **inputs}
        model: Any = self
        if model.model.plan() is None:
            options, patches = self.config.pruning, self.config.num_patches
            asked = (
                f"visual_tokens={options.visual_tokens}" if model.model.applied_pruner is None else "the system applied"
            )
            why = f"{asked} keeps all {patches} patches; allowed: 1 to {patches - 1}"
            raise ValueError(f"Nothing to explain: {why if options.enabled else 'pruning is off (enabled=False)'}")
        if inputs.get("pixel_values") is None:
            raise ValueError("Nothing to explain: the inputs hold no image (pixel_values).")
        recorder = TraceRecorder(processor)
        fixed: dict[str, Any] = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}
        earlier = one_cache(inputs.pop("cache", None), inputs.pop("past_key_values", None))
        if earlier is not None:
            fixed["cache"] = copy.deepcopy(earlier)
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            outputs = model(**inputs | fixed, recorder=recorder)
        finally:
            for module in training:
                module.training = True
        return recorder.trace(model, cache_of(outputs))
