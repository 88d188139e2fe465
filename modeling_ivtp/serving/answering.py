"""Load a model, ask it about pictures and measure what pruning saves, for the command line and the examples."""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from ..checkpoints.llava_source import check_loading_info, read_config
from ..checkpoints.sources import HubOptions, local_folder, naming_damaged_file, open_checkpoint
from ..checkpoints.weights import check_weights
from ..files.console import quiet
from ..model.compat import cache_of
from ..model.modeling_ivtp import IVTPLlavaForConditionalGeneration
from ..model.placeholders import check_placeholders, complete_processor, features_of_image
from ..model.processing_ivtp import IVTPLlavaProcessor


@dataclass(frozen=True)
class Answer:
    """One answer and its cost.

    Attributes
    ----------
    text : str
        The model's words.
    tokens : int
        Their number of tokens.
    seconds : float
        Time of `generate`, prefill included; the median if it was repeated.
    visual_tokens : tuple of int
        Visual tokens of each image that are left in the end.
    layer_averaged_tokens : float
        Visual tokens of one image that a layer of the language model saw on average.
    kv_bytes : int
        Size of the KV cache after the last token.
    """

    text: str
    tokens: int
    seconds: float
    visual_tokens: tuple[int, ...]
    layer_averaged_tokens: float
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self) | {"visual_tokens": list(self.visual_tokens)}


def load_model(
    model: str | os.PathLike[str], *, device: str | None = None, dtype: str = "auto"
) -> tuple[Any, IVTPLlavaProcessor]:
    """Load an IVTP-LLaVA or an official LLaVA, ready to answer.

    Parameters
    ----------
    model : str or path
        Folder or Hub id.
    device : str, optional
        `"cpu"`, `"cuda:1"`, …; None spreads the model over the GPUs, or takes Apple's GPU or the CPU if there is none.
    dtype : str
        `"auto"` (the checkpoint's), `"float32"`, `"float16"` or `"bfloat16"`.

    Returns
    -------
    model : IVTPLlavaForConditionalGeneration
    processor : IVTPLlavaProcessor

    Raises
    ------
    ValueError
        If the checkpoint is no LLaVA, a file is damaged, weights are missing, unexpected, in another format than
        safetensors or of another shape than the config says, or the device or type is unknown.
    OSError
        If there is no such checkpoint, or a weights file is missing or damaged.
    """
    folder = local_folder(model)
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}; allowed: auto, float32, float16, bfloat16")
    if device is None:
        device = "auto" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    else:
        check_device(device)
    with quiet(bars=sys.stderr.isatty()), naming_damaged_file(model, folder):
        if folder is not None:
            # Without a config.json transformers would build a 7B model of random numbers.
            read_config(folder, str(model), quantized=True)
            check_weights(folder, str(model))
        else:
            open_checkpoint(model, HubOptions())  # refuses weights that are not safetensors
        source = model if folder is None else folder
        # transformers' own error for wrong shapes only refers to a report; `check_loading_info` says what is in it.
        loaded, info = IVTPLlavaForConditionalGeneration.from_pretrained(
            source,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_loading_info(info, str(model))
        processor = IVTPLlavaProcessor.from_pretrained(source)
        complete_processor(processor, loaded.config)
        check_placeholders(processor, loaded.config, model)
    return loaded.eval(), processor


def set_budget(model: Any, visual_tokens: int | str) -> None:
    """Prune to a final number of visual tokens, or to `"auto"`; see `IVTPPruningConfig.at_budget`.

    A budget of all patches leaves pruning off where the checkpoint has it off.
    """
    options = model.pruning_config
    enabled = options.enabled or visual_tokens == "auto" or int(visual_tokens) < model.config.num_patches
    model.set_pruning(**options.at_budget(visual_tokens) | {"enabled": enabled})


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine does not have."""
    try:
        kind = torch.device(device)
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error


def as_prompt(processor: Any, question: str, images: int) -> str:
    """Put a question into the prompt format that the model was trained on.

    Parameters
    ----------
    processor : IVTPLlavaProcessor
    question : str
        Plain text, with an image token for every picture or with none; without any, the pictures come first. A text
        with role markers, such as `USER: … ASSISTANT:`, is a whole prompt and stays as it is.
    images : int
        Number of pictures.

    Raises
    ------
    ValueError
        If the number of image tokens is another one, the question is empty, or the chat template is damaged.
    """
    token, whole = processor.image_token, processor.is_whole_prompt(question)
    if (count := question.count(token)) != images and (count or whole):
        raise ValueError(f"the prompt has {count} {token}, but came with {images} image(s)")
    if not question.strip():
        raise ValueError("the prompt is empty")
    if whole:
        return question
    if not processor.chat_template:
        words = question.strip() if count else f"{token}\n" * images + question
        return f"USER: {words} ASSISTANT:"
    parts = processor.split_at_images(question) if count else [None] * images + [question]
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the checkpoint's chat template is damaged: {error}") from error


def prepare(model: Any, processor: Any, images: Sequence[Any], prompt: str) -> dict[str, Any]:
    """Make a model's inputs from one prompt, on its device and in its type.

    A UserWarning says if the checkpoint lacks something that the question needs to guide the pruning.
    """
    inputs = processor(images=list(images) or None, text=prompt, return_tensors="pt")
    if images:
        warn_if_unguided(model, processor)
    return dict(inputs.to(model.device, model.dtype))


def warn_if_unguided(model: Any, processor: Any) -> None:
    """Warn, by a UserWarning, if the checkpoint lacks something that the question needs to guide the pruning."""
    missing = missing_guidance(model, processor)
    if missing and not model.model.pruner.needs.options.strict:
        warnings.warn(
            f"{model.name_or_path} has no {missing}, so the image alone guides the pruning, not the question; `ivtp "
            f"convert {model.name_or_path} --clip CLIP --out FOLDER` joins it",
            stacklevel=3,
        )


def missing_guidance(model: Any, processor: Any) -> str:
    """Name the part that a checkpoint lacks for the question to guide its pruning, or return an empty string."""
    plan, needs = model.model.plan(), model.model.pruner.needs
    if plan is None or not plan.decoder or not needs.pseudo_cls:
        return ""
    guidance = needs.options.guidance
    if guidance == "clip" and not model.model.has_text_tower:
        return "text tower of CLIP"
    return "clip_tokenizer/" if guidance != "visual_cls" and processor.clip_tokenizer is None else ""


def explain(model: Any, processor: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the `PruningTrace` of one prompt.

    Parameters
    ----------
    model, processor
        As from `load_model`.
    inputs : mapping
        As from `prepare`.

    Raises
    ------
    ValueError
        If the model drops nothing.
    """
    with quiet():
        return model.explain(processor, **inputs)


def kv_bytes(cache: Any) -> int:
    """Return the bytes of all keys and values that a cache stores."""
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor)
    )


