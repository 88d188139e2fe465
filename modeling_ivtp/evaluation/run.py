"""Run the paper's benchmarks in lmms-eval, in several arms: `ivtp evaluate`."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch.journal import Journal
from ..serving.answering import load_model
from .arm import Arm
from .lmms_model import IVTPLlava
from .paper import Benchmark, Measured, Score

KEY = "OPENAI_API_KEY"
"""The environment variable that lmms-eval's judges read."""


@dataclass(frozen=True)
class Options:
    """What is evaluated.

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
        Questions of each benchmark, from the first; None: all.
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
        A benchmark whose data cannot be had, or whose judge fails, is left out by name; the others run.

    Raises
    ------
    ValueError
        For a model that is no LLaVA.
    Exception
        If the model fails; no score takes the place of an answer.
    """
    left_out: dict[str, str] = {}
    for benchmark, what, possible in needs(options):
        tell(f"{benchmark.name}: needs {what}")
        if not possible:
            left_out[benchmark.name] = f"{KEY} is not set"
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
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
    return Measured(scores, left_out, loaded[0].config)


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
    for name, model in models.items():
        file = options.out / benchmark.name / f"{name}.json"
        identity = _identity(options, benchmark, model)
        before = json.loads(file.read_text()) if file.is_file() else {}
        if before.get("identity") == identity:
            samples = before["samples"]
            tell(f"{benchmark.name}, {name}: scored before")
        else:
            task = task or _task(options, benchmark)
            file.parent.mkdir(exist_ok=True)
            samples = _samples(options, task, model, file.with_suffix(f".{identity}-{options.batch_size}.jsonl"))
        try:
            found[name] = benchmark.score(samples)
        except RuntimeError as error:
            raise _Unavailable(str(error)) from error
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": identity, "samples": samples}, default=str))
        partial.replace(file)
        for journal in file.parent.glob(f"{glob.escape(name)}.*.jsonl"):
            journal.unlink()
        tell(f"{benchmark.name}, {name}: {found[name].value:.1f}")
    return found


def _identity(options: Options, benchmark: Benchmark, model: IVTPLlava) -> str:
    """Return a digest of all that decides the samples of an arm on a benchmark."""
    data = options.data.get(benchmark.name)
    changes = json.dumps(dict(benchmark.changes), default=lambda function: function.__name__, sort_keys=True)
    parts = [
        model.fingerprint,
        benchmark.file,
        changes,
        str(options.limit),
        "" if data is None else str(data.resolve()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def task_config(benchmark: Benchmark, data: Path | None = None) -> dict[str, Any]:
    """Return the entries of a benchmark's task file, with what differs here.

    Parameters
    ----------
    benchmark : Benchmark
    data : Path, optional
        A folder with the data set, whose rows hold their pictures, in place of the Hub's.
    """
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    file = Path(lmms_eval.tasks.__file__).parent / benchmark.file
    config = dict(load_yaml_config(str(file), mode="full")) | dict(benchmark.changes)
    for name in ("tag", "group", "model_specific_generation_kwargs"):
        config.pop(name, None)
    if data is not None:
        config |= {
            "dataset_path": str(data.resolve()),
            "dataset_name": None,
            "dataset_kwargs": None,
            "process_docs": None,
        }
    return config


def _task(options: Options, benchmark: Benchmark) -> Any:
    from lmms_eval.api.task import ConfigurableMessagesTask

    config = task_config(benchmark, options.data.get(benchmark.name))
    try:
        return ConfigurableMessagesTask(config=config, model_name="ivtp_llava")
    except Exception as error:  # data sets fail in many ways: no network, no permission, no such split
        raise _Unavailable(f"its data set cannot be had ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _samples(options: Options, task: Any, model: IVTPLlava, journal: Path) -> list[dict[str, Any]]:
    """Return what the harness logs of every question; the journal holds the answers of a run that was stopped."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    module = model.model  # the harness takes it out of the model when it has its answers
    try:
        with Journal(journal) as model.journal:
            found = evaluator.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),
                limit=options.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
    finally:
        model.model, model.journal = module, None
        task.instances.clear()
    assert found is not None  # other processes than the first get nothing, and this command runs in one
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
