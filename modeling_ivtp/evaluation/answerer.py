"""Answers to prompts in batches, for harnesses that bring generation arguments of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from ..batch.asking import out_of_memory
from ..files.console import quiet
from .arm import Arm
from .prompts import Prompt

DEFAULT_NEW_TOKENS = 1024
"""Longest answer if a benchmark does not say."""
_PASSED_ON = ("top_k", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
_IGNORED = ("image_aspect_ratio",)
"""Arguments of LLaVA's own code that some tasks hold; how pictures are prepared is the model's matter here."""
_KNOWN = ("until", "max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", *_PASSED_ON, *_IGNORED)


@dataclass(frozen=True)
class Generation:
    """Settings of generation.

    Attributes
    ----------
    arguments : dict
        Of `generate`.
    until : tuple of str
        The answer ends before the first of these.
    """

    arguments: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": DEFAULT_NEW_TOKENS})
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Generation:
        """Read a benchmark's generation arguments. A temperature above zero samples, as in LLaVA's own evaluation.

        Raises
        ------
        ValueError
            For an argument that is unknown, or an `until` that is neither a text nor a list of texts.
        """
        if unknown := sorted(set(arguments) - set(_KNOWN)):
            raise ValueError(f"generation argument {', '.join(unknown)}; allowed: {', '.join(_KNOWN)}")
        until = arguments.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"until={until!r}; allowed: a text, or a list of texts")
        temperature = arguments.get("temperature") or 0.0
        made: dict[str, Any] = {
            "max_new_tokens": arguments.get("max_new_tokens", DEFAULT_NEW_TOKENS),
            "num_beams": arguments.get("num_beams", 1),
            "do_sample": temperature > 0 and arguments.get("do_sample", True),
            **{name: arguments[name] for name in _PASSED_ON if name in arguments},
        }
        if made["do_sample"]:
            made |= {"temperature": temperature, "top_p": arguments.get("top_p")}
        return cls(made, tuple(stop for stop in stops if stop))

    def cut(self, text: str) -> str:
        """Return a text up to the first stop in it, without white space around it."""
        return text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=None)].strip()


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes
    ----------
    text : str
    tokens : int
        Of the answer, its end token included.
    prompt_tokens : int
        With all tokens of the pictures.
    """

    text: str
    tokens: int
    prompt_tokens: int


class Answerer:
    """Answers batches of prompts in one arm.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor
    arm : Arm
    """

    def __init__(self, model: Any, processor: Any, arm: Arm) -> None:
        self.model, self.processor, self.arm = model, processor, arm

    @property
    def decides(self) -> dict[str, Any]:
        """All that decides an answer beside the weights and the prompt, ready for JSON."""
        return {"pruning": self.arm.described(self.model), "dtype": str(self.model.dtype)}

    def answer(self, prompts: Sequence[Prompt], generation: Generation) -> list[Reply]:
        """Answer prompts side by side; if memory runs out, half of them at a time.

        Raises
        ------
        Exception
            Any failure; no answer takes its place.
        """
        try:
            return self._answer(prompts, generation)
        except Exception as error:
            if len(prompts) == 1 or not out_of_memory(error):
                raise
        # Python has dropped the error here, and with it the tensors that its frames held.
        clear_device_cache(garbage_collection=True)
        middle = len(prompts) // 2
        return [*self.answer(prompts[:middle], generation), *self.answer(prompts[middle:], generation)]

    @torch.inference_mode()
    def _answer(self, prompts: Sequence[Prompt], generation: Generation) -> list[Reply]:
        inputs = self.processor(
            images=[image for prompt in prompts for image in prompt.images] or None,
            text=[prompt.text for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        with self.arm.applied(self.model), quiet():
            output = self.model.generate(**inputs, **generation.arguments)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._reply(tokens, length, generation) for tokens, length in zip(new_tokens, lengths, strict=True)]

    def _reply(self, tokens: list[int], prompt_tokens: int, generation: Generation) -> Reply:
        ends = self.model.generation_config.eos_token_id
        stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        end = next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Reply(generation.cut(str(text)), end, prompt_tokens)
