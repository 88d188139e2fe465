"""A LLaVA with a trained pruner as one module, for `Trainer` or a loop of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..methods.apply import llava_of
from ..model.configuration_ivtp import is_number
from .method import TrainedMethod

PARTS = ("language_model", "multi_modal_projector", "lm_head")
"""Parts of the base that can be trained together with the modules; towers choose or see, and stay frozen."""

_MISSING = object()


class PrunerTraining(nn.Module):
    """A model and the modules of a method that is applied to it, until it is released.

    Everything but the modules is frozen, and `train` says what else learns. `state_dict` holds what learns and nothing
    else, so that checkpoints of `Trainer` are small. All that this class lacks is looked up in the model.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration or LlavaForConditionalGeneration
        Or a PEFT model around one.
    method : TrainedMethod
        With modules.
    learns : sequence of str, optional
        Parts of the model that are trained too, of `PARTS`; default: those that the method's paper trains.

    Raises
    ------
    ValueError
        If the method does not fit the model, has no modules or drops nothing, or for an unknown part. The model is then
        as before.

    Examples
    --------
    >>> with PrunerTraining(model, method) as training:  # doctest: +SKIP
    ...     Trainer(model=training, args=args, train_dataset=data, callbacks=[training.callback()]).train()
    ...     method.save("folder")
    """

    def __init__(self, model: nn.Module, method: TrainedMethod, learns: Sequence[str] | None = None) -> None:
        super().__init__()
        learns = method.trains if learns is None else tuple(learns)
        if unknown := sorted(set(learns) - set(PARTS)):
            raise ValueError(f"learns={', '.join(unknown)}; allowed: {', '.join(PARTS)}.")
        self.method, self.learns = method, learns
        self._applied = ExitStack()
        self._applied.enter_context(method(model))
        try:
            method.check_trainable(llava_of(model).model.plan())
        except ValueError:
            self._applied.close()
            raise
        self._before = [(weight, weight.requires_grad) for weight in model.parameters()]
        self._use_cache = vars(model.config).get("use_cache", _MISSING)
        self.learned, self.model = method.modules_or_raise(), model
        model.requires_grad_(False)
        for part in learns:
            _part(model, part).requires_grad_(True)
        self.train(model.training)
        # As hooks, they also act where a parent's state is taken or loaded.
        self.register_state_dict_post_hook(_leave_frozen_out)
        self.register_load_state_dict_pre_hook(_expect_no_frozen)

    def __enter__(self) -> PrunerTraining:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Take the method off the model, unfreeze what was not frozen before, and set the modules to evaluation."""
        self._applied.close()
        for weight, before in self._before:
            weight.requires_grad_(before)
        # Trainer switches the cache off.
        config: Any = self.model.config
        if self._use_cache is _MISSING:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = self._use_cache
        self._before = []
        self.learned.eval()

    def __getattr__(self, name: str) -> Any:
        """Look a name up in the model, as PEFT's models do: `config`, `generate`, `gradient_checkpointing_enable`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # before there is one
                raise
            return getattr(self.model, name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        clip_input_ids: torch.Tensor | None = None,
        clip_spans: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; with `labels` in training mode, add the method's own loss to the language loss.

        Text that `labels` (B, S) do not ignore is an answer: the modules do not read it, for it is not there when they
        decide at inference.

        Returns
        -------
        LlavaCausalLMOutputWithPast
            `loss` is the sum in training mode, the language loss otherwise.

        Raises
        ------
        ValueError
            In training mode for a batch without pictures, or labels that are all ignored.
        """
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        inputs = tokens | {"pixel_values": pixel_values} | kwargs
        inputs |= {"clip_input_ids": clip_input_ids, "clip_spans": clip_spans}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if labels is None:
            with self.method.running(None):
                return self.model(**inputs)
        targets = self._targets(inputs)
        if self.training:
            self._check(inputs, targets)
        with self.method.running(labels == -100):
            outputs = self.model(**inputs)
        if self.training:
            outputs.loss = self.method.language_weight * outputs.loss + self._own_loss(targets, kwargs)
        return outputs

    def _targets(self, inputs: Mapping[str, Any]) -> int:
        """Count the labels that are learned: transformers never predicts a row's first token."""
        labels = inputs["labels"][:, 1:]
        learned = labels != -100
        if inputs.get("input_ids") is not None:
            learned = learned & (inputs["input_ids"][:, 1:] != self.config.image_token_id)
        return int(learned.sum())

    def _own_loss(self, targets: int, options: Mapping[str, Any]) -> torch.Tensor:
        """Return the method's loss; of several batches that make one step, each counts by its targets, as labels do."""
        loss, items = self.method.loss(), options.get("num_items_in_batch")
        return loss if items is None else loss * (targets / items)

    def _check(self, inputs: Mapping[str, Any], targets: int) -> None:
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.shape[0] == 0:
            shape = None if pixels is None else tuple(pixels.shape)
            raise ValueError(
                f"pixel_values={shape}: a batch without pictures trains no pruner; allowed: at least one picture in a "
                "batch."
            )
        if targets == 0:
            raise ValueError(
                f"labels of shape {tuple(inputs['labels'].shape)} hold nothing but -100 and image tokens; allowed: at "
                "least one target in a batch."
            )

    def parameter_groups(self, learned: float, base: float | None = None) -> list[dict[str, Any]]:
        """Return groups of parameters for an optimizer, with rates for the modules and for what learns of the base.

        Raises
        ------
        ValueError
            If a rate is no number above 0, or missing.
        """
        rates: dict[str, Any] = {"learned": learned} | ({"base": base} if self.learns or base is not None else {})
        for name, rate in rates.items():
            if not is_number(rate) or rate <= 0:
                raise ValueError(f"{name}={rate!r}; allowed: a learning rate above 0.")
        groups = [{"params": list(self.learned.parameters()), "lr": learned}]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return [*groups, {"params": weights, "lr": base}] if weights else groups

    def callback(self) -> TrainerCallback:
        """Return a callback that tells the method how much of the training is done, and logs what it measures."""
        return _Progress(self.method)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the modules into a folder; what else was trained is in the model, for its own `save_pretrained`."""
        self.method.save(folder, model=self.model if self.learns else None, overwrite=overwrite)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned: the state of the modules and of what learns of the model.

        Raises
        ------
        RuntimeError
            If `strict` and names are missing or unknown.
        """
        known = set(self.state_dict())
        if strict and known != set(state_dict):
            raise RuntimeError(f"Names that are missing or unknown: {', '.join(sorted(known ^ set(state_dict)))}.")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _is_frozen(training: nn.Module, prefix: str) -> Callable[[str], bool]:
    """Return a function that tells whether a name, after a prefix, is of the model and learns nothing."""
    model: Any = training.model
    names = {f"{prefix}model.{name}" for name, weight in model.named_parameters() if weight.requires_grad}
    return lambda name: name.startswith(f"{prefix}model.") and name not in names


def _leave_frozen_out(training: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep of the state what learns, and what is not of this module: a parent's state holds its other children's."""
    for name in list(filter(_is_frozen(training, prefix), state)):
        del state[name]


def _expect_no_frozen(
    training: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Let what is frozen be missing, also where a parent loads strictly; it keeps its values."""
    frozen = _is_frozen(training, prefix)
    unexpected += filter(frozen, state)
    model: Any = training.model
    own = model.state_dict(prefix=f"{prefix}model.", keep_vars=True)
    state.update({name: value for name, value in own.items() if frozen(name)})


class _Progress(TrainerCallback):
    def __init__(self, method: TrainedMethod) -> None:
        self.method = method

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.batch.progress = state.global_step / max(1, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.log_history:
            state.log_history[-1].update(self.method.measures())


def _part(model: nn.Module, name: str) -> nn.Module:
    """Find a part of a LLaVA, by the end of its name, below whatever wraps it."""
    return next(module for path, module in model.named_modules() if path.split(".")[-1] == name)
