"""The speed benchmark: stock LLaVA, IVTP and other methods over batches and prompt lengths."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import is_flash_attn_2_available

from ..flops import count_named
from ..methods import Method
from ..model.cuda_graphs import Graphs
from ..model.prompt_graphs import MAX_GRAPHS
from ..trained import is_adapter, make
from .captured_stock import captured
from .compiling import compiled, static_cache
from .growth import growth
from .models import DTYPES, bytes_needed, check_room, prompt, random_model, stock_twin
from .products import products, seconds
from .timing import PARTS, Arm, interleaved, ratio, selection_shares

STOCK, STOCK_FLASH, OFF = "stock", "stock, flash_attention_2", "off"
"""The baseline, the same with another kernel where it is installed, and our model without pruning."""
GRAPHS, LAUNCHES = "+graphs", "-graphs"
"""Suffixes of arms on a GPU. `+graphs`, after `stock` or a budget of IVTP: images and prompts of any size are replayed
as CUDA graphs. `-graphs`, after a budget of IVTP: none are. Without a suffix a model replays as it does by default."""


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Attributes
    ----------
    arms : tuple of str
        `off`, a budget of IVTP such as `ivtp@64`, or of another method such as `fastv@64`, or the folder of a trained
        pruner, with or without a budget; `stock` always runs.
    batches, text_tokens : tuple of int
    new_tokens : int
        Length of the answers, at least 2.
    repeats : int
        Number of pairs.
    dtype : str
    attention : str
        The attention implementation of all arms, the baseline included.
    instruction_tokens : int or None
        Tokens of the prompt that CLIP reads; None: all text tokens, at most 64.
    compiled : bool
        Compile prompts and decoding steps of all arms, with a static cache; on a GPU they run as CUDA graphs.
    label : str
        Part of the results' file name: letters, digits and hyphens.
    """

    arms: tuple[str, ...] = (OFF, "ivtp@64")
    batches: tuple[int, ...] = (1,)
    text_tokens: tuple[int, ...] = (64,)
    new_tokens: int = 128
    repeats: int = 7
    dtype: str = "float32"
    attention: str = "sdpa"
    instruction_tokens: int | None = None
    compiled: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least {least}.")
        for name, least in (("batches", 1), ("text_tokens", 4)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name}={values}; allowed: numbers of at least {least}.")
        if not all(letter.isalnum() or letter == "-" for letter in self.label):
            raise ValueError(f"label={self.label!r}; allowed: letters, digits and hyphens.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; allowed: {', '.join(DTYPES)}.")
        for arm in self.arms:
            if arm not in (STOCK, OFF, STOCK + GRAPHS):
                split(arm)
        if not set(self.arms) - {STOCK}:
            raise ValueError(f"arms={self.arms}; {STOCK} always runs and needs another arm beside it, such as ivtp@64.")

    @property
    def runs(self) -> int:
        """The number of runs of all arms together."""
        return len(self.batches) * len(self.text_tokens) * (self.repeats + 2) * len(self.named)

    @property
    def named(self) -> tuple[str, ...]:
        """The names of all arms, the baseline first."""
        flash = is_flash_attn_2_available() and self.attention == "sdpa" and self.dtype != "float32"
        return tuple(dict.fromkeys((STOCK, *((STOCK_FLASH,) if flash else ()), *self.arms)))

    def spoken(self, text_tokens: int) -> int:
        """Return how many tokens of a prompt are the user's."""
        wanted = 64 if self.instruction_tokens is None else self.instruction_tokens
        return max(1, min(wanted, text_tokens - 3))


def split(arm: str) -> tuple[str, int | None]:
    """Return the method, or a trained one's folder, and the budget of an arm; None is the one saved in the folder.

    Raises
    ------
    ValueError
        If the arm is not of the form `fastv@64`, or there is no such method.
    """
    if is_adapter(arm):
        make(arm)
        return arm, None
    name, _, budget = _plain(arm).rpartition("@")
    if not budget.isdecimal() or int(budget) < 1 or (_names_graphs(arm) and name != "ivtp"):
        raise ValueError(
            f"arm {arm!r}; allowed: {OFF}, a method and its budget, such as ivtp@64 or fastv@128, or the folder of "
            f"a trained pruner; on a GPU also {STOCK}{GRAPHS}, ivtp@64{GRAPHS} and ivtp@64{LAUNCHES}."
        )
    make(name, int(budget))
    return name, int(budget)


def shown(arm: str) -> str:
    """Return an arm as results name it: of a folder, its own name without where it lies."""
    name, at, budget = arm.rpartition("@")
    if is_adapter(arm):
        return Path(arm).resolve().name
    return f"{Path(name).resolve().name}@{budget}" if at and is_adapter(name) else arm


