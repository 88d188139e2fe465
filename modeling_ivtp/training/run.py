"""A run from its options to the finished model, on transformers' `Trainer`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..checkpoints.sources import local_folder
from ..files.folder import system_errors
from ..model.placeholders import features_of_image
from ..trained import PrunerTraining
from .batches import Collator
from .data import Conversations, open_conversations
from .folder import RunFolder
from .loading import load_model, load_processor, planned_config
from .options import LOGS, Options
from .parts import linked_to_pictures, prefixes, training_module
from .plan import Plan, count_tokens, make_plan

_LINE_SECONDS = 30.0
_PARTIAL = ".model.partial"
_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""The variable by which accelerate's launcher tells its processes to share weights."""


@dataclass(frozen=True)
class Summary:
    """The result of a run, or of a dry run.

    Attributes
    ----------
    plan : Plan
    model : Path
        Folder of the trained model, or of the trained method whose modules alone learned.
    losses : tuple of float
        The log's losses, in order.
    held_out_loss : float or None
        The last one.
    main : bool
        Whether this is the process that speaks.
    was_finished : bool
        Whether the run was finished before.
    """

    plan: Plan
    model: Path
    losses: tuple[float, ...] = ()
    held_out_loss: float | None = None
    main: bool = True
    was_finished: bool = False


class LlavaTrainer(Trainer):
    """`Trainer` that takes batches without pictures."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does; see `linked_to_pictures`."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if inputs.get("pixel_values") is None and torch.is_grad_enabled():
            loss = linked_to_pictures(self.accelerator.unwrap_model(model), loss)
        return (loss, outputs) if return_outputs else loss


def train(options: Options, *, dry_run: bool = False) -> Summary:
    """Train, or go on with a run that was interrupted; the same options give the same losses.

    Everything that can be wrong is checked before the first byte is written.

    Parameters
    ----------
    options : Options
    dry_run : bool, default False
        Only count the run: no weight is read and nothing is written.

    Raises
    ------
    ValueError
        If data, method, connector, sizes or folder do not fit.
    OSError
        If a source is missing, or the disk is full.
    ImportError
        If `log_to` names a library that is not installed.
    """
    pruned_by = options.pruned_by
    pruned_by.check_parts(options.preset.trains)
    report_to = _reporting(options.log_to)
    _check_device(options.device)
    state = PartialState(cpu=options.device == "cpu")
    if not dry_run and state.num_processes == 1:
        _check_one_gpu(options.device)
    if pruned_by.is_trained:
        _check_whole_weights(options.method)
    folder, config = RunFolder(options.out), planned_config(options)
    processor = load_processor(options, config)
    rows = open_conversations(options.data, options.images, options.limit)
    rows.check_pictures(needed="language_model" not in options.preset.trains or pruned_by.is_trained)
    source = local_folder(options.model)
    settings = options.settings() | {
        "model": options.model if source is None else str(source.resolve()),
        "rows": rows.fingerprint(),
    }
    begun = folder.check(settings)
    learn, held_out = rows.split(options.evaluation_share, options.seed)
    shown, tokens = options.progress and state.is_main_process, None
    if dry_run or not begun:
        places, longest = features_of_image(config), options.preset.max_length
        tokens = count_tokens(processor, learn, places, longest, shown)
        if held_out is not None:  # for its checks: the plan counts what is learned
            count_tokens(processor, held_out, places, longest, shown)
    plan = make_plan(options, config, learn, held_out, tokens, state.num_processes)
    if not begun and not dry_run:
        folder.check(settings, plan.disk_bytes)
    alone = pruned_by.is_trained and not prefixes(options.preset.trains)
    result = folder.pruner if alone else folder.model
    if dry_run or result.is_dir():
        return Summary(plan, result, main=state.is_main_process, was_finished=not dry_run)
    model = load_model(options, config)
    # A method that does not fit is refused here, by its own checks, and nothing is written yet.
    with training_module(model, pruned_by, options.preset.trains) as module:
        if state.is_main_process:
            folder.begin(settings)
        state.wait_for_everyone()
        trainer = _trainer(module, processor, options, plan, learn, held_out, folder, report_to)
        checkpoint = folder.checkpoint(clean=state.is_main_process)
        state.wait_for_everyone()
        with system_errors(folder.path):
            trainer.train(resume_from_checkpoint=checkpoint)
        if isinstance(module, PrunerTraining) and state.is_main_process:
            module.save(folder.pruner, overwrite=True)
    model.config.text_config.use_cache = True
    if not alone:
        if trainer.model is not model:  # the method is released, and its modules are in a folder of their own
            trainer.model = model
        _save(trainer, processor, folder, state)
    history = trainer.state.log_history
    held = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return Summary(
        plan,
        result,
        losses=tuple(entry["loss"] for entry in history if "loss" in entry),
        held_out_loss=held[-1] if held else None,
        main=state.is_main_process,
    )


def _check_device(device: str | None) -> None:
    """Refuse a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda", but PyTorch finds no GPU here; allowed: cpu, or leave it out.')


