"""Answers to prompts in batches by vLLM, which prunes with this package's plug-in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..methods.names import OWN, UNPRUNED
from ..model.placeholders import complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from ..vllm_plugin import ARCHITECTURE, check_version
from ..vllm_plugin.budget import BUDGET, options_for
from .answerer import Generation, Reply
from .arm import Arm
from .prompts import Prompt

_SAME = ("temperature", "top_p", "top_k", "repetition_penalty")
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


class VLLMAnswerer:
    """Answers batches of prompts in one arm, as `Answerer` does, with vLLM's own batching in each.

    Parameters
    ----------
    pretrained : str
        Folder or Hub id of an IVTP-LLaVA; for the unpruned arm also of an official LLaVA.
    arm : Arm
        Of "ivtp", or unpruned.
    dtype : str
        As in `load_model`.

    Attributes
    ----------
    processor : IVTPLlavaProcessor
        Which writes prompts; vLLM has its own, which reads them.
    decides : dict
        All that decides an answer beside the weights and the prompt, ready for JSON.

    Raises
    ------
    ImportError
        If vLLM is not installed, or not in a version that the plug-in supports.
    ValueError
        For another method, or a checkpoint that vLLM cannot prune.
    """

    def __init__(self, pretrained: str, arm: Arm, dtype: str = "auto") -> None:
        if arm.method not in (OWN, UNPRUNED):
            raise ValueError(f"method={arm.method!r} with engine='vllm'; allowed: {OWN}, {UNPRUNED}")
        vllm = _vllm()
        _, folder = open_checkpoint(pretrained, HubOptions(), extra=("*.json", "*.jinja", "*.model", "*.txt"))
        prunes = ARCHITECTURE in json.loads((folder / "config.json").read_text()).get("architectures", [])
        if arm.method == OWN and not prunes:
            raise ValueError(
                f"{pretrained} is no IVTP-LLaVA, and vLLM prunes no other; convert it with `ivtp convert`, or give "
                f"method={UNPRUNED}"
            )
        self.config = read_config(folder, pretrained, quantized=True)
        self.processor = IVTPLlavaProcessor.from_pretrained(folder)
        complete_processor(self.processor, self.config)
        self.arm = arm
        options: dict[str, Any] = {}
        if arm.method == UNPRUNED:
            self.config.pruning = self.config.pruning.changed(enabled=False)
            options = {"hf_overrides": {"pruning": {"enabled": False}}} if prunes else {}
        elif arm.visual_tokens is not None:
            options = {"mm_processor_kwargs": {BUDGET: arm.visual_tokens}}
        self.decides = {
            "engine": f"vllm {vllm.__version__}",
            "pruning": options_for(self.config, arm.visual_tokens or self.config.pruning.visual_tokens).to_dict(),
            "dtype": dtype,
        }
        # The plug-in's answers were compared with those of transformers in eager mode alone.
        self.llm = vllm.LLM(pretrained, dtype=dtype, enforce_eager=True, **options)

    def answer(self, prompts: Sequence[Prompt], generation: Generation) -> list[Reply]:
        """Answer prompts side by side.

        Raises
        ------
        ValueError
            For generation arguments that vLLM does not have.
        Exception
            Any failure; no answer takes its place.
        """
        asked = [
            {"prompt": prompt.text, **({"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {})}
            for prompt in prompts
        ]
        outputs = self.llm.generate(asked, _sampling(generation), use_tqdm=False)
        return [self._reply(*pair, generation) for pair in zip(prompts, outputs, strict=True)]

    def _reply(self, prompt: Prompt, output: Any, generation: Generation) -> Reply:
        (said,) = output.outputs
        text_tokens = sum(token != self.config.image_token_index for token in output.prompt_token_ids)
        return Reply(
            generation.cut(said.text), len(said.token_ids), text_tokens + len(prompt.images) * self.config.num_patches
        )


def _vllm() -> Any:
    """Return vLLM's module, if the plug-in supports its version; it sends no reports of its use."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ImportError("engine='vllm' needs vLLM: pip install 'ivtp-llava[vllm]'") from error
    check_version(vllm.__version__)
    return vllm


def _sampling(generation: Generation) -> Any:
    """Return vLLM's sampling parameters."""
    given = generation.arguments
    if given.get("num_beams", 1) > 1 or given.get("no_repeat_ngram_size"):
        raise ValueError("num_beams above 1 and no_repeat_ngram_size; with engine='vllm' neither is allowed")
    options = {"temperature": 0.0} if not given.get("do_sample") else {}
    options |= {name: given[name] for name in _SAME if given.get(name) is not None}
    options |= {other: given[name] for name, other in _RENAMED.items() if given.get(name) is not None}
    return _vllm().SamplingParams(stop=list(generation.until) or None, **options)
