"""The options of a run, and presets: published recipes in `configuration/training/*.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..files.shipped import shipped
from ..model.configuration_ivtp import is_number, is_whole
from .parts import PrunedBy

PARTS = ("connector", "projector", "language_model", "pruner")
"""Parts that can learn; the pruner's are modules of a trained method. Vision tower and CLIP's text half stay frozen."""
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16")
LOGS = ("tensorboard", "trackio")
_LEAST = {
    "learning_rate": 0.0, "batch_size": 1, "epochs": 0.0, "warmup_ratio": 0.0, "weight_decay": 0.0,
    "max_grad_norm": 0.0, "max_length": 2,
}  # fmt: skip
_WHOLE = ("batch_size", "max_length")


@dataclass(frozen=True)
class Preset:
    """Parts that learn, and their schedule. LLaVA-1.5's two stages ship as `llava-1.5-stage-1` and `llava-1.5-stage-2`.

    What trained methods print of their own training ships under their names.

    Attributes
    ----------
    trains : tuple of {"connector", "projector", "language_model", "pruner"}
        The parts that learn; a model without a connector leaves that out. `"pruner"` are the modules of a trained
        method, which always learn under it.
    learning_rate : float
        Its peak.
    pruner_learning_rate : float or None
        That of the modules of a trained method, where it is another one.
    batch_size : int
        Conversations of one step, over all processes.
    epochs : float
    warmup_ratio : float
        Share of the steps in which the rate rises.
    scheduler : {"cosine", "linear", "constant", "constant_with_warmup"}
    weight_decay, max_grad_norm : float
    max_length : int
        Tokens of a conversation, image tokens included; what is longer is cut at the end.

    Raises
    ------
    ValueError
        For a value that is not allowed.
    """

    trains: tuple[str, ...]
    learning_rate: float
    batch_size: int
    epochs: float = 1.0
    warmup_ratio: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 2048
    pruner_learning_rate: float | None = None

    def __post_init__(self) -> None:
        trains = tuple(self.trains)
        if not trains or not set(trains) <= set(PARTS):
            raise ValueError(f"trains={list(trains)}; allowed: some of {', '.join(PARTS)}.")
        object.__setattr__(self, "trains", trains)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            whole = name in _WHOLE
            fits = is_whole(value) if whole else is_number(value) and value < float("inf")
            above = name in ("learning_rate", "epochs")
            if not fits or value < least or (above and value <= least):
                kind = f"a whole number of at least {least}" if whole else f"a number {'above' if above else 'from'} 0"
                raise ValueError(f"{name}={value!r}; allowed: {kind}.")
        rate = self.pruner_learning_rate
        if rate is not None and not (is_number(rate) and 0 < rate < float("inf")):
            raise ValueError(f"pruner_learning_rate={rate!r}; allowed: a number above 0, or None.")
        if self.warmup_ratio >= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}; allowed: a share of the steps, from 0 to below 1.")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r}; allowed: {', '.join(SCHEDULERS)}.")

    def changed(self, **changes: Any) -> Preset:
        """Return a copy with the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self) | {"trains": list(self.trains)}


def preset_names() -> list[str]:
    """List the presets that ship."""
    return sorted(file.stem for file in shipped("configuration/training").glob("*.json"))