def bench(
    config: Any,
    settings: Settings,
    *,
    device: torch.device,
    model: Any = None,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure all arms in all cases.

    Parameters
    ----------
    config : IVTPLlavaConfig
    settings : Settings
    device : torch.device
    model : IVTPLlavaForConditionalGeneration, optional
        Default: a model with random weights.
    advance : callable
        Called after every run.
    keep : callable
        Called with all rows so far after every case, so that an interrupted benchmark loses nothing.

    Returns
    -------
    list of dict
        One row for each arm and case.

    Raises
    ------
    ValueError
        If a method does not fit the model, or the machine cannot hold the largest case.
    """
    dtype = DTYPES[settings.dtype]
    methods: dict[str, Method] = {arm: make(*split(arm)) for arm in settings.named if not _prunes_nothing(arm)}
    if device.type != "cuda" and (graphs := [arm for arm in settings.named if _names_graphs(arm)]):
        raise ValueError(f"{', '.join(graphs)}: CUDA graphs need a GPU, and this runs on {device}.")
    for method in methods.values():
        method.bind(config).plan(config, config.num_patches)
    check_largest(config, settings, device, weights=None if model is None else 0)
    if model is None:
        model = random_model(config, dtype=dtype, device=device, attention=settings.attention)
    arms = [_arm(name, model, methods.get(name)) for name in settings.named]
    rows: list[dict[str, Any]] = []
    for batch, text in _cases(settings):
        spoken = settings.spoken(text)
        inputs = prompt(model, batch=batch, text_tokens=text, instruction_tokens=spoken)
        launched = [arm for arm in arms if arm.name in methods and not _names_graphs(arm.name)]
        shares = {arm.name: selection_shares(arm, inputs) for arm in launched}
        for arm in arms:
            if arm.graphs is not None:
                arm.graphs.forget()  # graphs of other cases hold memory that this one may need
        options: dict[str, Any] = {"new_tokens": settings.new_tokens, "repeats": settings.repeats, "advance": advance}
        try:
            if settings.compiled:
                room = inputs["input_ids"].shape[1] + settings.new_tokens
                with compiled([replace(arm, cache=static_cache(arm.model, batch, room)) for arm in arms]) as ready:
                    runs = interleaved(ready, inputs, **options)
            else:
                runs = interleaved(arms, inputs, **options)
            alone = _products(model, settings, batch, text)
        except RuntimeError as error:
            if not rows or not should_reduce_batch_size(error):
                raise
            # The cases measured so far are still results.
            rows[-1]["notes"] += [
                f"Memory ran out at batch {batch} with {text} text tokens; this case and later ones are missing."
            ]
            keep(rows)
            break
        # A case has two graphs, of images and of prompts; one of them may be too large to capture.
        uncaptured = [arm.name for arm in arms if arm.name.endswith(GRAPHS) and len(arm.graphs) < 2]
        for arm in arms:
            if arm.name in uncaptured:
                continue
            choosing, words = shares.get(arm.name, (None, None))
            case = {"arm": shown(arm.name), "batch": batch, "text_tokens": text, "notes": []}
            case |= {
                "selection_share": choosing,
                "words_share": words,
                "in_layers": True,
                "products": alone.get(_plain(arm.name)),
            }
            rows.append(case | _summary(runs[arm.name], runs[STOCK]) | _implied(config, arm.name, text, spoken))
        rows[-1]["notes"] += [f"{arm} could not be captured at batch {batch} and is left out." for arm in uncaptured]
        keep(rows)
    return rows


def check_largest(config: Any, settings: Settings, device: torch.device, weights: int | None = None) -> None:
    """Check that the machine can hold the largest case, before anything is allocated.

    Parameters
    ----------
    config, settings, device
        As in `bench`.
    weights : int, optional
        Bytes of the weights still to be loaded; default: all weights of the shape.

    Raises
    ------
    ValueError
        If it cannot, with the bytes that the largest case needs.
    """
    batch, text_tokens = max(settings.batches), max(settings.text_tokens)
    needed = bytes_needed(
        config,
        dtype=DTYPES[settings.dtype],
        batch=batch,
        text_tokens=text_tokens,
        new_tokens=settings.new_tokens,
        weights=weights,
    )
    check_room(needed, device, f"batch {batch} in {settings.dtype}")


def _plain(arm: str) -> str:
    """Return an arm without its suffix: the arm that computes the same, however it is launched."""
    return arm.removesuffix(GRAPHS).removesuffix(LAUNCHES)


def _prunes_nothing(arm: str) -> bool:
    return _plain(arm) in (STOCK, STOCK_FLASH, OFF)


def _products(model: Any, settings: Settings, batch: int, text_tokens: int) -> dict[str, dict[str, Any]]:
    """Time the matrix products of stock and of IVTP's budgets alone."""
    words, clip = settings.spoken(text_tokens), model.config.clip_text_config
    if clip is not None:
        words += 2 * -(-words // (clip.max_position_embeddings - 2))  # every window has a begin and an end token
    works = {STOCK: products(model, None, batch=batch, text_tokens=text_tokens, words=0)}
    for arm in map(_plain, settings.named):
        if not _prunes_nothing(arm) and split(arm)[0] == "ivtp":
            plan = make(*split(arm)).bind(model.config).plan(model.config, model.config.num_patches)
            works[arm] = products(model, plan, batch=batch, text_tokens=text_tokens, words=words)
    times = seconds(works, repeats=min(5, settings.repeats))
    return {
        arm: {"seconds": float(np.median(own)), "speed_up": list(ratio(times[STOCK], own))}
        for arm, own in times.items()
    }


def _names_graphs(arm: str) -> bool:
    return arm.endswith((GRAPHS, LAUNCHES))


def _arm(name: str, model: Any, method: Any) -> Arm:
    if name == OFF:
        return Arm(name, model, partial(model.pruning, enabled=False))
    if method is None:
        twin = stock_twin(model, "flash_attention_2" if name == STOCK_FLASH else None)
        graphs = Graphs(MAX_GRAPHS) if name.endswith(GRAPHS) else None
        return Arm(name, twin if graphs is None else captured(twin, graphs), graphs=graphs)
    if split(name)[0] != "ivtp":
        return Arm(name, model, partial(method, model))
    limit = 0 if name.endswith(LAUNCHES) else MAX_GRAPHS
    graphs = Graphs(limit, automatic=not name.endswith(GRAPHS))
    return Arm(name, model, partial(_replaying, model, split(name)[1] or 0, graphs), graphs=graphs)


@contextmanager
def _replaying(model: Any, budget: int, graphs: Graphs) -> Iterator[None]:
    """Prune by the model's own options at a budget, with the graphs that this arm captured before."""
    before, model.model.prompt_graphs.graphs = model.model.prompt_graphs.graphs, graphs
    try:
        with model.pruning(**model.pruning_config.at_budget(budget)):
            yield
    finally:
        model.model.prompt_graphs.graphs = before


def _cases(settings: Settings) -> Iterator[tuple[int, int]]:
    for batch in settings.batches:
        for text in settings.text_tokens:
            yield batch, text


def _summary(runs: Sequence[Mapping[str, float]], stock: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Summarise an arm's runs: medians, spread, and paired ratios to the baseline."""
    found: dict[str, Any] = {"kv_bytes": int(runs[-1]["kv_bytes"]), "peak_bytes": None}
    if "peak_bytes" in runs[0]:
        found["peak_bytes"] = int(max(run["peak_bytes"] for run in runs))
    for part in PARTS:
        seconds = [run[part] for run in runs]
        found[part] = {
            "seconds": float(np.median(seconds)),
            "quartiles": [float(value) for value in np.quantile(seconds, [0.25, 0.75])],
            "speed_up": list(ratio([run[part] for run in stock], seconds)),
            "all": [round(value, 6) for value in seconds],
        }
    return found


def _implied(config: Any, arm: str, text_tokens: int, instruction_tokens: int) -> dict[str, Any]:
    """Return the prefill's FLOPs, with the head on the last token alone, and the speed-up that they imply."""
    options: dict[str, Any] = {"text_tokens": text_tokens, "instruction_tokens": instruction_tokens}
    stock = count_named(config, "unpruned", config.num_patches, **options)
    found = stock if _prunes_nothing(arm) else count_named(config, *split(arm), **options)
    total, own = (sum(count.parts.values()) - count.parts["head"] for count in (stock, found))
    return {
        "tflops": own,
        "implied": total / own,
        "final_tokens": found.layer_tokens[-1],
        "layer_averaged_tokens": sum(found.layer_tokens) / len(found.layer_tokens),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: device, CPUs, threads, system and versions."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        cpu = named[0] if named else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": {name: _version(name) for name in ("torch", "transformers", "ivtp-llava")}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from its sources"


def results(
    shape: str, settings: Settings, rows: Sequence[Mapping[str, Any]], device: torch.device, command: str
) -> dict[str, Any]:
    """Collect everything about a benchmark, finished or interrupted, ready for JSON."""
    notes = [note for row in rows for note in row["notes"]]
    cases, measured = len(list(_cases(settings))), len({(row["batch"], row["text_tokens"]) for row in rows})
    if measured < cases:
        notes.append(f"{measured} of {cases} cases were measured.")
    return {
        "date": datetime.date.today().isoformat(),
        "shape": shape,
        "command": command,
        "settings": asdict(settings) | {"arms": [shown(arm) for arm in settings.arms]},
        "machine": machine(device),
        "rows": list(rows),
        "notes": notes,
        "growth": growth(rows),
    }
