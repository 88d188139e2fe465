"""The two engines that are compared: transformers, which says what is right, and vLLM in this process."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.quality.world import sample_questions
from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.vllm_plugin import register

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
TYPES = ("existence", "colour", "corner", "left_of", "above", "larger")
NEW_TOKENS = 4
TOWER = {"decoder_layers": 0, "tower_tokens": None}
"""Options under which the vision tower alone prunes."""

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables under which vLLM runs in the process that asks it, unless they are set."""

Request = Sequence[Any]
"""A prompt, its pictures, and optionally its `mm_processor_kwargs`."""


def held_out(count: int) -> list[tuple[str, list[Image.Image], str]]:
    """Return questions of the validation scenes: prompt, pictures, right answer."""
    sampled = islice(sample_questions("validation", count, TYPES), count)
    return [(question.prompt, [Image.fromarray(scene.pixels)], question.answer) for scene, question in sampled]


class Transformers:
    """The transformers engine.

    Parameters
    ----------
    model : Path
        A checkpoint's folder.
    choice : {"ahead", "within"}
        Where the second stage chooses: as vLLM does, or inside the decoder as the paper does.
    dtype : torch.dtype
    """

    def __init__(self, model: Path = MINIATURE, choice: str = "ahead", dtype: torch.dtype = torch.float32) -> None:
        loaded: Any = IVTPLlavaForConditionalGeneration.from_pretrained(
            model, dtype=dtype, pruning={"decoder_choice": choice}
        )
        self.model = loaded.eval()
        self.processor = self.processor_of(model)

    @staticmethod
    def processor_of(model: Path) -> IVTPLlavaProcessor:
        """Return the processor of a checkpoint."""
        return IVTPLlavaProcessor.from_pretrained(model)

    def answer(
        self, text: str, images: Sequence[Image.Image], generation: dict[str, Any] | None = None, **options: Any
    ) -> list[int]:
        """Answer greedily, with pruning options changed: the new tokens."""
        inputs = self.processor(images=images or None, text=text, return_tensors="pt").to(self.model.dtype)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | (generation or {})
        with torch.no_grad(), self.model.pruning(**options):
            tokens = self.model.generate(**inputs, **settings)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    def patches(self, text: str, images: Sequence[Image.Image], **options: Any) -> list[list[int]]:
        """Return the patches that `explain` shows as kept of each picture."""
        inputs = self.processor(images=images, text=text, return_tensors="pt").to(self.model.dtype)
        with self.model.pruning(**options):
            return [image.groups[-1].kept.tolist() for image in self.model.explain(**inputs).images]


class Engine:
    """vLLM in this process, and the patches that it kept.

    Parameters
    ----------
    model : Path
        A checkpoint's folder.
    **options
        Of `vllm.LLM`, beside small defaults.

    Attributes
    ----------
    kept : list of list of int
        The patches of each image that was chosen, in the order of choosing.
    images : ImageEncoder or None
        The plug-in's encoder; a stock model has none.
    """

    def __init__(self, model: Path = MINIATURE, **options: Any) -> None:
        for name, value in IN_PROCESS.items():
            os.environ.setdefault(name, value)
        import vllm

        register()
        usual = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "block_size": 32,
            # Memory for 8,192 tokens; several engines come and go in one process.
            "num_gpu_blocks_override": 256,
            "limit_mm_per_prompt": {"image": 4},
        }
        self.sampling = vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        self.llm = vllm.LLM(str(model), **(usual | options))
        self.images = self.llm.apply_model(lambda loaded: getattr(loaded, "images", None))[0]
        self.kept: list[list[int]] = []
        if self.images is not None:
            self._note_what_stays()

    def _note_what_stays(self) -> None:
        features_of = self.images.features_of

        def noted(items: Any) -> Any:
            found = features_of(items)
            self.kept.extend(patches.tolist() for _, patches in found)
            return found

        self.images.features_of = noted

    def outputs(self, requests: Sequence[Request], sampling: Any = None, **options: Any) -> list[Any]:
        """Answer requests together; `options` are those of `LLM.generate`."""
        prompts = []
        for text, images, *kwargs in requests:
            prompt = {"prompt": text}
            if images:
                prompt |= {"multi_modal_data": {"image": images}}
            if kwargs:
                prompt |= {"mm_processor_kwargs": kwargs[0]}
            prompts.append(prompt)
        return self.llm.generate(prompts, sampling or self.sampling, use_tqdm=False, **options)

    def answers(self, requests: Sequence[Request], sampling: Any = None, **options: Any) -> list[list[int]]:
        """Answer requests together: the new tokens of each."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(requests, sampling, **options)]

    def metrics(self) -> dict[str, float]:
        """Return vLLM's own counters."""
        return {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
