"""Answer batches with the model; a failure costs as few rows as possible."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image

from ..files.console import quiet
from ..files.images import load_image, shortened
from ..model.placeholders import features_of_image
from ..serving.answering import as_prompt
from .answers import Answered
from .budget import Task
from .data import Row
from .tables import is_text

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The inputs of a batch, still on the CPU.

    Attributes
    ----------
    tasks : list of Task
        The tasks whose pictures could be read.
    inputs : BatchFeature or None
        The processor's output, padded on the left; None if no task is left.
    failed : list of Answered
        The other tasks, as errors.
    """

    tasks: list[Task]
    inputs: Any
    failed: list[Answered]


class Asker:
    """Turns rows into tasks, and answers tasks greedily.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    max_new_tokens : int
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self._model, self._processor, self._new = model, processor, max_new_tokens
        # A tokenizer that pads in one thread refuses to work in another; this one counts and decodes.
        self._reader = copy.deepcopy(processor.tokenizer)
        self._too_large: float = float("inf")

    def tasks(self, rows: Sequence[Row]) -> tuple[list[Task], list[Answered]]:
        """Return rows as tasks, and as errors those whose prompt or column of pictures is wrong."""
        sound, prompts, failed = [], [], []
        for row in rows:
            try:
                prompts.append(self._prompt(row))
                sound.append(row)
            except ValueError as error:
                failed.append(failure(row, str(error)))
        if not sound:
            return [], failed
        places = features_of_image(self._model.config)
        encoded = self._reader(prompts, verbose=False)["input_ids"]
        room = self._model.config.text_config.max_position_embeddings
        tasks = []
        for row, prompt, ids in zip(sound, prompts, encoded, strict=True):
            length = len(ids) + (places - 1) * len(row.images)
            if length + self._new > room:
                message = f"{length} tokens and {self._new} of the answer; the model was made for {room}"
                failed.append(failure(row, message))
            else:
                tasks.append(Task(row, prompt, length))
        return tasks, failed

    def _prompt(self, row: Row) -> str:
        if row.problem is not None:
            raise ValueError(row.problem)
        if row.question is None:
            raise ValueError("the prompt is missing")
        if not isinstance(row.question, str):
            raise ValueError(
                f"the prompt is no text, but {type(row.question).__name__} {shortened(repr(row.question))}"
            )
        if not is_text(row.question):
            raise ValueError(f"the prompt holds half of a character: {shortened(repr(row.question))}")
        return as_prompt(self._processor, row.question, len(row.images))

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Read the pictures of a batch and compute its inputs; may run in another thread than `answer`."""
        ready, pictures, failed = [], [], []
        for task in tasks:
            try:
                pictures += self.pictures(task)
                ready.append(task)
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(failure(task.row, error_text(error)))
        inputs = None
        if ready:
            inputs = self._processor(
                images=pictures or None,
                text=[task.prompt for task in ready],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        return Prepared(ready, inputs, failed)

    def pictures(self, task: Task) -> list[Image.Image]:
        """Read the pictures of a row, no larger than the model sees them: a batch of photographs would be gigabytes."""
        sources = (image if isinstance(image, str) else image.read() for image in task.row.images)
        return [self._processor.as_seen(load_image(source)) for source in sources]

    def answer(self, tasks: Sequence[Task], prepared: Callable[[], Prepared] | None = None) -> list[Answered]:
        """Answer a batch.

        If memory runs out, the batch is halved, down to a single row. After any other failure, its rows are answered
        one by one. A failure with a single row is that row's error.

        Parameters
        ----------
        tasks : sequence of Task
        prepared : callable, optional
            Returns the result of `prepare` for these tasks, or raises its error. Default: `prepare` is called.

        Raises
        ------
        torch.AcceleratorError
            If the device itself fails; later answers could not be trusted.
        """
        size = len(tasks) * max(task.tokens for task in tasks)
        if len(tasks) == 1 or size < self._too_large:
            try:
                return self._answered(self.prepare(tasks) if prepared is None else prepared())
            except Exception as error:
                full = out_of_memory(error)
                if not full and isinstance(error, torch.AcceleratorError):
                    raise
                message = "out of memory, with this row alone" if full else error_text(error)
            # Python has dropped the error here, and with it the tensors that its frames held.
            if full:
                clear_device_cache(garbage_collection=True)
            if len(tasks) == 1:
                return [failure(tasks[0].row, message)]
            if not full:
                return [answered for task in tasks for answered in self.answer([task])]
            self._too_large = min(self._too_large, size)
            _LOG.warning(
                "out of memory with %d rows of up to %d tokens; going on with %d",
                len(tasks),
                max(task.tokens for task in tasks),
                -(-len(tasks) // 2),
            )
        middle = -(-len(tasks) // 2)
        return [*self.answer(tasks[:middle]), *self.answer(tasks[middle:])]

    @torch.inference_mode()
    def _answered(self, prepared: Prepared) -> list[Answered]:
        if prepared.inputs is None:
            return prepared.failed
        inputs = prepared.inputs.to(self._model.device, self._model.dtype)
        with quiet():
            output = self._model.generate(**inputs, max_new_tokens=self._new, do_sample=False, num_beams=1)
        ends = self._model.generation_config.eos_token_id
        stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        answered = list(prepared.failed)
        for task, tokens, length in zip(prepared.tasks, new_tokens, lengths, strict=True):
            end = next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))
            text = str(self._reader.decode(tokens[:end], skip_special_tokens=True)).strip()
            row = task.row
            answered.append(Answered(row.number, row.id, text, None, end, int(length), len(row.images)))
        return answered


def failure(row: Row, message: str) -> Answered:
    """Return a row with an error in place of its answer."""
    # Names of files need not be text; an error is.
    text = f"row {row.number}: {message}".encode("utf-8", "backslashreplace").decode()
    return Answered(row.number, row.id, None, text, 0, 0, len(row.images))


def out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, a GPU's or the machine's, so that a smaller batch may succeed."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def error_text(error: Exception) -> str:
    """Return an error as a row has it, in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(text.split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