def answer(
    model: Any, processor: Any, inputs: Mapping[str, Any], *, max_new_tokens: int = 64, repeats: int = 0
) -> Answer:
    """Answer greedily and measure the cost.

    Parameters
    ----------
    model, processor
        As from `load_model`.
    inputs : mapping
        As from `prepare`.
    max_new_tokens : int
        Longest answer.
    repeats : int
        0: one run. Otherwise one run to warm up and the median of that many.
    """
    runs = [_run(model, inputs, max_new_tokens) for _ in range(repeats + 1)]
    return _measured(model, processor, inputs, runs)


def compare(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
    method: Any = None,
) -> tuple[Answer, Answer]:
    """Answer without and with pruning, by turns, so that both see the same machine.

    Parameters
    ----------
    method : Method, optional
        The method that prunes; default: the model's own options.

    Returns
    -------
    unpruned, pruned : Answer
    """

    def pruning() -> Any:
        return model.pruning(enabled=True) if method is None else method(model)

    runs: tuple[list[_Run], list[_Run]] = ([], [])
    for _ in range(repeats + 1):
        with model.pruning(enabled=False):
            runs[0].append(_run(model, inputs, max_new_tokens))
        with pruning():
            runs[1].append(_run(model, inputs, max_new_tokens))
    with model.pruning(enabled=False):
        unpruned = _measured(model, processor, inputs, runs[0])
    with pruning():
        return unpruned, _measured(model, processor, inputs, runs[1])


def answer_text(model: Any, processor: Any, inputs: Mapping[str, Any], *, max_new_tokens: int = 64) -> str:
    """Answer greedily and return the text alone."""
    return _text(processor, _run(model, inputs, max_new_tokens).new_tokens)


@dataclass(frozen=True)
class _Run:
    seconds: float
    new_tokens: torch.Tensor
    kv_bytes: int


@torch.inference_mode()
def _run(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> _Run:
    model.model.instruction_cache.clear()  # a question that is asked again to be timed counts as a new one
    _wait()
    start = time.perf_counter()
    with quiet():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
    _wait()
    seconds = time.perf_counter() - start
    new_tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    return _Run(seconds, new_tokens, kv_bytes(cache_of(output)))


def _text(processor: Any, tokens: torch.Tensor) -> str:
    return str(processor.decode(tokens, skip_special_tokens=True)).strip()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measured(model: Any, processor: Any, inputs: Mapping[str, Any], runs: list[_Run]) -> Answer:
    images = 0 if inputs.get("pixel_values") is None else inputs["pixel_values"].shape[0]
    whole = features_of_image(model.config)
    final, averaged = (whole,) * images, float(whole if images else 0)
    if images and model.model.plan() is not None:
        trace = explain(model, processor, inputs)
        final, averaged = trace.final_tokens, trace.layer_averaged_tokens
    return Answer(
        text=_text(processor, runs[-1].new_tokens),
        tokens=len(runs[-1].new_tokens),
        # The first of several runs warms up.
        seconds=statistics.median(run.seconds for run in runs[-max(1, len(runs) - 1) :]),
        visual_tokens=final,
        layer_averaged_tokens=averaged,
        kv_bytes=runs[-1].kv_bytes,
    )
