"""The model's side: batches become answers, and whatever goes wrong costs as few rows as can be."""

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
from ..files.images import load_image
from ..serving.answering import as_prompt
from .answers import Answered
from .data import Row
from .plan import Task
from .tables import is_text

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A batch's inputs, still on the CPU.

    Attributes
    ----------
    tasks : list of Task
        Those whose pictures could be read.
    inputs : BatchFeature or None
        As the processor makes them, padded on the left; None if no task is left.
    failed : list of Answered
        The others.
    """

    tasks: list[Task]
    inputs: Any
    failed: list[Answered]


class Asker:
    """Answers tasks greedily.

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
        """Rows as tasks; those that can be none, because their prompt or their pictures' column is wrong, as errors."""
        sound, prompts, failed = [], [], []
        for row in rows:
            try:
                prompts.append(self._prompt(row))
                sound.append(row)
            except ValueError as error:
                failed.append(failure(row, str(error)))
        if not sound:
            return [], failed
        patches = self._model.config.num_patches
        encoded = self._reader(prompts, verbose=False)["input_ids"]
        room = self._model.config.text_config.max_position_embeddings
        tasks = []
        for row, prompt, ids in zip(sound, prompts, encoded, strict=True):
            length = len(ids) + (patches - 1) * len(row.images)
            if length + self._new > room:
                what = f"{length} tokens and {self._new} of the answer; the model was made for {room}"
                failed.append(failure(row, what))
            else:
                tasks.append(Task(row, prompt, length))
        return tasks, failed

    def _prompt(self, row: Row) -> str:
        if row.problem is not None:
            raise ValueError(row.problem)
        if row.question is None:
            raise ValueError("the prompt is missing")
        if not isinstance(row.question, str):
            raise ValueError(f"the prompt is no text, but {type(row.question).__name__} {row.question!r}")
        if not is_text(row.question):
            raise ValueError(f"the prompt holds half of a character: {row.question!r}")
        return as_prompt(self._processor, row.question, len(row.images))

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Read the pictures of a batch and make its inputs; may run in another thread than `answer`."""
        ready, pictures, failed = [], [], []
        for task in tasks:
            try:
                sources = (one if isinstance(one, str) else one.read() for one in task.row.images)
                pictures += [self._small(load_image(source)) for source in sources]
                ready.append(task)
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(failure(task.row, _told(error)))
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

    def _small(self, image: Any) -> Any:
        """A picture as large as the model sees it: a batch of photographs at full size would be gigabytes."""
        made = self._processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return Image.fromarray(made["pixel_values"][0].astype("uint8").transpose(1, 2, 0))

    def answer(self, tasks: Sequence[Task], prepared: Callable[[], Prepared] | None = None) -> list[Answered]:
        """Answer a batch.

        Where memory runs out the batch is halved, down to a single row; where anything else goes wrong its rows are
        answered one by one. What goes wrong with a single row is that row's error.

        Parameters
        ----------
        tasks : sequence of Task
        prepared : callable, optional
            Hands over what `prepare` made of these tasks, or raises what it raised. Default: they are prepared now.

        Raises
        ------
        torch.AcceleratorError
            If the device itself fails: nothing that follows could be trusted.
        """
        size = len(tasks) * max(task.tokens for task in tasks)
        if len(tasks) == 1 or size < self._too_large:
            try:
                return self._answered(self.prepare(tasks) if prepared is None else prepared())
            except Exception as error:
                full = out_of_memory(error)
                if not full and isinstance(error, torch.AcceleratorError):
                    raise
                told = "out of memory, with this row alone" if full else _told(error)
            # The error is gone by now, and with it what its frames held.
            if full:
                clear_device_cache(garbage_collection=True)
            if len(tasks) == 1:
                return [failure(tasks[0].row, told)]
            if not full:
                return [one for task in tasks for one in self.answer([task])]
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
        said = output[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        answered = list(prepared.failed)
        for task, tokens, length in zip(prepared.tasks, said, lengths, strict=True):
            end = next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))
            text = str(self._reader.decode(tokens[:end], skip_special_tokens=True)).strip()
            row = task.row
            answered.append(Answered(row.number, row.id, text, None, end, int(length), len(row.images)))
        return answered


def failure(row: Row, what: str) -> Answered:
    """A row that has an error in place of an answer."""
    return Answered(row.number, row.id, None, f"row {row.number}: {what}", 0, 0, len(row.images))


def out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may do, be it a GPU's memory that ran out or the machine's."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def _told(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(text.split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
