"""The question, read from a prompt's tokens where the processor's `clip_*` inputs are missing or do not fit.

Trainers and other clients drop inputs that they do not know, append an answer to a processed prompt, or move its
padding. Then the model reads the question itself, with the tokenizers that lie beside its weights.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .checkpoint_ivtp import is_open_clip
from .processing_ivtp import IVTPLlavaProcessor
from .prompt import PromptInputs
from .pruner import Needs

logger = logging.get_logger(__name__)


class InstructionGuide:
    """Completes prompts whose question is missing or misplaced; belongs to one model.

    Attributes
    ----------
    clip : str or None
        Where CLIP's tokenizer is, if `from_llava` joined a CLIP and the model's folder has none.
    """

    def __init__(self) -> None:
        self.clip: str | None = None
        self._source: str | None = None
        self._processor: IVTPLlavaProcessor | None = None

    def processor(self, model: Any) -> IVTPLlavaProcessor | None:
        """Return the processor that lies beside a model's weights, loaded at first need; None if there is none.

        Parameters
        ----------
        model : PreTrainedModel
            `name_or_path` names its folder or Hub id.
        """
        source = str(model.name_or_path or "")
        if source != self._source:
            self._source, self._processor = source, self._load(source, model) if source else None
        return self._processor

    def _load(self, source: str, model: Any) -> IVTPLlavaProcessor | None:
        clip = None if self.clip is None or is_open_clip(self.clip) else self.clip
        folder, commit = Path(source), getattr(model.config, "_commit_hash", None)
        # Nothing is looked for on the Hub unless the model came from there: a folder may be gone by now.
        if folder.is_dir():
            known, access = clip is not None or (folder / "clip_tokenizer").is_dir(), dict[str, Any]()
        else:
            known, access = commit is not None, {"revision": commit}
        if not known:
            return None
        if type(model).__module__.startswith("transformers_modules"):
            access["trust_remote_code"] = True  # this very code came from there, and nobody is asked twice
        try:
            if clip is not None:
                return IVTPLlavaProcessor.from_llava(source, clip_tokenizer=clip, **access)
            processor = IVTPLlavaProcessor.from_pretrained(source, **access)
        except (OSError, ValueError, TypeError) as error:
            logger.info(f"{source} holds no processor that could read a question: {error}")
            return None
        return processor if processor.clip_tokenizer is not None else None

    def complete(self, model: Any, prompt: PromptInputs, *, misplaced: bool = False) -> PromptInputs:
        """Return a prompt with the question's `clip_input_ids` and `clip_spans`, read from `input_ids` if need be.

        They are read where one is missing, where the spans cover another number of tokens than the prompt or the whole
        conversation has, and where the prompt's index found them misplaced. A prompt that needs none, or whose question
        nobody can read, comes back as it is.

        Parameters
        ----------
        model : IVTPLlavaModel
        prompt : PromptInputs
        misplaced : bool, default False
            Whether the spans do not belong to the prompt's tokens, though they are as many.

        Raises
        ------
        ValueError
            If spans cannot be aligned with the prompt, and there is no processor beside the model's weights.
        """
        needs = model.pruner.needs
        if torch.compiler.is_compiling() or not asks(needs, model.has_text_tower):
            return prompt
        if prompt.input_ids is None and not misplaced:
            return prompt
        compared = needs.patch_embeds or (needs.pseudo_cls and needs.options.guidance == "clip")
        missing = prompt.clip_input_ids is None and compared
        missing |= prompt.clip_spans is None and (needs.pseudo_cls or needs.instruction)
        if not (missing or misplaced) and _as_many(prompt):
            return prompt
        processor = None if prompt.input_ids is None else self.processor(model)
        if processor is not None:
            return _read(processor, prompt)
        if missing or (prompt.past and not misplaced):
            return prompt
        assert prompt.clip_spans is not None
        found = "has words on padding or images, or padding on tokens"
        if not misplaced:
            found = f"covers {prompt.clip_spans.shape[1]} tokens of a prompt of {prompt.length}"
        raise ValueError(
            f"clip_spans {found}, so it cannot be aligned: the prompt was changed after the processor wrote it. Pass "
            "the processor's inputs unchanged, leave clip_spans and clip_input_ids out, or save the processor beside "
            "the model's weights (processor.save_pretrained), so that the model reads the question itself."
        )

    def read(self, model: Any, prompt: PromptInputs) -> PromptInputs:
        """Return a prompt with the question's `clip_input_ids`, read from `input_ids` where they are missing.

        A prompt whose question nobody can read comes back as it is.
        """
        if prompt.clip_input_ids is not None or prompt.input_ids is None or torch.compiler.is_compiling():
            return prompt
        processor = self.processor(model)
        return prompt if processor is None else _read(processor, prompt)

    def save(self, model: Any, folder: str | os.PathLike[str]) -> None:
        """Write the processor into a folder with the model's weights, unless one is there."""
        if (Path(folder) / "clip_tokenizer").exists() or not Path(folder).is_dir():
            return
        if (processor := self.processor(model)) is not None:
            processor.save_pretrained(folder)


def asks(needs: Needs, has_text_tower: bool) -> bool:
    """Return whether a pruner goes by the question, and the model can compare it."""
    if needs.patch_embeds:
        return has_text_tower
    if needs.instruction:
        return True
    if not needs.pseudo_cls or needs.options.guidance == "visual_cls":
        return False
    return has_text_tower or needs.options.guidance != "clip"


def _as_many(prompt: PromptInputs) -> bool:
    """Return whether there is a span for each token of a prompt, or of the conversation that it continues."""
    spans = prompt.clip_spans
    return spans is None or spans.shape[1] in (prompt.length, prompt.past + prompt.length)


def _read(processor: IVTPLlavaProcessor, prompt: PromptInputs) -> PromptInputs:
    """Read the question of every row from its tokens."""
    ids = prompt.input_ids
    assert ids is not None
    valid = prompt.valid_tokens(ids.device)
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    if prompt.drafted:
        valid = valid & (torch.arange(prompt.length, device=ids.device) < prompt.length - prompt.drafted)
    question = processor.read_instruction(ids, valid)
    return replace(
        prompt,
        clip_input_ids=question["clip_input_ids"].to(ids.device),
        clip_spans=question["clip_spans"].to(ids.device),
    )