def load_preset(preset: str) -> Preset:
    """Load a preset by the path of its file, or a shipped one by name.

    Raises
    ------
    ValueError
        If there is none, or the file is no preset.
    """
    file = Path(preset).expanduser()
    if not file.is_file():
        if preset not in preset_names():
            raise ValueError(f"there is no preset {preset!r}; allowed: a file, or one of {', '.join(preset_names())}")
        file = shipped("configuration/training") / f"{preset}.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    known = [option.name for option in fields(Preset)]
    if not isinstance(values, Mapping) or not {"trains", "learning_rate", "batch_size"} <= set(values) <= set(known):
        raise ValueError(
            f"{file} is no preset: it needs trains, learning_rate and batch_size; allowed: {', '.join(known)}"
        )
    try:
        return Preset(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Options:
    """A run: what is trained on what, and where it is kept.

    Attributes
    ----------
    model : str
        Folder or Hub id of a LLaVA or an IVTP-LLaVA.
    data : str
        A `.json` or `.jsonl` file in LLaVA's format, or a folder or Hub id that `datasets` reads.
    out : Path
        Folder of the run.
    preset : Preset
    images : Path or None
        Folder that relative paths of pictures start from; default: the data's.
    clip : str or None
        CLIP whose text half joins a LLaVA that has none.
    connector : dict or None
        A connector to join, untrained; see `ConnectorConfig`.
    method : str
        The method that prunes while training: a name, `"ivtp"` or `"unpruned"`, the control. Of a trained method, whose
        modules learn, a name begins with new modules and a folder goes on with those in it.
    tokens : int or None
        Visual tokens that it keeps in the end; default: the model's own of `"ivtp"`, a folder's own, 64 of the others.
    method_options : mapping
        Options of the method, such as `{"target": 88}`; of `"ivtp"`, pruning options that are saved with the model.
    max_steps : int or None
        Steps, in place of the preset's epochs.
    device_batch_size : int or None
        Conversations that a device takes at a time; default: as many as a step has for it, at most 16.
    evaluation_share : float
        Share of the rows that is held out, from 0 to below 1.
    save_steps, log_steps : int
        Steps between checkpoints, and between lines of the log. Held-out rows are measured at every checkpoint.
    seed : int
        Of the order of the rows, of what is held out and of new modules.
    dtype : {"float32", "bfloat16"}
        Type of the weights. Float32 computes in bfloat16 on GPUs that can.
    device : str or None
        `"cpu"` trains there in spite of a GPU, `"cuda"` on a GPU or not at all; default: a GPU if there is one.
    gradient_checkpointing : bool
    workers : int
        Processes that prepare batches.
    limit : int or None
        Rows that are used, from the first.
    log_to : str
        `"tensorboard"`, `"trackio"`, `"none"`, or `"auto"`: the first of them that is installed.
    progress : bool

    Raises
    ------
    ValueError
        For a value that is not allowed.
    """

    model: str
    data: str
    out: Path
    preset: Preset
    images: Path | None = None
    clip: str | None = None
    connector: dict[str, Any] | None = None
    method: str = "ivtp"
    tokens: int | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    device_batch_size: int | None = None
    evaluation_share: float = 0.0
    save_steps: int = 500
    log_steps: int = 10
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    limit: int | None = None
    log_to: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "max_steps", "device_batch_size", "save_steps", "log_steps", "limit"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 1):
                raise ValueError(f"{name}={value!r}; allowed: a whole number of at least 1.")
        if not is_number(self.evaluation_share) or not 0 <= self.evaluation_share < 1:
            raise ValueError(f"evaluation_share={self.evaluation_share!r}; allowed: a share from 0 to below 1.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; allowed: {', '.join(DTYPES)}.")
        if self.device not in (None, *DEVICES):
            names = ", ".join(DEVICES)
            raise ValueError(f"device={self.device!r}; allowed: {names}. CUDA_VISIBLE_DEVICES=1 chooses among GPUs.")
        if self.log_to not in (*LOGS, "none", "auto"):
            raise ValueError(f"log_to={self.log_to!r}; allowed: auto, none, {', '.join(LOGS)}.")
        if self.connector is not None and self.method not in ("ivtp", "unpruned"):
            raise ValueError(f"method={self.method!r} with a connector, which leaves no patches to choose among.")

    @property
    def pruned_by(self) -> PrunedBy:
        """The pruner of the run."""
        return PrunedBy(self.method, self.tokens, self.method_options)

    def settings(self) -> dict[str, Any]:
        """Return what makes this run another one than its neighbours, ready for JSON."""
        names = ("clip", "connector", "method", "tokens", "max_steps", "evaluation_share", "seed", "dtype", "limit")
        settings = {name: getattr(self, name) for name in names} | {"model": self.model, "data": self.data}
        given = self.method_options.items()
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in given}
        return settings | {"method_options": options} | self.preset.to_dict()
