"""Run the paper's benchmarks in lmms-eval, in several arms: `ivtp evaluate`.

Processes that accelerate launched share the questions. The first one scores the answers, and tells the others.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from tenacity import RetryError, stop_after_attempt  # lmms-eval's, as it raises them

from ..serving.answering import load_model, missing_guidance
from .arm import Arm
from .journal import Journal
from .lmms_model import IVTPLlava
from .paper import Benchmark, Measured, Score
from .processes import launched, own_device

KEY = "OPENAI_API_KEY"
"""The environment variable with the key of lmms-eval's judges."""
JUDGE = ("API_TYPE", "MODEL_VERSION", "OPENAI_API_URL")
"""Environment variables that choose the judge."""


@dataclass(frozen=True)
class Options:
    """Systems and benchmarks of an evaluation.

    Attributes
    ----------
    model : str
        Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.
    benchmarks : sequence of Benchmark
    arms : sequence of Arm
        The unpruned one first, to which the others are compared.
    out : Path
        Folder of the results. A run that was stopped goes on from what is there.
    data : mapping of str to Path
        For a benchmark by its name: a folder with its data set, in place of the Hub's.
    limit : int, optional
        Questions of each benchmark, from the first, with those that are scored together with them; None: all.
    batch_size : int
    device : str, optional
    dtype : str
    published : bool, default True
        Ask as LLaVA-1.5 was published: Vicuna's system prompt, pictures padded to squares. False: as the checkpoint's
        own template and processor say.
    """

    model: str
    benchmarks: Sequence[Benchmark]
    arms: Sequence[Arm]
    out: Path
    data: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str = "auto"
    published: bool = True

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; allowed: a whole number from 1")
        if unknown := sorted(set(self.data) - {benchmark.name for benchmark in self.benchmarks}):
            raise ValueError(f"data of {', '.join(unknown)}, which is none of the benchmarks")
        if missing := [str(folder) for folder in self.data.values() if not folder.is_dir()]:
            raise ValueError(f"there is no folder {', '.join(missing)}")


def needs(options: Options) -> Iterator[tuple[Benchmark, str, bool]]:
    """Yield each benchmark with what it needs and how it differs from Table 1, and whether it can be scored here."""
    for benchmark in options.benchmarks:
        source = "its folder" if benchmark.name in options.data else "its data set from the Hub"
        judged = benchmark.judge and not os.environ.get(KEY)
        what = [
            source,
            *(
                [f"a judge, with its key in {KEY}" + (", which is not set" if judged else "")]
                if benchmark.judge
                else []
            ),
        ]
        yield benchmark, "; ".join([" and ".join(what), *filter(None, [benchmark.note])]), not judged


def run(options: Options, tell: Callable[[str], None] = lambda line: None) -> Measured:
    """Evaluate every arm on every benchmark that can be scored.

    Parameters
    ----------
    options : Options
    tell : callable
        Called with lines for the person.

    Returns
    -------
    Measured
        The same in every process. A benchmark whose data cannot be had, or whose judge fails, is left out by name;
        the others run.

    Raises
    ------
    ValueError
        For a model that is no LLaVA.
    Exception
        If the model fails; no score takes the place of an answer.
    """
    with launched(options.device) as state:
        return _run(options, state, tell if state.is_main_process else lambda line: None)


def _run(options: Options, state: PartialState, tell: Callable[[str], None]) -> Measured:
    left_out: dict[str, str] = {}
    for benchmark, what, possible in needs(options):
        tell(f"{benchmark.name}: needs {what}")
        if not possible:
            left_out[benchmark.name] = f"{KEY} is not set"
    loaded = load_model(options.model, device=own_device(options.device, state), dtype=options.dtype)
    models = {arm.name: _model(options, arm, loaded) for arm in options.arms}
    options.out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, Score]] = {}
    for benchmark in options.benchmarks:
        if benchmark.name in left_out:
            continue
        try:
            scores[benchmark.name] = _scores(options, benchmark, models, tell)
        except _Unavailable as error:
            left_out[benchmark.name] = str(error)
            tell(f"{benchmark.name}: left out, {error}")
    return Measured(scores, left_out, loaded[0].config, dict(_unguided(options.arms, *loaded)))


def _unguided(arms: Sequence[Arm], model: Any, processor: Any) -> Iterator[tuple[str, str]]:
    """Yield the arms that no question guides, each with what the checkpoint lacks for that."""
    for arm in arms:
        with arm.applied(model):
            if missing := missing_guidance(model, processor):
                yield arm.name, missing


