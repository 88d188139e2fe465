"""A training loop that can be stopped at any moment and continued later.

Data is drawn from the step number alone, so only weights, optimizers and step have to be kept. They are written once a
minute in safetensors, to a file beside the last state that then replaces it.
"""

import itertools
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality import processes
from benchmarks.quality.muon import FloatMuon

SAVE_SECONDS = 60.0


class Stopped(Exception):
    """Training was stopped by a signal; its state is on disk."""


class TrainingRun:
    """Weights, optimizers and step of one training stage, on disk and in memory.

    Parameters
    ----------
    folder : Path
        Gets `state.safetensors` and `log.jsonl`.
    modules : Module
        All modules whose weights are kept, trained or not.
    optimizers : list of Optimizer
    settings : dict
        Everything that the stage depends on; a state with other settings is refused.
    """

    def __init__(
        self,
        folder: Path,
        modules: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        settings: dict[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.modules, self.optimizers = folder, modules, optimizers
        self.settings = json.loads(json.dumps(settings))
        self.step, self.seconds = 0, 0.0
        if self.state_file.is_file():
            self._load()

    @property
    def state_file(self) -> Path:
        """The file of the state."""
        return self.folder / "state.safetensors"

    def save(self) -> None:
        """Write the state, if this is the first process; on a full disk, or when stopped, the state before stays."""
        if processes.number():
            return
        tensors = {f"weights.{name}": value.contiguous() for name, value in self.modules.state_dict().items()}
        scalars: dict[str, Any] = {}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    key = f"optimizer.{number}.{index}.{name}"
                    if isinstance(value, torch.Tensor):
                        tensors[key] = value.contiguous()
                    else:
                        scalars[key] = value
        run = {"step": self.step, "seconds": self.seconds, "settings": self.settings, "scalars": scalars}
        beside = self.state_file.with_suffix(".partial")
        try:
            save_file(tensors, beside, {"run": json.dumps(run)})
            os.replace(beside, self.state_file)
        finally:
            beside.unlink(missing_ok=True)

    def _load(self) -> None:
        with safe_open(self.state_file, framework="pt") as file:
            run = json.loads(file.metadata()["run"])
            before = run["settings"]
            if before != self.settings:
                changed = [k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k)]
                raise ValueError(
                    f"{self.state_file} was trained with other settings ({', '.join(sorted(changed))}); choose another "
                    "folder, or the settings it was begun with."
                )
            names = file.keys()
            weights = {n.removeprefix("weights."): file.get_tensor(n) for n in names if n.startswith("weights.")}
            self.modules.load_state_dict(weights)
            for number, optimizer in enumerate(self.optimizers):
                state: dict[int, dict[str, Any]] = {}
                prefix = f"optimizer.{number}."
                found = {n: file.get_tensor(n) for n in names if n.startswith(prefix)}
                found |= {n: value for n, value in run["scalars"].items() if n.startswith(prefix)}
                for key, value in found.items():
                    index, name = key.removeprefix(prefix).split(".", 1)
                    state.setdefault(int(index), {})[name] = value
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = run["step"], run["seconds"]

    def train(
        self, steps: int, one_step: Callable[[int], dict[str, float]], *, title: str, log_every: int = 20
    ) -> None:
        """Run `one_step(step)` until `steps` are done, with a progress bar; the state is saved every minute.

        Of several processes the first one shows, logs and saves; a signal to any of them stops all after the same step.

        Parameters
        ----------
        steps : int
            Number of steps of the stage.
        one_step : callable
            Makes one optimizer step and returns values to log; their means over `log_every` steps are logged.
        title : str
        log_every : int, default 20

        Raises
        ------
        Stopped
            After SIGINT or SIGTERM, once the state is written.
        """
        signals: list[int] = []
        handlers = {
            s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
        }
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[values]}"),
        )  # fmt: skip
        saved = time.monotonic()
        since: dict[str, list[float]] = {}
        try:
            with Progress(*columns, disable=processes.number() > 0) as progress:
                task = progress.add_task(title, total=steps, completed=self.step, values="")
                while self.step < steps:
                    start = time.monotonic()
                    values = one_step(self.step)
                    self.step += 1
                    self.seconds += time.monotonic() - start
                    for name, value in values.items():
                        since.setdefault(name, []).append(value)
                    if self.step % log_every == 0 or self.step == steps:
                        means = {name: sum(logged) / len(logged) for name, logged in since.items()}
                        since = {}
                        self._log(means)
                        shown = "  ".join(f"{name} {value:.3g}" for name, value in means.items())
                        progress.update(task, completed=self.step, values=shown)
                    stopped = processes.any_of(bool(signals))
                    if stopped or time.monotonic() - saved > SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
                    if stopped:
                        raise Stopped(f"{title} stopped at step {self.step} of {steps}; run it again to continue.")
            self.save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _log(self, means: dict[str, float]) -> None:
        if processes.number():
            return
        line = {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in means.items()}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def saved_weights(folder: Path, module: str = "") -> dict[str, torch.Tensor]:
    """Read the weights of a training state, of one module or of all.

    Raises
    ------
    FileNotFoundError
        If there is no state.
    """
    prefix = f"weights.{module}"
    with safe_open(state_in(folder), framework="pt") as state:
        names = [name for name in state.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): state.get_tensor(name) for name in names}


