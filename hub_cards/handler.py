"""Answer questions about images on Hugging Face Inference Endpoints: JSON goes in, JSON comes out.

A request is `{"inputs": ENTRY or [ENTRY, …], "parameters": {…}}`. An ENTRY is

- `{"image": IMAGE, "text": QUESTION}`; `images` takes several, and an entry's own `parameters` come first;
- `{"messages": CHAT}` as in OpenAI's API, with text and `image_url` parts, or CHAT itself.

IMAGE is an http(s) address, a data URL or base64. `parameters` are the arguments of `generate` that `PARAMETERS` lists,
and `visual_tokens`, the budget of this request; `"visual_tokens": null` answers without pruning. An answer is
`{"generated_text", "generated_tokens", "prompt_tokens", "finish_reason", "visual_tokens", "layer_averaged_tokens",
"seconds"}`. In a list, a failed entry is `{"error"}`; the others are answered.
"""

import base64
import binascii
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from handler_images import download, load_image, shortened

logger = logging.getLogger(__name__)

PARAMETERS = {
    "max_new_tokens": (int, 1, 2048),
    "min_new_tokens": (int, 0, 2048),
    "num_beams": (int, 1, 16),
    "do_sample": (bool, None, None),
    "temperature": (float, 0.01, 100.0),
    "top_p": (float, 0.01, 1.0),
    "top_k": (int, 0, 1_000_000),
    "repetition_penalty": (float, 0.01, 100.0),
    "seed": (int, 0, 2**63 - 1),
}
MAX_REQUESTS = 32
MAX_IMAGES = 32
"""Most images of a request, and of all requests in one list."""
MAX_TEXT = 20_000
MAX_PARTS = 512
"""Most messages of a request and parts of its messages, together; each of them may cost words of the template."""
MAX_BYTES = 20_000_000
MAX_PIXELS = 16_000_000
MAX_SECONDS = 60
"""Longest time for fetching the images of a request."""
MAX_SECONDS_EACH = 15
MAX_DOWNLOADS = 32
"""Most downloads at once, of all requests."""
MAX_NEW = 4096
"""Most tokens times beams of an answer."""
MAX_TOGETHER = 8
"""Most requests in one batch."""


@dataclass(frozen=True)
class Job:
    """A request that is ready for the model: its prompt, its images and its checked settings."""

    prompt: str
    images: list[Any]
    settings: dict[str, Any]