def _of_main(value: Any) -> Any:
    """Return what the first process has, in all of them."""
    return broadcast_object_list([value])[0]


class _Unavailable(Exception):
    """Data or a judge that cannot be had."""


def _model(options: Options, arm: Arm, loaded: tuple[Any, Any]) -> IVTPLlava:
    return IVTPLlava(
        pretrained=options.model,
        method=arm.method,
        visual_tokens=arm.visual_tokens,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        loaded=loaded,
        system_prompt="vicuna" if options.published else "",
        pad=options.published,
    )


def _scores(
    options: Options, benchmark: Benchmark, models: Mapping[str, IVTPLlava], tell: Callable[[str], None]
) -> dict[str, Score]:
    """Return the scores of all arms on a benchmark; those that were scored before are read."""
    found, task = {}, None
    revision = _of_main(_revision(options, benchmark))
    for name, model in models.items():
        file = options.out / benchmark.name / f"{name}.json"
        identity = _identity(options, benchmark, model)
        samples = _scored_before(file, identity, revision)
        known = _of_main(samples is not None)
        if known:
            tell(f"{benchmark.name}, {name}: scored before")
        else:
            task = task or _task(options, benchmark)
            file.parent.mkdir(exist_ok=True)
            journal = file.with_suffix(f".{identity}-{revision}-{_share(options, model)}.jsonl")
            samples = _samples(task, model, journal)
        score, reason = None, None
        if model.rank == 0:
            try:
                score = benchmark.score(samples or [])
            except RuntimeError as error:  # of a judge
                reason = str(error)
            except Exception as error:  # rows fail in many ways: no such column, no such category
                reason = _unscored(error)
            else:
                if not known:
                    _write(file, {"identity": identity, "revision": revision, "samples": samples})
        score, reason = _of_main((score, reason))
        if reason is not None:
            raise _Unavailable(reason)
        found[name] = score
        tell(f"{benchmark.name}, {name}: {score.value:.1f}")
    return found


def _scored_before(file: Path, identity: str, revision: str | None) -> list[dict[str, Any]] | None:
    """Return the samples in a file, if all that decides them is as it was; an unknown revision counts as the same."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    revisions = {before.get("revision"), revision} - {None}
    return before["samples"] if before.get("identity") == identity and len(revisions) < 2 else None


def _share(options: Options, model: IVTPLlava) -> str:
    """Name what decides which questions a process answers side by side."""
    return f"{options.batch_size}-{model.rank}-of-{model.world_size}"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write the samples of an arm, and remove the journals of their questions."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, default=str))
    partial.replace(file)
    for journal in file.parent.glob(f"{glob.escape(file.stem)}.*.jsonl"):
        journal.unlink()


def _identity(options: Options, benchmark: Benchmark, model: IVTPLlava) -> str:
    """Return a digest of all that decides the samples of an arm on a benchmark."""
    data = options.data.get(benchmark.name)
    changes = json.dumps(dict(benchmark.changes), default=lambda function: function.__name__, sort_keys=True)
    parts = [
        model.fingerprint,
        benchmark.file,
        changes,
        str(options.limit),
        version("lmms-eval"),
        *(f"{name}={os.environ.get(name)}" for name in JUDGE if benchmark.judge),
        *([] if data is None else _state(data)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _revision(options: Options, benchmark: Benchmark) -> str | None:
    """Return the commit of a benchmark's data set; None for a folder's, or if the Hub does not tell it."""
    if benchmark.name in options.data:
        return None
    try:
        return HfApi().dataset_info(task_config(benchmark)["dataset_path"], timeout=10).sha
    except Exception:  # whatever is wrong with the data, the task tells it when it loads them
        return None


def _state(folder: Path) -> list[str]:
    """Tell the Parquet files of a folder from those before a change."""
    files = [(file.resolve(), file.stat()) for file in sorted(folder.rglob("*.parquet"))]
    return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in files]


def task_config(benchmark: Benchmark, data: Path | None = None) -> dict[str, Any]:
    """Return the entries of a benchmark's task file, with what differs here.

    Parameters
    ----------
    benchmark : Benchmark
    data : Path, optional
        A folder with the data set, whose rows hold their pictures, in place of the Hub's.

    Raises
    ------
    FileNotFoundError
        If the folder has no file of the benchmark's split.
    """
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    file = Path(lmms_eval.tasks.__file__).parent / benchmark.file
    # Copied, as the harness writes into what it is given.
    config = dict(load_yaml_config(str(file), mode="full")) | copy.deepcopy(dict(benchmark.changes))
    for name in ("tag", "group", "model_specific_generation_kwargs"):
        config.pop(name, None)
    # Public data need no account; where there is one, its token is sent.
    kept = {name: value for name, value in (config.get("dataset_kwargs") or {}).items() if name != "token"}
    config["dataset_kwargs"] = kept or None
    if data is not None:
        config |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {config["test_split"]: _files(data, config["test_split"])}},
            "process_docs": None,
        }
    return config


def _files(folder: Path, split: str) -> list[str]:
    """Return the Parquet files of a split, wherever they lie in a folder.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    found = [
        str(file.resolve())
        for file in sorted(folder.rglob("*.parquet"))
        if file.stem == split or file.name.startswith(f"{split}-")
    ]
    if not found:
        raise FileNotFoundError(f"the folder has no file {split}.parquet or {split}-*.parquet")
    return found