def saved_settings(folder: Path) -> dict[str, Any]:
    """Read the settings that a training state was begun with.

    Raises
    ------
    FileNotFoundError
        If there is no state.
    """
    with safe_open(state_in(folder), framework="pt") as state:
        settings: dict[str, Any] = json.loads(state.metadata()["run"])["settings"]
    return settings


def state_in(folder: Path) -> Path:
    """Return the file of a training state.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    file = folder / "state.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run the stage before it first (make miniature runs all of them).")
    return file


def drawn_ahead(draw: Callable[[int], Any], first: int, ahead: int = 4) -> Iterator[Any]:
    """Yield `draw(first)`, `draw(first + 1)`, …, drawn in a thread while the caller trains on a GPU.

    Without a GPU batches are drawn when asked for: all cores train, and one more thread would slow them down.

    Parameters
    ----------
    draw : callable
        Draws the batch of a step.
    first : int
    ahead : int, default 4
        How many batches may wait.
    """
    if not torch.cuda.is_available():
        yield from map(draw, itertools.count(first))
    waiting: queue.Queue[Any] = queue.Queue(ahead)

    def work() -> None:
        step = first
        while True:
            try:
                waiting.put(draw(step))
            except Exception as error:
                waiting.put(error)
                return
            step += 1

    threading.Thread(target=work, daemon=True).start()
    while True:
        batch = waiting.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """Return the factor on the learning rate: a linear warm-up, then a cosine down to a twentieth."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


def set_up(seed: int, threads: int) -> torch.device:
    """Set seed and CPU threads, join other processes, and return the device: a GPU if there is one."""
    processes.join()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trains_in_bfloat16() -> bool:
    """Return whether bfloat16 is the faster type here: on a GPU, and on CPUs whose cores multiply tiles (AMX).

    Elsewhere a bfloat16 product takes twice as long as one in float32.
    """
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that models train in: autocast to bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=trains_in_bfloat16())


def optimizers_of(module: torch.nn.Module, muon: float = 0.02, adam: float = 2e-3) -> list[torch.optim.Optimizer]:
    """Build the optimizers: Muon for the layers' matrices, AdamW for the rest, with their peak learning rates."""
    kind = torch.optim.Muon if trains_in_bfloat16() else FloatMuon
    matrices = [p for name, p in module.named_parameters() if p.dim() == 2 and ".layers." in name]
    inside = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in inside]
    return [
        kind(matrices, lr=muon, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def optimize(
    module: torch.nn.Module, optimizers: list[torch.optim.Optimizer], losses: dict[str, torch.Tensor], rate: float
) -> dict[str, float]:
    """Make one step down `losses["loss"]` at `rate` of the peak learning rates, and return all losses as numbers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate
        optimizer.zero_grad()
    losses["loss"].backward()
    processes.average_gradients(module)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}