def _check_one_gpu(device: str | None) -> None:
    """Refuse several GPUs for one process: `Trainer` would multiply the batch by their number and copy the model."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus > 1:
        raise ValueError(
            f"{gpus} GPUs and one process; allowed: one process a GPU, by accelerate launch --num_processes {gpus} "
            "-m modeling_ivtp.cli train ..., or one GPU, by CUDA_VISIBLE_DEVICES=0."
        )


def _check_whole_weights(method: str) -> None:
    """Refuse shared weights beside a trained method: what learned would have to be put together from all processes."""
    for name, variable in _SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"method={method!r} with {name}, which divides the weights among processes; allowed: processes that "
                "each hold the whole model (accelerate's multi-GPU), with dtype='bfloat16' for less memory, or a "
                "method without modules of its own."
            )


def _trainer(
    module: Any,
    processor: Any,
    options: Options,
    plan: Plan,
    learn: Conversations,
    held_out: Conversations | None,
    folder: RunFolder,
    report_to: list[str],
) -> Trainer:
    preset, on_cpu = options.preset, options.device == "cpu"
    bfloat16 = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    bar = options.progress and sys.stderr.isatty()
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        per_device_train_batch_size=plan.device_batch_size,
        per_device_eval_batch_size=plan.device_batch_size,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=preset.learning_rate,
        lr_scheduler_type=preset.scheduler,
        warmup_steps=preset.warmup_ratio,
        weight_decay=preset.weight_decay,
        max_grad_norm=preset.max_grad_norm,
        logging_steps=options.log_steps,
        logging_first_step=True,
        save_steps=options.save_steps,
        save_total_limit=1,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=None if held_out is None else options.save_steps,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        seed=options.seed,
        bf16=bfloat16,
        use_cpu=on_cpu,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        report_to=report_to,
        disable_tqdm=not bar,
    )
    own: dict[str, Any] = {"callbacks": [_Log(folder, lines=options.progress and not bar)]}
    if isinstance(module, PrunerTraining):
        own["callbacks"].insert(0, module.callback())  # the log holds what it measures
        if preset.pruner_learning_rate is not None:
            groups = module.parameter_groups(preset.pruner_learning_rate, preset.learning_rate)
            own["optimizers"] = torch.optim.AdamW(groups, weight_decay=preset.weight_decay), None
    trainer = LlavaTrainer(
        model=module,
        args=arguments,
        data_collator=Collator(processor, preset.max_length),
        train_dataset=learn,
        eval_dataset=held_out,
        processing_class=processor,
        **own,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Log(TrainerCallback):
    """Writes the log, and where there is no bar a line to standard error now and then."""

    def __init__(self, folder: RunFolder, lines: bool) -> None:
        self.folder, self.lines = folder, lines
        self.began = self.last = time.monotonic()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.folder.log(state.log_history)
        now, done = time.monotonic(), state.global_step - self.first
        if self.lines and done and logs and "loss" in logs and now - self.last >= _LINE_SECONDS:
            self.last, each = now, (now - self.began) / done
            left = (state.max_steps - state.global_step) * each / 60
            print(
                f"ivtp: step {state.global_step:,} of {state.max_steps:,}, loss {float(logs['loss']):.4f}, "
                f"{each:.3g} s a step, about {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )


def _save(trainer: Trainer, processor: Any, folder: RunFolder, state: PartialState) -> None:
    """Write the model; its folder appears when it is whole. All processes take part, for they may share the weights.

    Raises
    ------
    OSError
        If the disk is full, or `Trainer` wrote no weights: DeepSpeed keeps them in a format of its own if it is not to
        gather them.
    """
    partial = folder.path / _PARTIAL
    if trainer.is_fsdp_enabled:  # by default each process would keep its part, and nothing would be written
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if state.is_main_process and partial.exists():
        shutil.rmtree(partial)
    state.wait_for_everyone()
    try:
        with system_errors(folder.path):
            trainer.save_model(str(partial))
        if state.is_main_process:
            if not (partial / "config.json").is_file() or not list(partial.glob("*.safetensors")):
                raise OSError(
                    f"the weights were not put together, so {folder.model} was not written; with DeepSpeed, set "
                    "stage3_gather_16bit_weights_on_model_save and give the same command: it goes on from "
                    "the last checkpoint"
                )
            processor.save_pretrained(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)
            os.replace(partial, folder.model)
    except BaseException:
        if state.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    state.wait_for_everyone()


def _reporting(log_to: str) -> list[str]:
    """Return the libraries that the log goes to, beside its file.

    Raises
    ------
    ImportError
        If one is wanted that is not installed.
    """
    if log_to == "none":
        return []
    installed = [name for name in LOGS if find_spec(name) is not None]
    if log_to == "auto":
        return installed[:1]
    if log_to not in installed:
        raise ImportError(f"log_to={log_to} needs {log_to}: pip install {log_to}")
    return [log_to]