def _task(options: Options, benchmark: Benchmark) -> Any:
    from lmms_eval.api.task import ConfigurableMessagesTask

    # The harness asks five times, and each time the Hub's own client does, too: minutes for each of twelve data sets.
    ConfigurableMessagesTask.download.retry.stop = stop_after_attempt(1)
    task, reason = None, None
    try:
        config = task_config(benchmark, options.data.get(benchmark.name))
        task = ConfigurableMessagesTask(config=config, model_name="ivtp_llava")
        _limit(task, benchmark, options.limit)
    except Exception as error:  # data sets fail in many ways: no network, no permission, no such split
        reason = f"its data set cannot be had ({_told(error)})"
    else:
        reason = _without_answers(task, benchmark.answer) or _without_questions(task)
    # Where one process has no data, the others would wait for its answers.
    if reasons := [each for each in gather_object([reason]) if each is not None]:
        raise _Unavailable(reasons[0])
    return task


def _limit(task: Any, benchmark: Benchmark, limit: int | None) -> None:
    """Keep the first rows of a task's data, and those that are scored together with them."""
    if limit is None:
        return
    places, split = benchmark.first_rows(task.eval_docs, limit), task.config.test_split
    # With pictures and without them; for tasks that score pictures both are the same.
    whole = [(data, data[split]) for data in (task.dataset, task.dataset_no_image)]
    for data, rows in whole:
        data[split] = rows.select(places)


def _without_answers(task: Any, column: str) -> str | None:
    """Say which rows of a task's data have no right answer; None if all have one."""
    rows = task.eval_docs
    if column not in rows.column_names:
        return f"its data have no column {column}"
    right = rows.select_columns([column])[:][column]
    missing = [number for number, answer in enumerate(right) if answer is None or answer in ("", [])]
    return f"{len(missing)} of its rows have no {column}, the first is row {missing[0]}" if missing else None


def _unscored(error: BaseException) -> str:
    return f"its answers cannot be scored ({_told(error)})"


def _without_questions(task: Any) -> str | None:
    """Say why the first row makes no question; None if it does."""
    try:
        task.doc_to_messages(task.eval_docs[0])
    except Exception as error:
        return f"its first row cannot be asked ({_told(error)})"
    return None


def _told(error: BaseException) -> str:
    """Return an error in one line: of several attempts the last one's, of a data set that cannot be built the cause."""
    if isinstance(error, RetryError):
        error = error.last_attempt.exception() or error
    if isinstance(error, DatasetGenerationError):
        error = error.__cause__ or error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _samples(task: Any, model: IVTPLlava, journal: Path) -> list[dict[str, Any]] | None:
    """Return what the harness logs of every question; the journal holds the answers of a run that was stopped.

    Other processes than the first get None.

    Raises
    ------
    _Unavailable
        If the harness cannot score the answers.
    """
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    module = model.model  # the harness takes it out of the model when it has its answers
    try:
        with Journal(journal) as model.journal:
            found = evaluator.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
            )
    except Exception as error:
        # Other processes would wait for this one in the harness, so there the run has to end.
        if not model.answered or model.world_size > 1:
            raise
        raise _Unavailable(_unscored(error)) from error
    finally:
        model.model, model.journal = module, None
        task.instances.clear()
    if found is None:
        return None
    (samples,) = found["samples"].values()
    kept = ("doc_id", "doc", "filtered_resps", "token_counts")
    shown = [{name: value for name, value in sample.items() if name in kept or _is_score(value)} for sample in samples]
    return json.loads(json.dumps(sorted(shown, key=lambda sample: sample["doc_id"]), default=_plain))


def _is_score(value: Any) -> bool:
    return isinstance(value, (bool, int, float, dict))


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item()
    return str(value)
