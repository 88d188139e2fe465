"""IVTP-LLaVA, and LLaVA without pruning, as a model of lmms-eval.

    lmms-eval --model ivtp_llava --model_args pretrained=FOLDER,visual_tokens=64,method=fastv --tasks gqa,pope

It takes the harness's chat form, so a task's pictures and texts come in the order in which the task has them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ..batch.answers import Answered
from ..batch.settings import SMALL_FILES, model_fingerprint, versions
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..serving.answering import load_model, warn_if_unguided
from .answerer import Answerer, Generation, Reply
from .arm import Arm
from .journal import Journal
from .lmms_plugin import NAME
from .processes import own_device, processes
from .prompts import VICUNA, Prompt, prompt_of
from .vllm_answerer import VLLMAnswerer

_ARGUMENTS = (
    "pretrained", "method", "visual_tokens", "engine", "batch_size", "device", "dtype", "system_prompt", "pad",
)  # fmt: skip
_ENGINES = ("transformers", "vllm")


class IVTPLlava(lmms):
    """A model that answers in batches with left padding, pruned by any method.

    Parameters
    ----------
    pretrained : str
        Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.
    method : str, default "ivtp"
        As in `Arm`; "unpruned" is the baseline.
    visual_tokens : int, optional
        As in `Arm`.
    engine : str, default "transformers"
        "vllm" answers with vLLM and this package's plug-in, in one process, for "ivtp" and "unpruned".
    batch_size : int, default 1
        Questions answered side by side; vLLM is given as many at once.
    device : str, optional
        Such as "cpu" or "cuda:1". Default: one GPU for each process, and all for a single one. vLLM has its own.
    dtype : str, default "auto"
        "auto" (the checkpoint's), "float32", "float16" or "bfloat16".
    system_prompt : str, default ""
        Stands before the question; "vicuna" is the one that LLaVA-1.5 was published with.
    pad : bool, default False
        Pad pictures to squares, as LLaVA-1.5 was published; otherwise the checkpoint's own processor decides.

    loaded : tuple of (model, processor), optional
        The model of `pretrained`, if it is loaded already.

    Raises
    ------
    ValueError
        For an unknown argument, a method or number that is not allowed, or a checkpoint that is no LLaVA.
    """

    is_simple = False
    journal: Journal | None = None
    """The journal of answers, written as they come, and read from if their run was stopped."""
    answered = False
    """Whether all questions have answers, so that an error is not the model's."""

    def __init__(
        self,
        pretrained: str = "",
        method: str = "ivtp",
        visual_tokens: int | None = None,
        engine: str = "transformers",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        system_prompt: str = "",
        pad: bool = False,
        max_batch_size: Any = None,  # the harness gives it along; it belongs to batch_size="auto"
        loaded: tuple[Any, Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"model argument {', '.join(sorted(unknown))}; allowed: {', '.join(_ARGUMENTS)}")
        if not pretrained:
            raise ValueError("pretrained is missing: --model_args pretrained=FOLDER")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}; allowed: a whole number from 1")
        if not isinstance(pad, bool):
            raise ValueError(f"pad={pad!r}; allowed: True, False")
        if engine not in _ENGINES:
            raise ValueError(f"engine={engine!r}; allowed: {', '.join(_ENGINES)}")
        arm = Arm(method, visual_tokens)
        state = processes(device)
        self.accelerator = Accelerator(cpu=state.device.type == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        self.batch_size = int(batch_size)
        self.system_prompt = VICUNA if system_prompt == "vicuna" else self._resolve_system_prompt(system_prompt)
        self.pad = pad
        self.arm = arm
        self.model: Any = None
        self.processor: Any
        self.vllm: VLLMAnswerer | None = None
        if engine == "vllm":
            if self._world_size > 1:
                raise ValueError(f"engine='vllm' in {self._world_size} processes; allowed: 1, vLLM batches by itself")
            self.vllm = VLLMAnswerer(pretrained, arm, dtype)
            self.processor = self.vllm.processor
        else:
            self.model, self.processor = loaded or load_model(pretrained, device=own_device(device, state), dtype=dtype)
            with arm.applied(self.model):
                warn_if_unguided(self.model, self.processor)
        self.fingerprint = self._fingerprint(pretrained)
        _key_caches(self)

    @property
    def answerer(self) -> Answerer | VLLMAnswerer:
        """Return what answers; made anew each time, as the harness takes the model away when it has its answers."""
        return self.vllm or Answerer(self.model, self.processor, self.arm)

    @property
    def device(self) -> Any:
        """The device of the model; the harness gathers there."""
        return self.accelerator.device

    def _fingerprint(self, pretrained: str) -> str:
        """Return 16 hexadecimal digits of all that decides an answer, beside the question and how it is generated."""
        checkpoint, folder = open_checkpoint(pretrained, HubOptions(), extra=SMALL_FILES)
        decides = {
            "weights": model_fingerprint(checkpoint, folder),
            **self.answerer.decides,
            "system_prompt": self.system_prompt,
            "pad": self.pad,
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer requests.

        Parameters
        ----------
        requests : sequence of Instance
            With the arguments of the chat form: context, function from a document to messages, generation arguments,
            number of the document, task, split.

        Returns
        -------
        list of GenerationResult
            In the order of the requests, with the number of tokens.

        Raises
        ------
        ValueError
            For a question with video or sound, or generation arguments that are not known.
        """
        self.answered = False
        answerer = self.answerer
        results: list[Any] = [None] * len(requests)
        seconds, tokens = 0.0, 0
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as bar:
            for number, batch in enumerate(_batches([request.args for request in requests], self.batch_size)):
                start = time.perf_counter()
                replies = self._replies(number, batch, answerer)
                seconds += time.perf_counter() - start
                for place, question, reply in zip(batch.places, batch.questions, replies, strict=True):
                    counts = TokenCounts(input_tokens=reply.prompt_tokens, output_tokens=reply.tokens)
                    results[place] = GenerationResult(text=reply.text, token_counts=counts)
                    self.cache_hook.add_partial("generate_until", (question[0], question[2]), reply.text)
                    tokens += reply.tokens
                bar.update(len(batch.places))
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"rank": self.rank},
        )
        self.answered = True
        return results

    def _replies(self, number: int, batch: _Batch, answerer: Answerer | VLLMAnswerer) -> list[Reply]:
        """Answer a batch, or read its answers from the journal."""
        if self.journal is not None and number in self.journal.batches:
            known = self.journal.batches[number]
            return [Reply(row.answer or "", row.tokens, row.prompt_tokens) for row in known]
        prompts = [self._prompt(question) for question in batch.questions]
        replies = answerer.answer(prompts, batch.generation)
        if self.journal is not None:
            rows = zip(batch.places, prompts, replies, strict=True)
            self.journal.add(
                number,
                [
                    Answered(place, None, reply.text, None, reply.tokens, reply.prompt_tokens, len(prompt.images))
                    for place, prompt, reply in rows
                ],
            )
        return replies

    def _prompt(self, question: tuple[Any, ...]) -> Prompt:
        _, to_messages, _, number, task, split = question
        document = self.task_dict[task][split][number]
        try:
            return prompt_of(to_messages(document), self.processor, system_prompt=self.system_prompt, pad=self.pad)
        except (ValueError, OSError) as error:
            raise type(error)(f"{task}, document {number}: {error}") from error

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse tasks that compare the likelihoods of given answers."""
        raise NotImplementedError(_only_generation(requests, "the likelihood of given answers"))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError(_only_generation(requests, "several rounds"))


def _only_generation(requests: Sequence[Any], wanted: str) -> str:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    return f"{tasks} ask for {wanted}; {NAME} answers tasks of output_type generate_until"


@dataclass(frozen=True)
class _Batch:
    """Questions that are answered side by side, with their places among all requests."""

    places: list[int]
    questions: list[tuple[Any, ...]]
    generation: Generation


def _batches(questions: Sequence[tuple[Any, ...]], size: int) -> Iterator[_Batch]:
    """Group questions by their generation arguments, the longest first: what does not fit into memory fails at once."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        groups[json.dumps(question[2], sort_keys=True, default=str)].append(place)
    for places in groups.values():
        generation = Generation.of(questions[places[0]][2])
        places.sort(key=lambda place: -len(questions[place][0]))
        for first in range(0, len(places), size):
            chosen = places[first : first + size]
            yield _Batch(chosen, [questions[place] for place in chosen], generation)


class KeyedCache(ResponseCache):
    """The harness's cache of answers, with a key that knows what answers.

    By itself the harness knows a model's arguments only, and would return old answers after a folder's weights or
    pruning options changed.
    """

    fingerprint = ""
    """The fingerprint of the model that was made last."""

    @classmethod
    def create(cls, cache_root: str, *, model: Any = "", **options: Any) -> ResponseCache:
        """Open the cache."""
        if isinstance(model, IVTPLlava):
            model = f"{NAME}|{model.fingerprint}"
        elif model == NAME:
            model = f"{NAME}|{cls.fingerprint}"
        return super().create(cache_root, model=model, **options)


def _key_caches(model: IVTPLlava) -> None:
    # The harness has no place where a model could say what it is, so the class is replaced where a cache is made.
    KeyedCache.fingerprint = model.fingerprint
    evaluator.ResponseCache = KeyedCache