class EndpointHandler:
    """The class that the Inference Endpoints toolkit loads and calls.

    Parameters
    ----------
    path : str
        Folder of the checkpoint, which is that of this file.
    model, processor : optional
        A model in evaluation mode and its processor, if they are loaded already; no code of the folder runs then.
    """

    def __init__(self, path: str = "", *, model: Any = None, processor: Any = None) -> None:
        path = path or os.path.dirname(os.path.abspath(__file__))
        if model is None:
            model = AutoModelForImageTextToText.from_pretrained(
                path,
                trust_remote_code=True,
                use_safetensors=True,
                dtype=fitting_dtype(path),
                device_map="auto" if torch.cuda.is_available() else "cpu",
            ).eval()
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.model, self.processor = model, processor
        self.processor.tokenizer.padding_side = "left"
        # Pruning options and random numbers belong to the model, not to a request, so batches take turns.
        self._busy = threading.Lock()
        # An open picture is many times as large as its file, so few are opened at once.
        self._opening = threading.Semaphore(4)
        # Slow addresses wait here, where they hold up nobody who brings the picture along.
        self._fetching = threading.Semaphore(MAX_DOWNLOADS)

    def __call__(self, data: Mapping[str, Any]) -> Any:
        """Answer one request or several.

        Parameters
        ----------
        data : mapping
            A request, as the head of this file describes it.

        Returns
        -------
        dict or list of dict
            A list if `inputs` is one.

        Raises
        ------
        ValueError
            If the only request, or the parameters of all, are wrong; it says what is allowed.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError('a request is {"inputs": {"image": …, "text": …}, "parameters": {…}}')
        inputs, shared = data["inputs"], data.get("parameters") or {}
        if not isinstance(shared, Mapping):
            raise ValueError("parameters is not an object")
        several = isinstance(inputs, list) and not _is_chat(inputs)
        requests = inputs if several else [inputs]
        if not 1 <= len(requests) <= MAX_REQUESTS:
            raise ValueError(f"inputs has {len(requests)} entries; allowed: 1 to {MAX_REQUESTS}")
        answers: list[Any] = [None] * len(requests)
        jobs: dict[int, Job] = {}
        ends = time.monotonic() + MAX_SECONDS
        for place, request in enumerate(requests):
            try:
                jobs[place] = self.read(
                    request, shared, ends, MAX_IMAGES - sum(len(job.images) for job in jobs.values())
                )
            except Exception as error:
                # A request may make any library raise anything; it is that request's own failure.
                answers[place] = error
        places = list(jobs)
        for number, answer in self.answers(list(jobs.values())):
            answers[places[number]] = answer
        answers = [_failed(answer) if isinstance(answer, Exception) else answer for answer in answers]
        if not several and "error" in answers[0]:
            raise ValueError(answers[0]["error"])
        return answers if several else answers[0]

    def read(
        self, request: Any, shared: Mapping[str, Any], ends: float | None = None, most_images: int = MAX_IMAGES
    ) -> Job:
        """Check a request and fetch its images, before anybody waits for the model.

        Parameters
        ----------
        request : mapping or list
            One entry of `inputs`.
        shared : mapping
            Parameters for which the request has none of its own.
        ends : float, optional
            When fetching has to end, by `time.monotonic`; default: `MAX_SECONDS` from now.
        most_images : int
            Most images it may have.

        Raises
        ------
        ValueError, OSError, jinja2.TemplateError
            If the request is wrong or an image cannot be fetched.
        """
        ends = time.monotonic() + MAX_SECONDS if ends is None else ends
        own: Mapping[str, Any] = {}
        if _is_chat(request):
            chat = request
        elif isinstance(request, Mapping):
            own = request.get("parameters") or {}
            if not isinstance(own, Mapping):
                raise ValueError("parameters is not an object")
            chat = _as_chat(request)
        else:
            raise ValueError('an entry of inputs is {"image": …, "text": …} or {"messages": […]}')
        settings = _checked({**shared, **own}, self.model.config.num_patches)
        sources, messages = _split(chat, self.processor)
        if len(sources) > most_images:
            raise ValueError(f"there are more than {MAX_IMAGES} images; at most so many are read at once")
        images = [self._picture(source, ends) for source in sources]
        return Job(self.processor.apply_chat_template(messages, add_generation_prompt=True), images, settings)

    def answers(
        self, jobs: Sequence[Job], extras: Callable[[Sequence[int]], dict[str, Any]] | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """Answer jobs in batches, and yield each job's place with its answer or error as soon as its batch is done.

        Parameters
        ----------
        jobs : sequence of Job
        extras : callable, optional
            Returns further arguments of `generate` for a batch, such as a streamer, from the places of its jobs.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, job in enumerate(jobs):
            # Random choices with a seed must not depend on who else asks.
            alone = [place] if "seed" in job.settings else []
            groups.setdefault((*sorted(job.settings.items()), *alone), []).append(place)
        for places in groups.values():
            for start in range(0, len(places), MAX_TOGETHER):
                yield from self._batch(jobs, places[start : start + MAX_TOGETHER], extras)

    def _batch(self, jobs: Sequence[Job], places: Sequence[int], extras: Any) -> list[tuple[int, Any]]:
        """Answer a batch; if that fails, answer its jobs one by one, so that only the faulty ones fail."""
        try:
            answers = self._generate([jobs[place] for place in places], {} if extras is None else extras(places))
        except Exception as error:
            if len(places) == 1:
                return [(places[0], error)]
        else:
            return list(zip(places, answers, strict=True))
        return [answer for place in places for answer in self._batch(jobs, [place], extras)]

    def _picture(self, source: Any, ends: float) -> Any:
        source, label = _url(source), "the image"
        if not _is_data(source):
            label, source = shortened(source.strip()), self._download(source.strip(), ends)
        with self._opening:
            image = load_image(source, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS, from_stranger=True, label=label)
            # Pictures do not wait for the model at full size.
            return self.processor.as_seen(image)

    def _download(self, url: str, ends: float) -> bytes:
        if self._fetching.acquire(timeout=max(0.0, ends - time.monotonic())):
            try:
                if (left := ends - time.monotonic()) > 0:
                    return download(url, min(MAX_SECONDS_EACH, left), MAX_BYTES, public_only=True)
            finally:
                self._fetching.release()
        raise ValueError(f"fetching the images took longer than {MAX_SECONDS} seconds")

    def _generate(self, jobs: Sequence[Job], extra: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Answer jobs of equal settings as one batch."""
        with self._busy, torch.inference_mode():
            start = time.perf_counter()
            images = [image for job in jobs for image in job.images]
            inputs = self.processor(
                images=images or None, text=[job.prompt for job in jobs], padding=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            settings = dict(jobs[0].settings)
            self._check_length(inputs["input_ids"].shape[1], settings)
            seed = settings.pop("seed", None)
            with self._budget(settings), torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                plan = self.model.config.pruning_plan()
                with self._counting(plan) as kept:
                    output = self.model.generate(**inputs, **settings, **extra)
            lengths = inputs["attention_mask"].sum(1).tolist()
            new = output[:, inputs["input_ids"].shape[1] :].cpu()
            seconds = time.perf_counter() - start
        layers = self.model.config.text_config.num_hidden_layers
        patches = self.model.config.num_patches
        counts = [patches] * layers if plan is None else plan.decoder_layer_tokens(layers)
        finals = iter(kept or [counts[-1]] * len(images))
        budgets = [[next(finals) for _ in job.images] for job in jobs]
        before = counts.index(counts[-1])  # layers that work on more than is left in the end
        return [
            {
                "generated_text": self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                "generated_tokens": next(
                    (number for number, token in enumerate(tokens.tolist()) if token in self.ends), len(tokens)
                ),
                "prompt_tokens": prompt,
                "finish_reason": "stop" if not self.ends.isdisjoint(tokens.tolist()) else "length",
                "visual_tokens": budget,
                "layer_averaged_tokens": round(
                    (sum(counts[:before]) + (layers - before) * sum(budget) / len(budget)) / layers, 1
                )
                if budget
                else 0.0,
                "seconds": round(seconds, 4),
            }
            for tokens, prompt, budget in zip(new, lengths, budgets, strict=True)
        ]

    @contextmanager
    def _counting(self, plan: Any) -> Any:
        """Collect how many tokens each image keeps, where every image has a budget of its own; else nothing."""
        kept: list[int] = []
        if plan is None or plan.exact:
            yield kept
            return
        place = self.model.config.image_token_id

        def count(_: Any, arguments: Any, inputs: Mapping[str, Any], output: Any) -> None:
            ids = inputs.get("input_ids")
            if not kept and ids is not None and output.kept_tokens is not None:
                left = output.kept_tokens.to(ids.device)[ids == place]
                kept.extend(left.unflatten(0, (-1, plan.patches)).sum(1).tolist())

        hook = self.model.model.register_forward_hook(count, with_kwargs=True)
        try:
            yield kept
        finally:
            hook.remove()

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer, and the one that fills a batch after an end."""
        end, pad = self.model.generation_config.eos_token_id, self.processor.tokenizer.pad_token_id
        return {*(end if isinstance(end, list) else [end]), pad} - {None}

    def _check_length(self, prompt: int, settings: Mapping[str, Any]) -> None:
        most, new = getattr(self.model.config.text_config, "max_position_embeddings", None), settings["max_new_tokens"]
        if most is not None and prompt + new > most:
            raise ValueError(f"prompt and answer have {prompt} + {new} tokens; the model takes {most} in all")

    @contextmanager
    def _budget(self, settings: dict[str, Any]) -> Any:
        if "visual_tokens" not in settings:
            yield
            return
        budget, options = settings.pop("visual_tokens"), self.model.pruning_config
        with self.model.pruning(**{"enabled": False} if budget is None else options.at_budget(budget)):
            yield


def fitting_dtype(path: str | os.PathLike[str]) -> str:
    """Name the type in which a folder's checkpoint answers fastest on this machine.

    Half precision has no fast kernels on most CPUs; a small model is better off twice as large.
    """
    weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return "auto" if torch.cuda.is_available() or weights > 4e9 else "float32"


def _failed(error: Exception) -> dict[str, Any]:
    message = " ".join(str(error).split())[:500] or type(error).__name__
    if not isinstance(error, (ValueError, OSError, TemplateError)):
        # Not the request's fault: whoever runs the endpoint has to see where it came from.
        logger.error("a request failed", exc_info=error)
    if not isinstance(error, (ValueError, OSError, RuntimeError, TemplateError)):
        message = f"{type(error).__name__}: {message}"
    return {"error": message.encode("utf-8", "backslashreplace").decode()}


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def _as_chat(request: Mapping[str, Any]) -> list[Any]:
    """Return a request in either form as chat messages."""
    known = {"image", "images", "text", "messages", "parameters"}
    if unknown := sorted(set(map(str, request)) - known):
        raise ValueError(f"unknown field(s) {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    if "messages" in request:
        if not _is_chat(request["messages"]) or {"image", "images", "text"} & set(request):
            raise ValueError('messages is a list of {"role": …, "content": …}, and goes without image and text')
        return request["messages"]
    text = request.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("text is missing or empty")
    if request.get("images") and request.get("image") is not None:
        raise ValueError("image and images are both there; allowed: one of them")
    images = request.get("images") or ([request["image"]] if request.get("image") is not None else [])
    if not isinstance(images, list):
        raise ValueError("images is a list")
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def _split(chat: list[Any], processor: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Split a chat into its images, in their order, and messages with a mark in the place of each image."""
    sources: list[Any] = []
    messages = []
    length = 0
    contents = [message.get("content") for message in chat]
    if len(chat) + sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
        raise ValueError(f"there are more than {MAX_PARTS} messages or parts of messages")
    for message in chat:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError("a role is none of those allowed: system, user, assistant")
        pieces, images = _pieces(message.get("content"))
        texts = [piece for piece in pieces if piece is not None]
        length += sum(len(text.encode()) for text in texts)  # refuses half characters, which JSON can hold
        token = processor.image_token
        if count := sum(text.count(token) for text in texts):
            if count != len(images):
                raise ValueError(f"{token} stands for an image and must not be in a text without that image")
            parted = (processor.split_at_images(text) if token in text else [text] for text in texts)
            pieces = [piece for part in parted for piece in part]
        sources += images
        marked = [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces]
        messages.append({"role": message["role"], "content": marked})
    if messages[-1]["role"] != "user":
        raise ValueError("the last message is not the user's")
    if length > MAX_TEXT:
        raise ValueError(f"the text has {length:,} bytes; at most {MAX_TEXT:,} are read")
    return sources, messages


def _pieces(content: Any) -> tuple[list[str | None], list[Any]]:
    """Return the texts of a message, with None in the place of each image, and the images."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ValueError("the content of a message is text or a list of parts")
    pieces: list[str | None] = []
    images = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url"):
            source = part.get("image_url") or part.get("image") or part.get("url") or part.get("base64")
            images.append(source.get("url") if isinstance(source, Mapping) else source)
            pieces.append(None)
        else:
            raise ValueError('a part is {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}')
    return pieces, images


def _url(source: Any) -> str:
    """Return an image of a request as an http(s) address or a data URL."""
    if not isinstance(source, str) or not source:
        raise ValueError("an image is an http(s) address, a data URL or base64")
    if "://" not in source and not _is_data(source):
        # The rest is base64, or a path, which no stranger may name.
        if len(source) > MAX_BYTES // 3 * 4 + 4:
            raise ValueError(f"the image is larger than {MAX_BYTES:,} bytes")
        source = "".join(source.split())
        try:
            base64.b64decode(source, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("an image is an http(s) address, a data URL or base64; files are not read") from error
        return f"data:image;base64,{source}"
    return source


def _is_data(source: str) -> bool:
    return source.lstrip()[:5].lower() == "data:"


def _checked(parameters: Mapping[str, Any], patches: int) -> dict[str, Any]:
    """Check the settings of one request and add the defaults of an endpoint: short and greedy.

    Raises
    ------
    ValueError
        For one that is unknown or out of range.
    """
    settings: dict[str, Any] = {"max_new_tokens": 128, "do_sample": False}
    for name, value in parameters.items():
        if name == "visual_tokens":
            if value is not None and not (_is(value, int) and 1 <= value <= patches):
                raise ValueError(f"visual_tokens={value!r}; allowed: 1 to {patches}, or null for no pruning")
        elif name not in PARAMETERS:
            raise ValueError(
                f"unknown parameter {str(name)[:40]!r}; allowed: {', '.join([*PARAMETERS, 'visual_tokens'])}"
            )
        else:
            kind, low, high = PARAMETERS[name]
            if not _is(value, kind) or (low is not None and not low <= value <= high):
                allowed = "true, false" if kind is bool else f"{low} to {high}"
                raise ValueError(f"{name}={value!r:.40}; allowed: {allowed}")
        settings[name] = value
    if settings["max_new_tokens"] * settings.get("num_beams", 1) > MAX_NEW:
        raise ValueError(f"max_new_tokens times num_beams is above {MAX_NEW}")
    if not settings["do_sample"]:
        for name in ("temperature", "top_p", "top_k", "seed"):
            if name in parameters:
                raise ValueError(f"{name} needs do_sample=true")
    return settings


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
